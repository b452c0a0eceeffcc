"""`pansharp-fast demo` on the scenes in the package, with a random network."""

import dataclasses

import numpy as np
import rasterio
from scipy.ndimage import binary_dilation

from pansharp_fast.inference.demo import MARGIN, NAMES, SCENES, Result, mean_results, whole_pair

from .test_cli import run


def test_demo(weights, tmp_path):
    code, out, err = run("demo", "--out", str(tmp_path / "results"), "--weights", str(weights), "--quiet")
    assert (code, err) == (0, "")
    for word in ("interpolation", "Brovey", "pansharp_fast", "PSNR", "SAM", "ERGAS", "megapixel", "mean"):
        assert word in out
    for name in NAMES:
        with (
            rasterio.open(SCENES / f"{name}_pan.tif") as pan,
            rasterio.open(tmp_path / "results" / f"{name}_sharpened.tif") as result,
        ):
            assert (result.crs, result.transform, result.shape) == (pan.crs, pan.transform, pan.shape)
            assert result.descriptions == ("blue", "green", "red", "nir")
            assert result.nodata == 0
            missing = pan.read(1) == 0
            assert (result.dataset_mask()[missing] == 0).all()
    with rasterio.open(tmp_path / "results" / "comparison.png") as picture:
        assert min(picture.shape) > 1000


def test_measures_leave_nodata_out():
    pan, ms, known = whole_pair(SCENES / "scene2_pan.tif", SCENES / "scene2_ms.tif")
    assert pan.shape == (1, 1, 592, 592)
    assert ms.shape == (1, 4, 148, 148)
    with rasterio.open(SCENES / "scene2_ms.tif") as ms_file, rasterio.open(SCENES / "scene2_pan.tif") as pan_file:
        missing = (ms_file.read()[:, :148, :148] == 0).any(0)
        missing |= (pan_file.read(1)[:592, :592] == 0).reshape(148, 4, 148, 4).any((1, 3))
    near = binary_dilation(missing, np.ones((2 * MARGIN + 1, 2 * MARGIN + 1)))
    np.testing.assert_array_equal(known[0, 0].numpy(), ~near)
    assert (ms > 0).all()


def test_mean_is_over_scenes():
    results = [Result(name, method, k, 2 * k, 3 * k, 4 * k) for method in "ab" for k, name in enumerate(NAMES, 1)]
    results[-1] = dataclasses.replace(results[-1], psnr=6.0)
    assert mean_results(results) == [Result("mean", "a", 2, 4, 6, 8), Result("mean", "b", 3, 4, 6, 8)]
