"""Registration: known displacements found at several ratios and phases, robust to contrast, nodata and nonsense."""

import json
import math

import numpy as np
import pytest
import torch

import pansharp_fast
from pansharp_fast.data.observation import observe
from pansharp_fast.data.registration import Arrays, Registration, measure, stack

GAINS = (0.3,) * 4


def scenery(side: int, seed: int = 0) -> torch.Tensor:
    """[1, 1, side, side] float64: blocks and texture, with detail at every scale."""
    rng = np.random.default_rng(seed)
    image = np.full((side, side), 400.0)
    for _ in range(side * side // 120):
        y, x = rng.integers(0, side, 2)
        h, w = rng.integers(3, 24, 2)
        image[y : y + h, x : x + w] = rng.uniform(100, 1500)
    return torch.from_numpy(image + rng.normal(0, 15, image.shape))[None, None]


def scene(d, ratio: float = 4, phase=None, side: int = 320, noise: float = 0.0):
    """(pan, ms): bands are PAN under other contrasts, the last one inverted in half of the scene."""
    pan = scenery(side)
    bands = torch.cat([0.5 * pan + 100, pan, 0.8 * pan - 50, pan.clone()], 1)
    bands[:, 3, :, : side // 2] = 1600 - bands[:, 3, :, : side // 2]
    size = (int(side / ratio), int(side / ratio))
    ms = observe(bands, size, gains=GAINS, ratio=ratio, phase=phase, d=torch.tensor(d))
    return pan, ms + noise * torch.from_numpy(np.random.default_rng(1).standard_normal(ms.shape))


FOUR = [[0.35, -0.5], [1.4, 0.2], [-2.1, 2.6], [3.0, -3.0]]


@pytest.mark.parametrize(("ratio", "phase"), [(4, None), (4, 2.0), (2, None), (3, (0.2, 1.9)), (6, None)])
def test_displacements_are_found(ratio, phase):
    d = [[ratio / 4 * v for v in pair] for pair in FOUR]
    found = pansharp_fast.register(*scene(d, ratio, phase, side=int(80 * ratio), noise=5), ratio=ratio, phase=phase)
    assert found.model == "constant"
    np.testing.assert_allclose(found.d[0], d, atol=0.025 * ratio)
    assert float(found.confidence.min()) > 0.8


def test_in_place_is_in_place():
    found = pansharp_fast.register(*scene([[0.0, 0.0]] * 4, noise=5))
    assert float(found.d.abs().max()) < 0.04


def test_reach():
    far = [[-9.0, 13.5]] * 4
    pan, ms = scene(far, side=480)
    assert not pansharp_fast.register(pan, ms).applied, "beyond two MS pixels by default"
    found = pansharp_fast.register(pan, ms, reach=5)
    np.testing.assert_allclose(found.d[0], far, atol=0.15)
    with pytest.raises(ValueError, match="reach: expected above 0 to 16 MS pixels, got 20"):
        pansharp_fast.register(pan, ms, reach=20)


def test_noise_moves_nothing():
    rng = np.random.default_rng(3)
    pan, ms = rng.normal(500, 100, (1, 1, 256, 256)), rng.normal(500, 100, (1, 4, 64, 64))
    found = pansharp_fast.register(pan, ms)
    assert found.model == "none"
    assert not found.applied
    assert "nothing trustworthy" in found.text()


@pytest.mark.parametrize("value", [0.0, 700.0])
def test_constant_and_tiny_images_move_nothing(value):
    for side in (4, 12, 128):
        found = pansharp_fast.register(np.full((1, 1, 4 * side, 4 * side), value), np.full((1, 3, side, side), value))
        assert found.model == "none"
        assert torch.equal(found.d, torch.zeros(1, 3, 2, dtype=torch.float64))


def test_a_doubtful_band_follows_the_others():
    d = [[1.2, -0.8]] * 4
    pan, ms = scene(d)
    ms[:, 1] = torch.from_numpy(np.random.default_rng(0).normal(500, 80, ms[:, 1].shape))
    found = pansharp_fast.register(pan, ms)
    assert float(found.confidence[0, 1]) < 0.5
    np.testing.assert_allclose(found.d[0], d, atol=0.1)


def test_void_pixels_have_no_part():
    """Whatever stands in void pixels, of PAN or of a band, the result is the same."""
    d = [[1.2, -0.8]] * 4
    pan, ms = scene(d, noise=5)
    pan_valid, ms_valid = np.ones(pan.shape[2:], bool), np.ones(ms.shape[1:], bool)
    pan_valid[100:180, :200] = False
    ms_valid[:, :, 60:] = False
    ms_valid[2, :20] = False
    results = []
    for junk in (0.0, 9999.0):
        p, m = pan[0].clone(), ms[0].clone()
        p[:, ~pan_valid] = junk
        m[~torch.from_numpy(ms_valid)] = junk
        source = Arrays(p.numpy(), m.numpy(), pan_valid, ms_valid, (4.0, 4.0), (1.5, 1.5))
        results.append(measure(source, GAINS))
    assert torch.equal(results[0].d, results[1].d)
    np.testing.assert_allclose(results[0].d[0], d, atol=0.1)


def test_a_displacement_that_varies_over_the_scene():
    """MS magnified by a thousandth and turned a little: found as affine, and right at the corners."""
    side = 1280
    pan = scenery(side)
    y, x = torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij")
    dy, dx = 0.0016 * (y - side / 2) + 0.4, -0.0012 * (y - side / 2) - 0.6
    grid = torch.stack([(2 * (x - dx) + 1) / side - 1, (2 * (y - dy) + 1) / side - 1], -1)[None].double()
    moved = torch.nn.functional.grid_sample(pan, grid, mode="bicubic", padding_mode="border", align_corners=False)
    ms = observe(moved.expand(-1, 4, -1, -1), (side // 4, side // 4), gains=GAINS, ratio=4)
    found = pansharp_fast.register(pan, ms)
    assert found.model == "affine"
    corners = torch.tensor([40.0, side - 41])
    total = found.d[0].mean(0)[:, None, None] + found.at(corners, corners, (side, side))[0]
    for i, place in enumerate(corners):
        assert float(total[0, i].mean()) == pytest.approx(0.0016 * (float(place) - side / 2) + 0.4, abs=0.15)
        assert float(total[1, i].mean()) == pytest.approx(-0.0012 * (float(place) - side / 2) - 0.6, abs=0.15)
    assert "affine over the scene" in found.text()


def test_batches_and_json(tmp_path):
    parts = [pansharp_fast.register(*scene([[s, -s]] * 4, side=200)) for s in (0.5, 1.5)]
    both = stack(parts)
    assert both.d.shape == (2, 4, 2)
    both.to_json(tmp_path / "d.json")
    again = Registration.from_json(tmp_path / "d.json")
    for name in ("d", "confidence", "measured"):
        assert torch.equal(getattr(again, name), getattr(both, name))
    assert again.model == "constant"
    assert math.isnan(float(again.spread[0, 0])) == math.isnan(float(both.spread[0, 0]))
    assert torch.equal(both.select([3, 1]).d[:, 0], both.d[:, 3])
    assert torch.equal(both.image(1).d, both.d[1:])
    for text in ("{}", "[1]", json.dumps({"d": [[1]]}), both.to_json().replace('"model"', '"mode"')):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="registration: expected"):
            Registration.from_json(tmp_path / "bad.json")


def test_given():
    assert torch.equal(Registration.given((1.5, -2), 3).d, torch.tensor([[[1.5, -2.0]] * 3], dtype=torch.float64))
    with pytest.raises(ValueError, match="shift: expected DY,DX"):
        Registration.given((1, 2, 3), 3)
    with pytest.raises(ValueError, match="shift: expected DY,DX"):
        Registration.given((math.nan, 2), 3)


def test_bad_arguments():
    pan, ms = torch.rand(1, 1, 64, 64), torch.rand(1, 4, 16, 16)
    with pytest.raises(ValueError, match=r"pan, ms: expected \[B, 1, H, W\] and \[B, C, h, w\]"):
        pansharp_fast.register(pan[0], ms)
    with pytest.raises(ValueError, match=r"ratio: expected MS pixels 1\.5 to 16 times"):
        pansharp_fast.register(pan, torch.rand(1, 4, 64, 64))
    with pytest.raises(ValueError, match="sensor QB: expected 4 bands, got 3"):
        pansharp_fast.register(pan, ms[:, :3], sensor="QB")
