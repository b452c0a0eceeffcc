"""`pansharp-fast demo` on the scenes in the package."""

import numpy as np
import pytest
import rasterio

from pansharp_fast import demo, pictures
from pansharp_fast.demo import FULL, NAMES, OTHERS, OURS, REDUCED, SCENES, SENSOR, Result, mean_results, run_demo
from pansharp_fast.evaluation.scenes import Pair, largest_rectangle
from pansharp_fast.metrics.measures import MEASURES

from .test_cli import run


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(folder, what the command printed, results)."""
    folder, results = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", lambda *args, **options: results.extend(run_demo(*args, **options)) or results)
        code, out, err = run("demo", "--out", str(folder), "--quiet")
    assert (code, err) == (0, "")
    return folder, out, results


def test_scenes_lie_on_pan(shown):
    for name in NAMES:
        with (
            rasterio.open(SCENES / f"{name}_pan.tif") as pan,
            rasterio.open(shown[0] / f"{name}_sharpened.tif") as result,
        ):
            assert (result.crs, result.transform, result.shape) == (pan.crs, pan.transform, pan.shape)
            assert result.descriptions == ("blue", "green", "red", "nir")
            assert result.nodata == 0
            missing = pan.read(1) == 0
            assert (result.dataset_mask()[missing] == 0).all()
            assert (result.dataset_mask()[~missing] != 0).mean() > 0.95


def test_table_and_comparison(shown):
    folder, out, _ = shown
    words = out.replace("\n", " ").split()
    for title in (*OTHERS, OURS, *NAMES, "mean"):
        assert title.split()[0] in words
    for name in ("PSNR", "SAM", "ERGAS", "mottle", "halo"):
        assert MEASURES[name].heading.split()[0] in words
    with rasterio.open(folder / "comparison.png") as picture:
        image = picture.read()[:3]
    assert image.shape == (3, 3 * 2 * 280 + 8, 4 * 264 + 8)
    # The first part at 100 % is PAN's own pixels, stretched as everything is.
    pair = Pair.read(SCENES / "scene1_pan.tif", SCENES / "scene1_ms.tif", SENSOR, nodata=0)
    pan = pair.pan[0].numpy()
    grey = (pictures.stretch(pan, pictures.limits(pan))[0] * 255).round().astype(np.uint8)
    tile = image[0, 24 : 24 + 256, 8 : 8 + 256]
    assert any(
        (grey[row : row + 256, column : column + 256] == tile).all()
        for row in range(0, grey.shape[0] - 255)
        for column in range(0, grey.shape[1] - 255)
        if grey[row, column] == tile[0, 0] and grey[row + 1, column + 2] == tile[1, 2]
    )


def test_ours_is_ahead(shown):
    values = {result.method: result.values for result in mean_results(shown[2])}
    assert list(values) == [*OTHERS, OURS]
    for other in OTHERS:
        assert values[OURS]["ERGAS"] < values[other]["ERGAS"]
        assert values[OURS]["D_lambda_K registered"] < values[other]["D_lambda_K registered"]
    assert set(values[OURS]) == {*REDUCED, *FULL}


def test_weights_of_ones_own(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NAMES", NAMES[:1])
    code, out, _ = run("demo", "--out", str(tmp_path), "--weights", str(weights), "--quiet")
    assert code == 0
    assert OURS in out
    with rasterio.open(tmp_path / "scene1_sharpened.tif") as own:
        assert own.count == 4


def test_largest_rectangle():
    mask = np.ones((7, 9), bool)
    assert largest_rectangle(mask) == (0, 0, 7, 9)
    mask[2, 3] = False
    assert largest_rectangle(mask) == (3, 0, 4, 9)
    assert largest_rectangle(~mask) == (2, 3, 1, 1)
    assert largest_rectangle(mask & False) == (0, 0, 0, 0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        mask = rng.random((6, 7)) < 0.7
        top, left, height, width = largest_rectangle(mask)
        assert mask[top : top + height, left : left + width].all()
        sizes = [
            (b - t) * (r - l)
            for t in range(6)
            for b in range(t + 1, 7)
            for l in range(7)
            for r in range(l + 1, 8)
            if mask[t:b, l:r].all()
        ]
        assert height * width == max(sizes)


def test_pairs_hold_no_void():
    pair = Pair.read(SCENES / "scene2_pan.tif", SCENES / "scene2_ms.tif", SENSOR, nodata=0)
    assert (pair.ms > 0).all()
    assert (pair.pan > 0).all()
    assert pair.pan.shape[2:] == tuple(4 * length for length in pair.ms.shape[2:])
    assert pair.phase == (1.5, 1.5)
    with rasterio.open(SCENES / "scene2_ms.tif") as file:
        assert (file.read() > 0).all(0).sum() >= pair.ms[0, 0].numel()


def test_mean_is_over_scenes():
    results = [Result(name, method, {"ERGAS": k}, 2 * k) for method in "ab" for k, name in enumerate(NAMES, 1)]
    results[-1] = Result(NAMES[-1], "b", {"ERGAS": 6}, 6)
    assert mean_results(results) == [Result("mean", "a", {"ERGAS": 2}, 4), Result("mean", "b", {"ERGAS": 3}, 4)]
