"""What the shipped weights are said to be: small, and better than interpolation and Brovey on sensors never seen."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from pansharp_fast.baselines import exp
from pansharp_fast.data.hdf5 import PanCollection
from pansharp_fast.data.simulate import simulate
from pansharp_fast.metrics import ergas, psnr, sam
from pansharp_fast.models import load_model
from pansharp_fast.models.checkpoint import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
SCENES = ROOT / "pansharp_fast" / "sample_scenes"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", bands=4)


@pytest.fixture(scope="module")
def brovey():
    spec = importlib.util.spec_from_file_location("tiny_evaluate", ROOT / "recipes" / "tiny" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.matched_brovey


def check(model, brovey, path, peak):
    """All three measures beat both baselines, on the mean over the file."""
    data = PanCollection(path, peak=peak)
    samples = [data[index] for index in range(len(data))]
    pan, ms, gt = (torch.stack([sample[name] for sample in samples]) for name in ("pan", "ms", "gt"))
    ours = model.sharpen(pan, ms, 1.0)
    for baseline in (exp(pan, ms), brovey(pan, ms)):
        assert psnr(ours, gt, 1.0).mean() > psnr(baseline, gt, 1.0).mean()
        assert sam(ours, gt).mean() < sam(baseline, gt).mean()
        assert ergas(ours, gt).mean() < ergas(baseline, gt).mean()


def test_size_and_card():
    assert os.path.getsize(WEIGHTS / "tiny.safetensors") < 3e6
    card = (WEIGHTS / "tiny.md").read_text()
    for word in ("CC BY 4.0", "USDA", "Copernicus", "blue, green, red, near infrared", "Riverside", "ERGAS"):
        assert word in card


@pytest.mark.parametrize("number", [1, 2, 3])
def test_sample_scenes(model, brovey, tmp_path, number):
    pytest.importorskip("rasterio")
    pan, ms = (SCENES / f"scene{number}_{part}.tif" for part in ("pan", "ms"))
    simulate(pan, ms, tmp_path / "scene.h5", sensor="default", patch=32, overlap=2, nodata=0)
    check(model, brovey, tmp_path / "scene.h5", 2047)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("QB/train_qb", 2047),
        ("QB/valid_qb", 2047),
        ("GF2/gf2_rr_256", 1023),
        ("GF2/gf2_rr_cubic_256", 1023),
        ("GF2/train_gf2", 1023),
        ("GF2/valid_gf2", 1023),
    ],
)
def test_unseen_sensors(model, brovey, shared, name, peak):
    path = shared / "data" / f"{name}.h5"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    check(model, brovey, path, peak)
