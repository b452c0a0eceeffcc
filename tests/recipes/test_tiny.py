"""The recipe of the shipped weights: its simulation keeps the data's conventions, and its configuration is valid."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from pansharp_fast.data import interp23
from pansharp_fast.training import load_config, recipe_class

pytest.importorskip("rasterio")
FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "tiny"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("tiny_prepare", FOLDER / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(0)
    noise = torch.nn.functional.avg_pool2d(torch.rand(1, 4, 140, 140), 13, stride=1)[0]
    return (noise - noise.min()) / (noise.max() - noise.min())


def test_filter_moves_and_damps_as_told(prepare):
    wave = torch.cos(torch.arange(64) * np.pi / 4).repeat(64, 1)[None]  # frequency 1/8: Nyquist of ratio 4
    inside = np.s_[..., 24:40, 24:40]
    out = prepare.blur(wave, np.array([0.3]), 4, np.zeros((1, 2)))
    torch.testing.assert_close(out[inside], 0.3 * wave[inside], rtol=0, atol=0.01)
    out = prepare.blur(wave, np.array([0.999999]), 4, np.array([[0.0, 2.0]]))
    torch.testing.assert_close(out[inside], torch.roll(wave, 2, -1)[inside], rtol=0, atol=0.01)


def test_acquisitions_follow_from_the_seed_and_keep_the_phase(prepare, image):
    best = []
    for seed in range(12):
        gt, ms, pan = prepare.acquire(image, np.random.default_rng(seed), 1)
        again = prepare.acquire(image, np.random.default_rng(seed), 1)
        assert all(np.array_equal(a, b) for a, b in zip((gt, ms, pan), again, strict=True))
        assert gt.shape == (4, 128, 128)
        assert ms.shape == (4, 32, 32)
        assert pan.shape == (128, 128)
        assert gt.min() >= 0
        assert max(gt.max(), pan.max()) <= 2047
        expanded = interp23(torch.from_numpy(ms)[None])[0].numpy()
        inside = np.s_[:, 16:-16, 16:-16]
        errors = {d: np.abs(np.roll(expanded, (d, d), (1, 2)) - gt)[inside].mean() for d in (-1, 0, 1)}
        best.append(min(errors, key=errors.__getitem__))
    # Interpolation from the right phase lies on gt; plain products lie half a pixel away.
    assert best.count(0) >= 9


def test_held_out_cities_do_not_overlap(prepare):
    assert not set(prepare.VALID_CITIES) & set(prepare.TEST_CITIES)


@pytest.mark.parametrize("stage", [1, 2])
def test_configurations(stage):
    config = load_config(recipe_class("pancrafter").config_class, FOLDER / f"stage{stage}.yaml")
    assert config.train == f"runs/tiny/stage{stage}/train.h5"
