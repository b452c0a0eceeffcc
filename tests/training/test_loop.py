"""The loop: it learns, its files are right, kills do not matter, two processes do what one does."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from pansharp_fast.cli import main
from pansharp_fast.models import load_model
from pansharp_fast.training import load_config, recipe_class, train
from pansharp_fast.training.checkpoint import load_state, save_state
from pansharp_fast.training.loop import Trainer, quality
from tests.support.backends import DEVICES

ROOT = Path(__file__).resolve().parents[2]


def trainer(settings, **changes):
    recipe = recipe_class("pancrafter")
    config = load_config(recipe.config_class, None, **(settings | changes))
    return Trainer(recipe(config), config, progress=False)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def flags(settings):
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def command(settings, *extra, launcher=("-m",)):
    return [sys.executable, *launcher, "pansharp_fast", "train", "pancrafter", "--quiet", *flags(settings), *extra]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The uninterrupted run that others are compared with: (settings, folder)."""
    settings = {
        **files, "sensor": "QB", "device": "cpu", "preset": "tiny", "steps": 10, "batch_size": 4, "lr": 2e-3,
        "warmup": 2, "precision": "float32", "log_every": 1, "valid_every": 4, "save_every": 3, "ema": 0.8,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    measures = train("pancrafter", progress=False, out=out, **settings)
    return settings, out, measures


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_in_bfloat16_is_near_one_in_float32(whole, device, tmp_path):
    settings, out, measures = whole
    run = tmp_path / "run"
    mixed = train("pancrafter", progress=False, out=run, **settings | {"device": device, "precision": "bfloat16"})
    losses, expected = ([float(row["loss"]) for row in rows(folder / "log.csv")] for folder in (run, out))
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)
    assert mixed["psnr"] == pytest.approx(measures["psnr"], abs=0.5)


def test_files_of_a_run(whole):
    _, out, measures = whole
    assert {path.name for path in out.iterdir()} == {
        "best.safetensors", "last.safetensors", "config.json", "log.csv", "valid.csv", "valid.png", "tensorboard",
    }  # fmt: skip
    log, valid = rows(out / "log.csv"), rows(out / "valid.csv")
    assert [int(row["step"]) for row in log] == list(range(1, 11))
    assert set(log[0]) == {"step", "lr", "loss", "ms", "pan"}
    for row in log:
        assert float(row["loss"]) == pytest.approx(float(row["ms"]) + float(row["pan"]), rel=1e-5)
    assert [int(row["step"]) for row in valid] == [4, 8, 10]
    assert float(valid[-1]["psnr"]) == pytest.approx(measures["psnr"])
    assert json.loads((out / "config.json").read_text())["ema"] == 0.8
    assert list((out / "tensorboard").iterdir())
    model = load_model(out / "best.safetensors", bands=4)
    assert model.config.hidden_sizes == (32, 64)


def test_kill_and_resume(whole, tmp_path):
    settings, out, _ = whole
    killed = tmp_path / "run"
    process = subprocess.Popen(command(settings | {"out": killed}), cwd=ROOT, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not (killed / "last.safetensors").exists() or len((killed / "log.csv").read_text().splitlines()) < 6:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (killed / "last.safetensors.partial").write_bytes(b"a write that the kill cut short")
    stopped = load_state(killed / "last.safetensors")[1]["step"]
    assert 0 < stopped < 10
    refused = CliRunner().invoke(main, command(settings | {"out": killed})[3:])
    assert refused.exit_code == 1
    assert "out: expected a folder without a run" in refused.output
    subprocess.run(command(settings | {"out": killed}, "--resume"), cwd=ROOT, env=ENVIRONMENT, check=True)
    assert same(killed / "last.safetensors", out / "last.safetensors")
    assert (killed / "best.safetensors").read_bytes() == (out / "best.safetensors").read_bytes()
    assert rows(killed / "log.csv") == rows(out / "log.csv")
    assert rows(killed / "valid.csv") == rows(out / "valid.csv")


def test_two_processes_do_what_one_does(whole, tmp_path):
    settings, out, _ = whole
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    subprocess.run(
        command(settings | {"out": tmp_path / "run"}, launcher=launcher), cwd=ROOT, env=ENVIRONMENT, check=True
    )
    one, two = rows(out / "log.csv"), rows(tmp_path / "run" / "log.csv")
    assert [float(row["loss"]) for row in two] == pytest.approx([float(row["loss"]) for row in one], rel=1e-4)
    assert [float(row["psnr"]) for row in rows(tmp_path / "run" / "valid.csv")] == pytest.approx(
        [float(row["psnr"]) for row in rows(out / "valid.csv")], rel=1e-4
    )


def test_it_learns(settings, tmp_path):
    run = trainer(settings, out=tmp_path / "run", steps=30, valid_every=30, save_every=30, ema=0.0)
    before = run.validate()[0]
    after = run.run()
    assert after["psnr"] > before["psnr"] + 1
    assert after["ergas"] < before["ergas"]
    assert after["sam"] < before["sam"]


def test_average_of_weights(settings, tmp_path):
    """The moving average, against its definition, from the weights after each step."""
    run = trainer(settings, out=tmp_path / "run", steps=4, ema=0.6, ema_start=2)
    seen = []
    update = run._update

    def record(*arguments):
        result = update(*arguments)
        seen.append(run.model.state_dict()["input.weight"].clone())
        return result

    run._update = record
    run.run()
    expected = seen[1]
    for weights in seen[2:]:
        expected = 0.6 * expected + 0.4 * weights
    torch.testing.assert_close(run.average["input.weight"], expected)
    torch.testing.assert_close(run.model.state_dict()["input.weight"], seen[-1], rtol=0, atol=0)
    with run.averaged() as model:
        assert not model.training
        torch.testing.assert_close(model.state_dict()["input.weight"], expected)
    stored = load_state(tmp_path / "run" / "last.safetensors")[0]
    torch.testing.assert_close(stored["average.input.weight"], expected)


@pytest.mark.parametrize("name", ["auto", ""])
def test_device_is_chosen(settings, name):
    assert trainer(settings, device=name, out="run").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device: expected auto, cpu, cuda or cuda:N, got 'abacus'"):
        trainer(settings, device="abacus", out="run")


def test_bfloat16_and_clipping(settings, tmp_path):
    run = trainer(settings | {"precision": "bfloat16"}, out=tmp_path / "run", steps=2, clip=1e-4)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.run()
    assert any(not torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in run.parameters]))
    assert float(norm) <= 1e-4 * 1.001
    assert all(value.dtype == torch.float32 for value in run.model.state_dict().values())


def test_every_sample_once_an_epoch(settings, tmp_path):
    run = trainer(settings, out=tmp_path / "run", batch_size=5, steps=4)
    from pansharp_fast.training.loop import _Batches

    batches = list(_Batches(10, run.config, 0, 0, 1))
    for epoch in (0, 1):
        pairs = batches[2 * epoch] + batches[2 * epoch + 1]
        assert sorted(index for _, index in pairs) == list(range(10))
        assert {e for e, _ in pairs} == {epoch}
    assert [i for _, i in batches[0]] != [i for _, i in batches[2]]
    assert list(_Batches(10, run.config, 3, 0, 1)) == batches[3:]
    shares = [list(_Batches(10, run.config, 0, rank, 5)) for rank in range(5)]
    assert sorted(pair for share in shares for pair in share[1]) == sorted(batches[1])


def test_refusals(settings, files, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="batch_size: expected at most 10 samples, got 11"):
        trainer(settings, out=out, batch_size=11)
    with pytest.raises(ValueError, match="peak: expected a number, or a sensor"):
        trainer({name: value for name, value in settings.items() if name != "sensor"}, out=out)
    with pytest.raises(ValueError, match="pan_share: expected"):
        trainer(settings, out=out, pan_share=0)
    with pytest.raises(ValueError, match="preset: expected one of"):
        trainer(settings | {"preset": "huge"}, out=out)
    assert not out.exists()
    out.mkdir()
    save_state(out / "last.safetensors", {"model.x": torch.zeros(1)}, {"recipe": "prior", "step": 1, "best": None})
    with pytest.raises(ValueError, match="expected a state of recipe pancrafter, got 'prior'"):
        trainer(settings, out=out).run(resume=True)
    (out / "last.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        trainer(settings, out=out).run(resume=True)


def test_quality_of_known_errors():
    gt = torch.full((2, 4, 8, 8), 0.5)
    fused = gt.clone()
    fused[0, 0] += 0.1  # one band of four
    measures = quality(torch.cat([fused[:1], fused[:1]]), gt)
    assert measures["psnr"] == pytest.approx(-10 * torch.log10(torch.tensor(0.01 / 4)).item(), rel=1e-5)
    assert measures["ergas"] == pytest.approx(25 * (0.04 / 4) ** 0.5, rel=1e-5)
    cosine = (3 * 0.25 + 0.3) / (1.0 * (3 * 0.25 + 0.36) ** 0.5)
    assert measures["sam"] == pytest.approx(torch.rad2deg(torch.acos(torch.tensor(cosine))).item(), rel=1e-4)


def test_a_run_does_not_replace_what_it_starts_from(settings, tmp_path):
    (tmp_path / "best.safetensors").write_bytes(b"weights")
    (tmp_path / "soft.safetensors").symlink_to("best.safetensors")
    for init in ("best.safetensors", "soft.safetensors"):
        with pytest.raises(
            ValueError, match=r"out: best.safetensors: expected another file than the input, .* of init"
        ):
            trainer(settings, out=str(tmp_path), init=str(tmp_path / init))
    assert (tmp_path / "best.safetensors").read_bytes() == b"weights"
