"""Whole scenes: grids, tiles, nodata, pixel types, and what stands in the written file."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.windows import Window

import pansharp_fast
from pansharp_fast.demo import SCENES
from pansharp_fast.inference import sharpen_scene
from pansharp_fast.inference.output import to_pixels

from .conftest import GRID, NAMES
from .local_model import LocalModel

SMALL = {"tile": 96, "overlap": 16}
UNMOVED = {"register": "off", "back_projection": 0}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def run(pan: Path, ms: Path, **options) -> np.ndarray:
    out = pan.parent / "out.tif"
    sharpen_scene(pan, ms, out, **{"weights": LocalModel(), "overwrite": True, **SMALL, **UNMOVED, **options})
    return read(out)


def expected(pan: Path, ms: Path) -> np.ndarray:
    tensors = (torch.from_numpy(read(path).astype(np.float32))[None] for path in (pan, ms))
    return LocalModel().sharpen(*tensors, 2047)[0].numpy()


def test_tiled_equals_untiled_and_memory(scene):
    pan, ms = scene(400, 480, "float32")
    whole = run(pan, ms, tile=512, overlap=64)
    np.testing.assert_allclose(whole, expected(pan, ms), atol=1e-2)
    model = LocalModel()
    tiled = run(pan, ms, weights=model)
    assert len(model.calls) > 20
    assert all(max(shape[-2:]) <= 96 for shape, _ in model.calls)
    np.testing.assert_allclose(tiled, whole, atol=1e-4 * 2047)


def test_grid_and_bands_are_kept(scene):
    pan, ms = scene()
    with rasterio.open(ms, "r+") as file:
        file.scales = [0.1] * 4
        file.offsets = [1.0, 2.0, 3.0, 4.0]
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    out = run(pan, ms)
    with rasterio.open(pan.parent / "out.tif") as file:
        assert file.crs == "EPSG:32631"
        assert file.transform == GRID
        assert file.shape == (200, 240)
        assert file.descriptions == NAMES
        assert file.scales == (0.1,) * 4
        assert file.offsets == (1.0, 2.0, 3.0, 4.0)
        assert file.colorinterp[:3] == (ColorInterp.blue, ColorInterp.green, ColorInterp.red)
        assert file.nodata is None
        assert file.profile["tiled"]
        assert file.profile["compress"] == "deflate"
        assert file.dtypes == ("uint16",) * 4
    np.testing.assert_allclose(out, expected(pan, ms).clip(0), atol=0.51)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
def test_pixel_types(scene, dtype):
    pan, ms = scene(40, 48, "float32")
    out = run(pan, ms, dtype=dtype)
    assert out.dtype == dtype
    values = expected(pan, ms)
    if np.dtype(dtype).kind != "f":
        limits = np.iinfo(dtype)
        values = values.round().clip(limits.min, limits.max)
    np.testing.assert_allclose(out, values, atol=0.02 if np.dtype(dtype).kind == "f" else 1)


@pytest.mark.parametrize(("height", "width"), [(201, 240), (198, 243), (5, 7), (4, 200), (1, 1)])
def test_sizes_that_are_no_multiples_of_4(scene, height, width):
    pan, ms = scene(height, width, "float32")
    out = run(pan, ms)
    assert out.shape == (4, height, width)
    assert np.isfinite(out).all()
    inner = (slice(None), slice(0, max(1, height - 12)), slice(0, max(1, width - 12)))
    padded = np.pad(read(pan), ((0, 0), (0, -height % 4), (0, -width % 4)), mode="edge").astype(np.float32)
    tensors = torch.from_numpy(padded)[None], torch.from_numpy(read(ms))[None]
    if min(height, width) > 20:
        np.testing.assert_allclose(out[inner], LocalModel().sharpen(*tensors, 2047)[0].numpy()[inner], atol=0.2)


def test_ms_may_lack_the_last_partial_pixel(scene, raster):
    pan, ms = scene(202, 241, "float32")
    cut = raster("cut.tif", read(ms)[:, :50, :60], transform=GRID * Affine.scale(4))
    out = run(pan, cut, nodata=-1)
    assert (out != -1).all()
    np.testing.assert_allclose(out[:, :180, :220], run(pan, ms)[:, :180, :220], atol=0.02)
    cut = raster("cut.tif", read(ms)[:, :49, :60], transform=GRID * Affine.scale(4))
    out = run(pan, cut, nodata=-1)
    assert (out[:, 196:] == -1).all()
    assert (out[:, :196] != -1).all()


def test_without_georeferencing(scene):
    pan, ms = scene(crs=None, transform=None)
    out = run(pan, ms)
    np.testing.assert_allclose(out, expected(pan, ms).clip(0), atol=0.51)
    with rasterio.open(pan.parent / "out.tif") as file:
        assert file.crs is None


def test_ms_on_a_larger_grid_is_cut(scene, raster):
    pan, ms = scene(80, 120, "float32")
    pixels = np.pad(read(ms), ((0, 0), (3, 5), (7, 2)), mode="reflect")
    wide = raster("wide.tif", pixels, transform=GRID * Affine.scale(4) * Affine.translation(-7, -3))
    out = sharpen_scene(pan, wide, pan.parent / "out.tif", weights=LocalModel(), **SMALL, **UNMOVED)
    assert not out.resampled
    assert out.valid == 1
    np.testing.assert_allclose(
        read(pan.parent / "out.tif")[:, 20:-20, 20:-20], expected(pan, ms)[:, 20:-20, 20:-20], atol=0.1
    )


def test_ms_that_covers_a_part(scene, raster):
    pan, ms = scene(80, 120)
    part = raster("part.tif", read(ms)[:, 5:, :20], transform=GRID * Affine.scale(4) * Affine.translation(0, 5))
    out = run(pan, part)
    with rasterio.open(pan.parent / "out.tif") as file:
        assert file.nodata == 0
        mask = file.dataset_mask() > 0
    assert mask[20:, :80].all()
    assert not mask[:20].any()
    assert not mask[:, 80:].any()
    np.testing.assert_allclose(out[:, 40:, :60], run(pan, ms)[:, 40:, :60], atol=1)


def test_shifted_ms_is_resampled(scene, raster):
    """MS on a grid that starts 1.6 PAN pixels aside gives nearly what MS on PAN's own grid gives."""
    pan, ms = scene(160, 200, "float32")
    straight = run(pan, ms)
    y = (np.arange(44) + 0.5)[:, None] * 4 - 8 + 1.6
    x = (np.arange(54) + 0.5) * 4 - 8 + 1.6
    shifted = 700 + 500 * np.stack([np.sin(x / (17 + 3 * k) + k) * np.cos(y / (23 - 2 * k)) for k in range(4)])
    path = raster(
        "shifted.tif", shifted.astype(np.float32), transform=GRID * Affine.translation(-6.4, -6.4) * Affine.scale(4)
    )
    summary = sharpen_scene(pan, path, pan.parent / "shifted_out.tif", weights=LocalModel(), **SMALL, **UNMOVED)
    assert not summary.resampled, "a grid along PAN's is interpolated where it lies"
    assert summary.valid == 1
    assert np.abs(read(pan.parent / "shifted_out.tif") - straight)[:, 8:-8, 8:-8].max() < 6


def test_other_crs_is_resampled(scene, raster):
    pan, ms = scene(160, 200, "float32")
    from rasterio.warp import Resampling, calculate_default_transform, reproject

    with rasterio.open(ms) as file:
        transform, width, height = calculate_default_transform(file.crs, "EPSG:32632", *file.shape[::-1], *file.bounds)
        warped = np.full((4, height, width), np.nan, np.float32)
        reproject(
            rasterio.band(file, [1, 2, 3, 4]),
            warped,
            dst_transform=transform,
            dst_crs="EPSG:32632",
            dst_nodata=np.nan,
            resampling=Resampling.cubic,
        )
    path = raster("other.tif", warped, transform=transform, crs="EPSG:32632", nodata=np.nan)
    summary = sharpen_scene(pan, path, pan.parent / "other_out.tif", weights=LocalModel(), **SMALL, **UNMOVED)
    assert summary.resampled
    out, straight = read(pan.parent / "other_out.tif"), run(pan, ms)
    known = np.isfinite(out).all(0)
    assert known[20:-20, 20:-20].all()
    assert np.abs(out - straight)[:, 20:-20, 20:-20].max() < 20


def test_rotated_grids(scene):
    grid = GRID * Affine.rotation(30)
    pan, ms = scene()
    for path, scale in ((pan, 1), (ms, 4)):
        with rasterio.open(path, "r+") as file:
            file.transform = grid * Affine.scale(scale)
    out = run(pan, ms)
    np.testing.assert_allclose(out, expected(pan, ms).clip(0), atol=0.51)
    with rasterio.open(pan.parent / "out.tif") as file:
        assert file.transform.almost_equals(grid)


@pytest.mark.parametrize(
    ("dtype", "value", "declared"),
    [
        ("uint16", 0, True),
        ("uint16", 0, False),
        ("int16", -9999, True),
        ("float32", np.nan, True),
        ("float32", np.nan, False),
    ],
)
def test_nodata_never_bleeds(scene, raster, dtype, value, declared):
    """A scene cut off along a slanted line: pixels with data stay as they are where they do not see the line."""
    pan, ms = scene(160, 200, dtype)
    full = run(pan, ms, dtype="float32")
    rows, columns = np.mgrid[:40, :50]
    outside = columns > 15 + rows // 2
    pan_outside = outside.repeat(4, 0).repeat(4, 1)
    options = {"transform": GRID, **({"nodata": value} if declared else {})}
    pan_cut = raster("pan_cut.tif", np.where(pan_outside, value, read(pan)).astype(dtype), **options)
    options["transform"] = GRID * Affine.scale(4)
    ms_cut = raster("ms_cut.tif", np.where(outside, value, read(ms)).astype(dtype), **options)
    model = LocalModel()
    out = run(pan_cut, ms_cut, weights=model, **({} if declared else {"nodata": value}))
    with rasterio.open(pan.parent / "out.tif") as file:
        np.testing.assert_equal(file.nodata, value)
        mask = file.dataset_mask() > 0
    np.testing.assert_array_equal(mask, ~pan_outside)
    held = out[:, ~pan_outside]
    assert np.isfinite(held.astype(np.float64)).all()
    assert held.min() > 0
    assert held.max() < 1500
    assert np.abs(out.astype(np.float64) - full)[:, ~pan_outside].max() < 250, "the border may change, not break"
    far = ~pan_outside & (np.mgrid[:160, :200][1] < 4 * (15 + np.mgrid[:160, :200][0] // 8) - 16)
    np.testing.assert_allclose(out[:, far], full[:, far], atol=0.51)
    assert len(model.calls) < 20, "tiles without data are skipped"


def test_mask_and_alpha_count_as_nodata(scene, raster):
    pan, ms = scene(80, 120)
    known = np.ones((20, 30), bool)
    known[:, :10] = False
    alpha = np.concatenate([read(ms), np.where(known, 65535, 0)[None].astype(np.uint16)])
    with_alpha = raster("alpha.tif", alpha, transform=GRID * Affine.scale(4))
    with rasterio.open(with_alpha, "r+") as file:
        file.colorinterp = [*file.colorinterp[:4], ColorInterp.alpha]
    with_mask = raster("mask.tif", read(ms), transform=GRID * Affine.scale(4), mask=known)
    for path in (with_alpha, with_mask):
        out = run(pan, path)
        assert out.shape == (4, 80, 120)
        assert (out[:, :, :40] == 0).all()
        assert (out[:, :, 40:] > 0).all()


def test_masked_ms_is_resampled_without_bleeding(scene, raster):
    pan, ms = scene(80, 120)
    pixels = read(ms)
    known = np.ones((20, 30), bool)
    known[:, :10] = False
    pixels[:, ~known] = 60000
    shift = GRID * Affine.translation(-1.6, 0) * Affine.scale(4)
    for name, options in (
        ("nodata", {"nodata": 60000}),
        ("mask", {"mask": known}),
        ("alpha", {}),
    ):
        bands = np.concatenate([pixels, known[None].astype(np.uint16) * 65535]) if name == "alpha" else pixels
        path = raster(f"{name}.tif", bands, transform=shift, **options)
        if name == "alpha":
            with rasterio.open(path, "r+") as file:
                file.colorinterp = [*file.colorinterp[:4], ColorInterp.alpha]
        out = run(pan, path, nodata=0)
        assert (out[:, :, :36] == 0).all(), name
        assert (out[:, :, 44:112] > 0).all(), name
        assert out.max() < 2000, name
        without = run(pan, path)
        np.testing.assert_array_equal(np.where(without == 60000, 0, without), out, err_msg=name)


def test_valid_pixels_never_take_the_nodata_value(raster):
    dark = np.zeros((1, 32, 32), np.uint16)
    pan = raster("pan.tif", dark, transform=GRID, nodata=9)
    ms = raster("ms.tif", np.zeros((4, 8, 8), np.uint16), transform=GRID * Affine.scale(4), nodata=9)
    assert (run(pan, ms) == 0).all(), "0 is not the declared value"
    assert (run(pan, ms, nodata=0) == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [5.0, -0.25, 3e30, 0.0])
def test_valid_floats_next_to_the_nodata_value(raster, dtype, value):
    """GDAL takes neighbours of the value for it, too."""
    places = np.spacing(np.float32(value)) * np.arange(-12, 13, dtype=np.float32)
    values = (np.float32(value) + places).reshape(1, 5, 5)
    out = to_pixels(values, np.ones((5, 5), bool), np.dtype(dtype), value)
    np.testing.assert_allclose(out, values, rtol=4e-6, atol=1e-44)
    with rasterio.open(raster("out.tif", out, nodata=value)) as file:
        assert file.read_masks().all()
    out = to_pixels(values, np.zeros((5, 5), bool), np.dtype(dtype), value)
    assert (out == np.dtype(dtype).type(value)).all()


def test_all_nodata_is_refused_and_leaves_nothing(scene, tmp_path):
    pan, ms = scene(nodata=0)
    with rasterio.open(ms, "r+") as file:
        file.write(np.zeros((4, 50, 60), np.uint16))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="PAN and MS: expected a pixel that holds data in both, got none"):
        run(pan, ms)
    assert sorted(tmp_path.iterdir()) == before


def test_band_choice(raster, scene):
    pan, ms = scene()
    eight = raster("eight.tif", read(ms)[[0, 0, 1, 1, 2, 2, 3, 3]], transform=GRID * Affine.scale(4))
    np.testing.assert_array_equal(run(pan, eight, bands=[2, 3, 5, 7]), run(pan, ms))


def test_sources_by_any_name_of_gdal(scene):
    pan, ms = scene()
    straight = run(pan, ms)
    np.testing.assert_array_equal(run(Path(pan), f"GTIFF_DIR:1:{ms}"), straight)


def test_cog_preview_and_creation_options(scene, tmp_path):
    pan, ms = scene(600, 640)
    straight = run(pan, ms, tile=512, overlap=64)
    preview = tmp_path / "look.png"
    cog = run(pan, ms, tile=512, overlap=64, cog=True, preview=preview, creation_options={"BLOCKSIZE": "256"})
    np.testing.assert_array_equal(cog, straight)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.block_shapes[0] == (256, 256)
        assert file.overviews(1)
        assert file.descriptions == NAMES
    with rasterio.open(preview) as file:
        assert file.driver == "PNG"
        assert file.shape == (600, 640)
        assert file.read(1).std() > 20
    run(pan, ms, creation_options={"COMPRESS": "LZW"})
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.profile["compress"] == "lzw"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.png", "ms.tif", "out.tif", "pan.tif"]


def test_progress_counts_every_tile(scene):
    pan, ms = scene()
    seen = []
    run(pan, ms, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))


def test_scene_and_array_calls_agree(scene):
    pan, ms = scene()
    arrays = pansharp_fast.sharpen(read(pan)[None], read(ms)[None], weights=LocalModel(), **UNMOVED)
    np.testing.assert_array_equal(run(pan, ms, tile=512, overlap=64), arrays[0])


def test_shipped_weights_do_not_show_tiles(tmp_path):
    """The shipped network on a real scene: tiled equals untiled within 1e-4 of the peak."""
    for kind, side in (("pan", 320), ("ms", 80)):
        with rasterio.open(SCENES / f"scene1_{kind}.tif") as file:
            pixels, options = (
                file.read(window=Window(0, 0, side, side)),
                {**file.profile, "width": side, "height": side},
            )
        with rasterio.open(tmp_path / f"{kind}.tif", "w", **options) as file:
            file.write(pixels)
    pan, ms = tmp_path / "pan.tif", tmp_path / "ms.tif"
    whole = run(pan, ms, weights="tiny", tile=512, overlap=64, dtype="float32")
    tiled = run(pan, ms, weights="tiny", tile=208, overlap=64, dtype="float32")
    assert np.abs(tiled - whole).max() < 1e-4 * 2047
    assert np.abs(whole - read(ms).repeat(4, 1).repeat(4, 2)).std() > 10
