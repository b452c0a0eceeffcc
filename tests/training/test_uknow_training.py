"""The three stages of U-Know-DiffPAN: on real files end to end, and each way of distilling on synthetic ones."""

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

from pansharp_fast.data.hdf5 import PanCollection
from pansharp_fast.models import load_model
from pansharp_fast.training import load_config, recipe_class, train
from pansharp_fast.training.checkpoint import load_state
from pansharp_fast.training.knowledge import TeacherKnowledge
from pansharp_fast.training.loop import quality

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"preset": "tiny", "device": "cpu", "clip": 1.0, "ema": 0.0, "schedule": "cosine", "log_every": 1}


def losses(folder):
    with open(folder / "log.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_real_files_end_to_end(shared, tmp_path):
    folder = shared / "data" / "GF2"
    settings = {
        **COMMON, "train": str(folder / "train_gf2.h5"), "valid": str(folder / "valid_gf2.h5"), "sensor": "GF2",
        "batch_size": 4, "lr": 3e-3, "warmup": 3, "progress": False,
    }  # fmt: skip
    out = {stage: tmp_path / stage for stage in ("prior", "teacher", "student")}
    best = {stage: str(path / "best.safetensors") for stage, path in out.items()}
    train("prior", out=out["prior"], steps=30, **settings)
    train("teacher", out=out["teacher"], steps=16, sample_steps=4, prior=best["prior"], **settings)
    measures = train("student", out=out["student"], steps=200, sample_steps=4, teacher=best["teacher"], **settings)
    for path in out.values():
        course = losses(path)
        assert sum(course[-5:]) < sum(course[:5])
    data = PanCollection(settings["valid"], sensor="GF2", lms=True)
    sample = data[0]
    before = quality(sample["lms"][None], sample["gt"][None])
    assert measures["psnr"] > before["psnr"]
    assert measures["ergas"] < before["ergas"]


@pytest.fixture(scope="module")
def stages(files, tmp_path_factory):
    """Settings, and checkpoints of a prior network and a teacher after two steps."""
    settings = {**COMMON, **files, "sensor": "QB", "steps": 2, "batch_size": 2, "warmup": 0, "progress": False}
    folder = tmp_path_factory.mktemp("stages")
    train("prior", out=folder / "prior", **settings)
    prior = folder / "prior" / "best.safetensors"
    train("teacher", out=folder / "teacher", prior=prior, sample_steps=2, **settings)
    return settings | {"sample_steps": 2}, prior, folder / "teacher" / "best.safetensors"


def weights(folder):
    return {name: value for name, value in load_state(folder / "last.safetensors")[0].items() if "model." in name}


def test_teacher_keeps_its_prior_network(stages):
    _, prior, teacher = stages
    expected = load_model(prior).state_dict()
    model = load_model(teacher)
    for name, tensor in model.prior.state_dict().items():
        assert torch.equal(tensor, expected[name])
    assert model.final_conv.block[3].weight.any()


def test_resumed_run_is_the_uninterrupted_one(stages, tmp_path):
    settings, _, teacher = stages
    settings = settings | {"steps": 4, "save_every": 2, "teacher": teacher, "augment": True}
    train("student", out=tmp_path / "whole", **settings)
    state = tmp_path / "part"
    state.mkdir()
    recipe = recipe_class("student")
    from pansharp_fast.training.loop import Trainer

    class Killed(Exception):
        pass

    class Stopping(Trainer):
        def save(self):
            super().save()
            raise Killed

    given = {name: value for name, value in settings.items() if name != "progress"}
    config = load_config(recipe.config_class, None, out=str(state), **given)
    with pytest.raises(Killed):
        Stopping(recipe(config), config, progress=False).run()
    train("student", out=state, resume=True, **settings)
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(state)[name], value), name


@pytest.mark.parametrize("knowledge", ["cached", "released"])
def test_cached_knowledge(stages, tmp_path, knowledge):
    settings, _, teacher = stages
    settings = settings | {"teacher": teacher, "knowledge": knowledge, "augment": False}
    cache = tmp_path / "teacher.h5"
    train("student", out=tmp_path / "first", cache=str(cache), **settings)
    with h5py.File(cache) as file:
        assert set(file) == {"out", "variance", *(f"feature{number}" for number in range(1, 5))}
        assert file["out"].shape == (10, 4, 36, 36)
        assert file["out"].chunks == (1, 4, 36, 36)
        assert file["out"].dtype == "float32"
        first = file["out"][3]
        assert file["variance"][:].min() > 0
    data = PanCollection(settings["train"], sensor="QB", lms=True)
    sample = TeacherKnowledge(data, cache, load_model(teacher), knowledge == "released")[3]
    torch.testing.assert_close(sample["teacher_out"], torch.from_numpy(first))
    assert torch.equal(sample["gt"], data[3]["gt"])
    stamp = cache.stat().st_mtime_ns
    train("student", out=tmp_path / "second", cache=str(cache), **settings)  # reads what the first run wrote
    assert cache.stat().st_mtime_ns == stamp
    for name, value in weights(tmp_path / "first").items():
        assert torch.equal(weights(tmp_path / "second")[name], value)


@pytest.mark.parametrize("stage", ["prior", "teacher", "student"])
def test_two_processes(stages, tmp_path, stage):
    settings, prior, teacher = stages
    settings = {name: value for name, value in settings.items() if name not in ("progress", "sample_steps")}
    settings |= {"out": tmp_path / "run", "batch_size": 4, "log_every": 1}
    if stage != "prior":
        settings |= {"sample_steps": 2, "prior": prior}
    if stage == "student":
        # The process that does not make the cache waits for it.
        settings = {**settings, "teacher": teacher, "knowledge": "cached", "augment": False}
        del settings["prior"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "pansharp_fast", "train", stage, "--quiet", *flags]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found = losses(tmp_path / "run")
    assert len(found) == 2
    assert all(math.isfinite(loss) for loss in found)
    assert load_model(tmp_path / "run" / "best.safetensors", bands=4).architecture == f"uknow-{stage}"
    if stage == "prior":  # nothing is drawn there: two processes do what one does
        train("prior", **(settings | {"out": tmp_path / "one"}), progress=False)
        assert found == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_half_precision_cache(stages, tmp_path):
    settings, _, teacher = stages
    train(
        "student", out=tmp_path, teacher=teacher, knowledge="cached", augment=False, cache_float16=True, **settings
    )  # fmt: skip
    with h5py.File(tmp_path / "teacher.h5") as file:
        assert file["feature1"].dtype == "float16"


def test_cache_of_other_data_teacher_or_sampling_is_refused(stages, tmp_path):
    settings, prior, teacher = stages
    given = settings | {"teacher": teacher, "knowledge": "cached", "augment": False, "cache": str(tmp_path / "t.h5")}
    train("student", out=tmp_path / "run", **given)
    with pytest.raises(ValueError, match=r"expected teacher knowledge made from .*valid\.h5, got another fingerprint"):
        train("student", out=tmp_path / "a", **(given | {"train": settings["valid"]}))
    with pytest.raises(ValueError, match="expected teacher knowledge released=True"):
        train("student", out=tmp_path / "b", **(given | {"knowledge": "released"}))
    train("teacher", out=tmp_path / "other", prior=prior, **(settings | {"seed": 5}))
    with pytest.raises(ValueError, match="expected teacher knowledge made by this teacher"):
        train("student", out=tmp_path / "c", **(given | {"teacher": tmp_path / "other" / "best.safetensors"}))
    shutil.copy(settings["train"], tmp_path / "t.h5")
    with pytest.raises(ValueError, match="expected teacher knowledge of this package"):
        train("student", out=tmp_path / "d", **given)


def test_wrong_checkpoints(stages, tmp_path):
    settings, prior, teacher = stages
    with pytest.raises(ValueError, match="prior: expected weights of a prior network, got uknow-teacher"):
        train("teacher", out=tmp_path, prior=teacher, **settings)
    with pytest.raises(ValueError, match="teacher: expected weights of a teacher, got uknow-prior"):
        train("student", out=tmp_path, teacher=prior, **settings)
    with pytest.raises(ValueError, match="teacher: expected inner_channel=32 as in preset paper, got 8"):
        train("student", out=tmp_path, teacher=teacher, **(settings | {"preset": "paper"}))
    with pytest.raises(ValueError, match="prior: expected highpass_pan=True as in preset released, got False"):
        train("teacher", out=tmp_path, prior=prior, **(settings | {"preset": "released"}))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("teacher", {"prior": "p", "loss": "l2"}, "loss: expected beta_nll or laplace, got 'l2'"),
        ("student", {"teacher": "t", "knowledge": "none"}, "knowledge: expected online, cached or released"),
        ("student", {"teacher": "t", "knowledge": "cached"}, "augment: expected false"),
        ("student", {"teacher": "t", "prediction": "x0"}, "prediction: expected one of sample, epsilon, v_prediction"),
    ],
)
def test_bad_settings(stage, changes, message):
    config = recipe_class(stage).config_class
    with pytest.raises(ValueError, match=message):
        load_config(config, None, train="a", valid="b", out="c", **changes)
