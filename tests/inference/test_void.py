"""Where OUT holds data, and of what: over random ways to say where PAN and MS do, on any grid, moved or not."""

import contextlib
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pansharp_fast import sharpen
from pansharp_fast.data.rasters import RasterPair
from pansharp_fast.data.registration import Registration
from pansharp_fast.inference import sharpen_scene

from ..data.test_void import CRS, GRID, GRIDS, SIDE, expected, pixels, rasters, written

pytestmark = pytest.mark.filterwarnings("ignore")
PAN_SIDE = 4 * SIDE


def nearest(
    pair: RasterPair, facts: dict[str, Any], d: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column in the file of the MS pixel nearest to p + d, for each PAN pixel p, and whether there is one."""
    y, x = np.mgrid[:PAN_SIDE, :PAN_SIDE] + np.array(d)[:, None, None]
    row, column = (np.floor((v - p) / r + 0.5) for v, p, r in zip((y, x), pair.phase, pair.ratio, strict=True))
    y, x = (p + r * v + 0.5 for p, r, v in zip(pair.phase, pair.ratio, (row, column), strict=True))
    back = ~GRIDS[facts["grid"]] * GRID
    column = np.floor(back.a * x + back.b * y + back.c).astype(int)
    row = np.floor(back.d * x + back.e * y + back.f).astype(int)
    inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
    return row.clip(0, SIDE - 1), column.clip(0, SIDE - 1), inside


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(facts=rasters(), d=st.sampled_from([None, (1.1, -2.3), (-5.3, 0.4)]), holes=st.booleans())
def test_void_pixels_of_out(tmp_path, facts, d, holes):
    """A pixel p of OUT holds data where PAN does, and every chosen band by its pixel nearest to p + d: only there."""
    pan = np.full((1, PAN_SIDE, PAN_SIDE), 40, np.uint8)
    if holes:
        pan[0][np.random.default_rng(facts["seed"]).random((PAN_SIDE, PAN_SIDE)) < 0.02] = 0
    profile = {"driver": "GTiff", "count": 1, "height": PAN_SIDE, "width": PAN_SIDE, "dtype": "uint8"}
    with rasterio.open(tmp_path / "pan.tif", "w", transform=GRID, crs=CRS, nodata=0, **profile) as file:
        file.write(pan)
    image, mask = pixels(facts)
    paths = tmp_path / "pan.tif", written(tmp_path, facts, image, mask)
    options = {"bands": facts["chosen"], "nodata": facts["asked"]}
    with RasterPair(*paths, **options) as pair:
        row, column, inside = nearest(pair, facts, d or (0, 0))
        bands = pair.bands
    truth = (pan[0] != 0) & inside
    for band in bands:
        truth &= expected(facts, image, mask, band)[row, column]
    move = {"register": "off"} if d is None else {"shift": d}
    out = tmp_path / "out.tif"
    if not truth.any():
        with pytest.raises(ValueError, match="expected a pixel that holds data in both"):
            sharpen_scene(*paths, out, overwrite=True, **move, **options)
        return
    summary = sharpen_scene(*paths, out, overwrite=True, tile=32, overlap=0, **move, **options)
    with rasterio.open(out) as file:
        holds = file.read_masks() != 0
        values = file.read()
    assert summary.valid == truth.mean()
    for some in holds:
        np.testing.assert_array_equal(some, truth)
    assert np.isfinite(values[:, truth].astype(float)).all()


#: Where the area of the first MS pixel begins on PAN (pixel corners), rows and columns.
STARTS = {"aligned": (0, 0), "south-up": (0, 0), "offset": (-0.7, 1.3)}


@st.composite
def scenes(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """An MS raster with facts on PAN, and options of `sharpen_scene`."""
    facts = draw(rasters().filter(lambda facts: facts["grid"] in STARTS))
    facts["pan"] = draw(st.sampled_from([None, "nodata", "mask"]))
    options = {
        "method": draw(st.sampled_from(["bt-h", "gsa", "brovey", "mtf-glp-fs"])),
        "frame": draw(st.sampled_from(["pan", "ms"])),
        "tile": draw(st.sampled_from([None, 48])),
    }
    shift = draw(st.sampled_from([None, (2.25, -1.6)]))
    return facts, options | ({"register": "off"} if shift is None else {"shift": shift})


def write_pan(path, image, facts, holds):
    profile = {"driver": "GTiff", "count": 1, "height": PAN_SIDE, "width": PAN_SIDE, "dtype": "uint16"}
    nodata = 9 if facts["pan"] == "nodata" else None
    with rasterio.open(path, "w", transform=GRID, crs=CRS, nodata=nodata, **profile) as file:
        file.write(image[None])
        if facts["pan"] == "mask":
            file.write_mask(holds)


def reference(options, grid, pan_holds, ms_holds):
    """Pixel by pixel: PAN holds data, and every band does in the MS pixel whose area contains the place."""
    dy, dx = options.get("shift", (0, 0))
    out = np.zeros((PAN_SIDE, PAN_SIDE), bool)
    for y, x in np.ndindex(out.shape):
        if options["frame"] == "pan":
            pan, place = (y, x), (y + dy, x + dx)
        else:
            pan, place = (math.floor(y - dy + 0.5), math.floor(x - dx + 0.5)), (y, x)
        row, column = (math.floor((p + 0.5 - s) / 4) for p, s in zip(place, STARTS[grid], strict=True))
        row = SIDE - 1 - row if grid == "south-up" else row
        if min(pan) >= 0 and max(pan) < PAN_SIDE and 0 <= row < SIDE and 0 <= column < SIDE:
            out[y, x] = pan_holds[pan] and ms_holds[:, row, column].all()
    return out


def disturbed(image, facts, mask, used, rng):
    """The same raster with other values where nothing is read: under masks, in other bands, and other nodata."""
    image, facts = image.copy(), dict(facts)
    alpha = facts["alpha"] and facts["count"] not in used
    hidden = ~mask if facts["mask"] else image[-1] == 0 if alpha else np.zeros((SIDE, SIDE), bool)
    for band in range(facts["count"] - alpha):
        where = hidden if band + 1 in used else np.ones((SIDE, SIDE), bool)
        image[band][where] = rng.integers(0, 127, where.sum())
        if image.dtype.kind == "f" and band + 1 in used:
            image[band][where & (rng.random(where.shape) < 0.3)] = np.nan
        own = facts["own"][band]
        if own is not None and own == own:
            image[band][~hidden & (image[band] == own)] = 120
    facts["own"] = [120 if own is not None and own == own else own for own in facts["own"]]
    return image, facts


def sharpened(folder, facts, options):
    out, ms = folder / "out.tif", folder / ("ms.vrt" if facts["layout"] == "vrt" else "ms.tif")
    options = options | {"bands": facts["chosen"], "nodata": facts["asked"], "dtype": "float32", "overwrite": True}
    sharpen_scene(folder / "pan.tif", ms, out, **options)
    with rasterio.open(out) as file:
        return file.read(), file.read_masks() != 0


def with_noise(read):
    """A reader of `RasterPair` that has anything where it says that there is no data."""
    rng = np.random.default_rng(0)

    def noisy(*arguments):
        values, valid = read(*arguments)
        return np.where(valid, values, rng.uniform(-1e4, 1e4, values.shape)).astype(np.float32), valid

    return noisy


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scene=scenes())
def test_nothing_void_goes_into_out(tmp_path, scene):
    """OUT holds data where it should in both frames, and stays the same bit for bit whatever stands in void pixels."""
    facts, options = scene
    rng = np.random.default_rng(facts["seed"] + 1)
    image, mask = pixels(facts)
    written(tmp_path, facts, image, mask)
    used = facts["chosen"] or list(range(1, facts["count"] + 1 - facts["alpha"]))
    holds = np.stack([expected(facts, image, mask, band) for band in used])
    pan = rng.integers(40, 90, (PAN_SIDE, PAN_SIDE)).astype(np.uint16)
    pan_holds = np.ones((PAN_SIDE, PAN_SIDE), bool)
    if facts["pan"] is not None:
        pan_holds = rng.random((PAN_SIDE, PAN_SIDE)) > 0.01
        pan_holds[:7, 20:] = False
        pan[~pan_holds] = 9
    write_pan(tmp_path / "pan.tif", pan, facts, pan_holds)
    truth = reference(options, facts["grid"], pan_holds, holds)
    values, valid = sharpened(tmp_path, facts, options)
    np.testing.assert_array_equal(valid, np.broadcast_to(truth, valid.shape))
    assert np.isfinite(values[valid]).all()

    other, facts = disturbed(image, facts, mask, used, rng)
    written(tmp_path, facts, other, mask)
    if facts["pan"] == "mask":
        pan[~pan_holds] = 65000
    write_pan(tmp_path / "pan.tif", pan, facts, pan_holds)
    readers = {name: with_noise(getattr(RasterPair, name)) for name in ("read_pan", "read_ms")}
    with mock.patch.multiple(RasterPair, **readers):
        again, still = sharpened(tmp_path, facts, options)
    np.testing.assert_array_equal(still, valid)
    np.testing.assert_array_equal(again[valid], values[valid])


@pytest.mark.parametrize("frame", ["pan", "ms"])
def test_tiles_of_bands_that_lie_farther_off_than_tiles_overlap(scene, frame):
    """MS that lies 80 PAN pixels off: in tiles as in one piece, files and arrays."""
    paths = scene(200, 240, "float32")
    d, (pan, ms) = (-80.0, 12.5), (rasterio.open(path).read()[None] for path in paths)
    whole = sharpen(pan, ms, register=Registration.given(d, 4), frame=frame, tile=256, nodata=-1)
    valid = whole[0] != -1
    row, column = np.mgrid[:200, :240]
    if frame == "pan":
        row, column = row + d[0], column + d[1]  # of MS, which is as large as PAN
    else:
        row, column = row - d[0], column - d[1]  # of PAN
    inside = (row >= -0.5) & (row < 199.5) & (column >= -0.5) & (column < 239.5)
    np.testing.assert_array_equal(valid, np.broadcast_to(inside, valid.shape))
    tiled = sharpen(pan, ms, register=Registration.given(d, 4), frame=frame, tile=144, overlap=64, nodata=-1)
    np.testing.assert_allclose(tiled, whole, atol=0.01)
    out = paths[0].parent / "out.tif"
    sharpen_scene(*paths, out, shift=d, frame=frame, tile=144, overlap=64, nodata=-1)
    with rasterio.open(out) as file:
        np.testing.assert_allclose(file.read(), whole[0], atol=0.01)


def test_void_has_no_part_in_registration(tmp_path):
    """Displacements, statistics, fields and back-projection are the same bit for bit whatever void pixels hold."""
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 1, (4 * 56, 4 * 64))
    fine = 800 + sum(200 * s * ndimage.gaussian_filter(noise, s) for s in (1, 2, 4))
    seen = ndimage.shift(ndimage.gaussian_filter(fine, 1.6), (1.5, -2.5), mode="nearest")
    ms = np.stack([seen.reshape(56, 4, 64, 4).mean((1, 3))] * 3).astype(np.float32)
    for band, holes in enumerate(ms):
        holes[10 * band : 10 * band + 9, 20:34] = -1
        holes[rng.random(holes.shape) < 0.002] = -1
    pan = fine[None].astype(np.float32)
    pan[0, 150:190, 40:90] = -1
    for name, image, grid in (("pan", pan, GRID), ("ms", ms, GRIDS["aligned"])):
        size = {"count": len(image), "height": image.shape[1], "width": image.shape[2], "dtype": "float32"}
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", nodata=-1, transform=grid, crs=CRS, **size
        ) as f:
            f.write(image)
    found = []
    readers = {name: with_noise(getattr(RasterPair, name)) for name in ("read_pan", "read_ms")}
    for name, patch in (("plain", {}), ("noisy", readers)):
        out = tmp_path / f"{name}.tif"
        with mock.patch.multiple(RasterPair, **patch) if patch else contextlib.nullcontext():
            summary = sharpen_scene(tmp_path / "pan.tif", tmp_path / "ms.tif", out)
        with rasterio.open(out) as file:
            found.append((summary.registration, file.read()))
    (plain, image), (noisy, again) = found
    np.testing.assert_allclose(plain.d[0], [(1.5, -2.5)] * 3, atol=0.3)
    np.testing.assert_array_equal(plain.d, noisy.d)
    np.testing.assert_array_equal(image, again)


def test_too_little_data_for_statistics():
    pan, ms = np.full((1, 1, 96, 96), -1.0), np.random.default_rng(0).uniform(100, 200, (1, 3, 24, 24))
    with pytest.raises(ValueError, match="PAN and MS: expected a pixel that holds data in both, got none"):
        sharpen(pan, ms, nodata=-1)
    pan[..., 40:48, 40:48] = 150
    with pytest.raises(ValueError, match="PAN and MS: expected an MS pixel whose surroundings hold data in both, got"):
        sharpen(pan, ms, nodata=-1)
    pan[..., 30:60, 30:60] = 150
    out = sharpen(pan, ms, nodata=-1)
    np.testing.assert_array_equal(out[0] != -1, np.broadcast_to(pan[0] != -1, out[0].shape))
