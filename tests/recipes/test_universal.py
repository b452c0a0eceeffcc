"""The recipe of `universal`: pretended acquisitions are seeded and as they say, training goes on where it stopped."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pansharp_fast.data.observation import blur, observe
from pansharp_fast.demo import SCENES, SENSOR
from pansharp_fast.evaluation.methods import parse
from pansharp_fast.evaluation.run import measure
from pansharp_fast.evaluation.scenes import Pair
from pansharp_fast.models import load_model
from pansharp_fast.models.checkpoint import WEIGHTS

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "universal"


@pytest.fixture(scope="module")
def simulate():
    spec = importlib.util.spec_from_file_location("universal_simulate", RECIPE / "simulate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def images(side=128, count=2):
    """Smooth shapes and texture in four bands, in [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    shape = torch.rand(count, 4, side, side, generator=generator, dtype=torch.float64)
    shared = blur(torch.rand(count, 1, side, side, generator=generator, dtype=torch.float64), 1.0)
    return (0.3 * blur(shape, 6.0) + 0.7 * shared).float().clamp(0, 1)


@pytest.mark.parametrize(("bands", "ratio"), [(1, 4), (4, 4), (8, 2), (3, 5), (12, 3)])
def test_scene(simulate, bands, ratio):
    first, second = (simulate.acquire(images(), np.random.default_rng(7), bands, ratio) for _ in range(2))
    assert torch.equal(first.ms, second.ms)
    assert torch.equal(first.pan, second.pan)
    k, c, h, w = first.gt.shape
    assert (k, c) == (2, bands)
    assert first.pan.shape == (2, 1, h, w)
    assert first.ms.shape == (2, bands, h // ratio, w // ratio)
    assert h % ratio == w % ratio == h % 4 == 0
    inputs, target = first.inputs()
    assert torch.isfinite(target).all()
    assert inputs.details.shape == (2, bands, 5, h, w)


def test_ms_is_the_truth_as_the_sensor_sees_it(simulate):
    gt = 100 * images()
    scene = simulate.degrade(gt[:, :1].clone(), gt, np.random.default_rng(2), 4, "")
    assert "warp 0.00" in scene.kind  # nothing else moves MS under this seed
    grid = {"gains": scene.gains, "ratio": 4, "phase": scene.phase}
    seen, still = (observe(gt, (32, 32), **grid, d=d) for d in (scene.d, None))
    errors = [((x - scene.ms)[..., 3:-3, 3:-3]).std() for x in (seen, still)]
    assert errors[0] < 0.5 * errors[1]


def test_patches(simulate):
    scene = simulate.acquire(images(160), np.random.default_rng(1), 4, 4)
    rows = simulate.patches(scene, np.random.default_rng(0))
    assert rows["details"].shape[1:] == (4, 5, 64, 64)
    assert rows["bands"].shape[1:] == (4, 3, 32, 32)
    assert {len(values) for values in rows.values()} == {len(rows["target"])}
    assert all(values.dtype == torch.float16 for values in rows.values())


def test_training_goes_on(simulate, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    for number, (split, bands) in enumerate([("train", 3), ("train", 4), ("valid", 4), ("pair", 4)]):
        rng = np.random.default_rng(number)
        np.savez(
            packed / f"{split}-{number:04d}.npz", **simulate.patches(simulate.acquire(images(), rng, bands, 4), rng)
        )

    def train(run, steps):
        command = [sys.executable, RECIPE / "train.py", packed, tmp_path / run, "--steps", "4", "--stop", str(steps)]
        return subprocess.run([*command, "--maps", "8"], check=True, capture_output=True, text=True).stdout

    train("whole", 4)
    train("parts", 2)
    assert "goes on from step 2" in train("parts", 4)
    whole, parts = (load_model(tmp_path / run / "universal.safetensors").state_dict() for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["head.weight"].abs().max() > 0


def test_size_and_card():
    assert (WEIGHTS / "universal.safetensors").stat().st_size < 8e6
    card = (WEIGHTS / "universal.md").read_text()
    for word in ("CC BY 4.0", "USDA", "Copernicus", "Riverside", "ERGAS", "GaoFen-2", "CM3A"):
        assert word in card


@pytest.mark.parametrize("number", [1, 3])
def test_shipped_weights_are_ahead_of_bt_h(number, tmp_path):
    """On scenes of a sensor that they never saw, at reduced resolution."""
    pytest.importorskip("rasterio")
    pair = Pair.read(*(SCENES / f"scene{number}_{part}.tif" for part in ("pan", "ms")), SENSOR, nodata=0)
    small = pair.reduced()
    ours, bt_h = (
        next(iter(parse([name], 4, {"device": "cpu", "precision": "float32", "peak": SENSOR.peak}).values()))
        for name in ("registered universal", "registered bt-h")
    )
    errors = [
        measure(method.run(small, "ms")[0], small, "reduced", SENSOR.peak, 9, ("SAM", "ERGAS"))
        for method in (ours, bt_h)
    ]
    for name in ("SAM", "ERGAS"):
        assert errors[0][name] < errors[1][name]
