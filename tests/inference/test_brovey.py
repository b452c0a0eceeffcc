"""Weighted Brovey on files against GDAL's own: VRTPansharpenedDataset with cubic resampling, borders included."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window

from pansharp_fast import sharpen_scene

from .conftest import GRID, landscape


def gdal_s(pan: Path, ms: Path, weights: list[float], height: int, width: int) -> np.ndarray:
    """The first `height` rows and `width` columns as GDAL makes them."""

    def source(tag: str, path: Path, band: int) -> str:
        place = f"<SourceFilename>{path}</SourceFilename><SourceBand>{band}</SourceBand>"
        return f"<{tag}>{place}</{tag.split()[0]}>"

    bands = "".join(source(f'SpectralBand dstBand="{b}"', ms, b) for b in range(1, len(weights) + 1))
    vrt = (
        '<VRTDataset subClass="VRTPansharpenedDataset"><PansharpeningOptions><Algorithm>WeightedBrovey</Algorithm>'
        f"<AlgorithmOptions><Weights>{','.join(map(str, weights))}</Weights></AlgorithmOptions>"
        f"<Resampling>Cubic</Resampling>{source('PanchroBand', pan, 1)}{bands}</PansharpeningOptions></VRTDataset>"
    )
    with rasterio.open(vrt) as file, rasterio.open(pan) as grid:
        assert file.transform == grid.transform
        return file.read(window=Window(0, 0, width, height))


def ours(pan: Path, ms: Path, weights: list[float], folder: Path, **options) -> np.ndarray:
    out = folder / "out.tif"
    sharpen_scene(
        pan,
        ms,
        out,
        method="brovey",
        band_weights=weights,
        register="off",
        back_projection=0,
        overwrite=True,
        **options,
    )
    with rasterio.open(out) as file:
        return file.read()


def pair(raster, dtype: str, step: float, start: float, pan_size: tuple[int, int], **profile) -> tuple[Path, Path]:
    """MS pixels are `step` PAN pixels wide and begin `start` PAN pixels after PAN."""
    rng = np.random.default_rng(5)
    height, width = pan_size
    ms = landscape(4, int((height - start) // step), int((width - start) // step), step)
    ms += rng.normal(0, 60, ms.shape)
    pan = landscape(1, height, width, 1) + rng.normal(0, 60, (1, height, width))
    return (
        raster("pan.tif", pan.clip(100).astype(dtype), transform=GRID, **profile),
        raster(
            "ms.tif", ms.clip(100).astype(dtype), transform=GRID @ Affine.translation(start, start) @ Affine.scale(step)
        ),
    )


def floating(raster, path: Path, corner: int = 0, dtype: str = "float64") -> Path:
    """A copy from row and column `corner` on."""
    with rasterio.open(path) as file:
        window = Window(corner, corner, file.width - corner, file.height - corner)
        place = {"transform": file.window_transform(window), "crs": file.crs, "nodata": file.nodata}
        return raster(f"copy_{path.name}", file.read(window=window).astype(dtype), **place)


def whole(raster, path: Path, corner: int = 0) -> Path:
    """The same as uint16."""
    return floating(raster, path, corner, "uint16")


WEIGHTS = [0.1, 0.4, 0.3, 0.2]


@pytest.mark.parametrize("options", [{}, {"tile": 64, "overlap": 16}])
def test_floating_point(raster, tmp_path, options):
    pan, ms = pair(raster, "float64", 4, 0, (96, 120))
    np.testing.assert_allclose(
        ours(pan, ms, WEIGHTS, tmp_path, **options), gdal_s(pan, ms, WEIGHTS, 96, 120), rtol=2e-6
    )


def test_sample_scene(raster, tmp_path):
    """A real scene as floating point, lest GDAL round and clip the up-sampled bands."""
    folder = Path(__file__).parents[2] / "pansharp_fast" / "sample_scenes"
    pan, ms = (floating(raster, folder / f"scene1_{part}.tif") for part in ("pan", "ms"))
    result, expected = ours(pan, ms, WEIGHTS, tmp_path), gdal_s(pan, ms, WEIGHTS, 600, 600)
    # Where cubic overshoot makes the weighted sum negative, so does GDAL the result; here MS stays.
    weights = np.array(WEIGHTS)[:, None, None]
    with rasterio.open(pan) as file:
        used = np.isclose((weights * result).sum(0), file.read(1), rtol=1e-4)
    assert used.mean() > 0.999
    np.testing.assert_allclose(result[:, used], expected[:, used], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("start", "size"), [(0.0, (120, 150)), (0.0, (121, 151)), (-0.5, (121, 151)), (0.3, (121, 151))]
)
def test_integers_differ_by_what_gdal_rounds(raster, tmp_path, start, size):
    """GDAL rounds the up-sampled bands on the way: that and the last rounding leave 1, seldom 2.

    Rows and columns that end on MS are compared: GDAL moves a window that reaches beyond MS back onto it.
    """
    pan, ms = pair(raster, "uint16", 2, start, size)
    height, width = 118, 148
    expected = gdal_s(pan, ms, WEIGHTS, height, width).astype(int)
    difference = np.abs(ours(pan, ms, WEIGHTS, tmp_path)[:, :height, :width] - expected)
    assert difference.max() <= 2
    assert (difference <= 1).mean() > 0.999


def test_void_pixels_have_no_weight(raster, tmp_path):
    """As in GDAL, which weighs rows and columns one after the other: near void areas that differs a little."""
    pan, ms = pair(raster, "float64", 4, 0, (96, 120))
    with rasterio.open(ms) as file:
        values, profile = file.read(), file.profile
    values[:, 9:15, 12:19] = -1
    with rasterio.open(ms, "w", **{**profile, "nodata": -1}) as file:
        file.write(values)
    result, expected = ours(pan, ms, WEIGHTS, tmp_path), gdal_s(pan, ms, WEIGHTS, 96, 120)
    held = np.ones((96, 120), bool)
    held[36:60, 48:76] = False
    np.testing.assert_array_equal(result[0] != -1, held)
    np.testing.assert_allclose(result[:, held], expected[:, held], rtol=1e-3)
    held[28:68, 40:84] = False  # farther off than the kernel reaches
    np.testing.assert_allclose(result[:, held], expected[:, held], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "bands", "corner"),
    [("data/native/landsat", 3, 0), ("open_imagery/landsat8_pairs/landsat8_a", 4, 400)],
)
def test_landsat(shared, raster, tmp_path, name, bands, corner):
    """Ratio 2, MS half a PAN pixel before PAN; all pixels of PAN whose centre lies on MS, from a corner on."""
    weights = [0.3, 0.4, 0.2, 0.1][:bands]
    for convert in (floating, whole):
        pan = convert(raster, shared / f"{name}_pan.tif", 2 * corner)
        ms = convert(raster, shared / f"{name}_ms.tif", corner)
        with rasterio.open(pan) as fine, rasterio.open(ms) as coarse:
            right, bottom = ~fine.transform @ coarse.transform @ (coarse.width, coarse.height)
            height, width = min(fine.height, int(bottom)), min(fine.width, int(right))
        result, expected = ours(pan, ms, weights, tmp_path), gdal_s(pan, ms, weights, height, width)
        result = result[:, :height, :width]
        if convert is floating:
            np.testing.assert_allclose(result, expected, rtol=1e-5)
            continue
        difference = np.abs(result.astype(int) - expected)
        assert difference.max() <= 2
        assert (difference <= 1).mean() > 0.9999
