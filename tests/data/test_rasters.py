"""A PAN and an MS raster as a pair: the place of MS on PAN's grid, and where each band holds data."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC
from rasterio.warp import transform as reproject

from pansharp_fast.data.grid import aligned_phase, check_pair, fit_ratio
from pansharp_fast.data.rasters import RasterPair

CRS = "EPSG:32631"
GRID = Affine(0.5, 0, 593270.25, 0, -0.5, 5747657.5)
MS_GRID = GRID * Affine.scale(4)

Write = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def truth(bands: int, y: Any, x: Any) -> np.ndarray:
    """Values at PAN index (y, x), smooth enough to be compared after resampling."""
    return np.stack([700 + 500 * np.sin(x / (17 + 3 * k) + k) * np.cos(y / (23 - 2 * k)) for k in range(bands)])


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an array [C,H,W] as a GeoTIFF and returns its path; further arguments go to rasterio."""

    def run(name: str, pixels: np.ndarray, *, mask: Any = None, **profile: Any) -> Path:
        count, height, width = pixels.shape
        options = {"driver": "GTiff", "dtype": pixels.dtype, "crs": CRS, "transform": GRID, **profile}
        with rasterio.open(tmp_path / name, "w", count=count, height=height, width=width, **options) as file:
            file.write(pixels)
            if mask is not None:
                file.write_mask(mask)
        return tmp_path / name

    return run


def landscape(write: Write, name: str, bands: int, height: int, width: int, grid: Affine, crs: Any = CRS) -> Path:
    """A raster on any grid whose every pixel holds the truth at its place on PAN."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    xs, ys = _places(grid, columns, rows)
    if crs != CRS:
        xs, ys = (np.array(v) for v in reproject(crs, CRS, xs, ys))
    x, y = _places(~GRID, xs, ys)
    shape = (height, width)
    pixels = truth(bands, (y - 0.5).reshape(shape), (x - 0.5).reshape(shape)).astype(np.float32)
    return write(name, pixels, transform=grid, crs=crs)


def _places(grid: Affine, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = x.ravel(), y.ravel()
    return grid.a * x + grid.b * y + grid.c, grid.d * x + grid.e * y + grid.f


def expect_truth(pair: RasterPair, tolerance: float) -> None:
    """Every valid MS pixel (two from the border where resampled) holds the truth of where ratio and phase say."""
    values, valid = pair.read_ms(0, 0, pair.ms_height, pair.ms_width)
    y = pair.phase[0] + pair.ratio[0] * np.arange(pair.ms_height)
    x = pair.phase[1] + pair.ratio[1] * np.arange(pair.ms_width)
    expected = truth(len(values), y[:, None], x)
    if pair.warped:
        valid[:, [0, -1]] = valid[:, :, [0, -1]] = False
        for axis, distance in ((1, 2), (1, -2), (2, 2), (2, -2)):
            valid = valid & np.roll(valid, distance, axis)
    assert valid.any()
    assert np.abs(values - expected)[valid].max() <= tolerance


@pytest.mark.parametrize(
    ("grid", "ratio", "phase"),
    [
        (MS_GRID, (4, 4), (1.5, 1.5)),
        (MS_GRID * Affine.translation(6, -3), (4, 4), (1.5 - 12, 1.5 + 24)),
        (GRID * Affine.translation(0.4, -1.7) * Affine.scale(4), (4, 4), (-0.2, 1.9)),
        (GRID * Affine.translation(-0.5, -0.5) * Affine.scale(2), (2, 2), (0, 0)),
        (GRID * Affine.scale(6), (6, 6), (2.5, 2.5)),
        (GRID * Affine.scale(1.5), (1.5, 1.5), (0.25, 0.25)),
        (GRID * Affine.scale(16), (16, 16), (7.5, 7.5)),
        (GRID * Affine.scale(3.3, 3.4), (3.4, 3.3), (1.2, 1.15)),
    ],
)
def test_ms_is_read_on_its_own_grid(write, grid, ratio, phase):
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    ms = landscape(write, "ms.tif", 4, 30, 40, grid)
    with RasterPair(pan, ms) as pair:
        assert not pair.warped
        np.testing.assert_allclose(pair.ratio, ratio, rtol=1e-9)
        np.testing.assert_allclose(pair.phase, phase, rtol=0, atol=1e-6)
        assert (pair.height, pair.width, pair.ms_height, pair.ms_width) == (120, 160, 30, 40)
        expect_truth(pair, 1e-3)


def test_rounded_coordinates_snap_to_exact_numbers(write):
    step = 0.49999345509841014
    grid = Affine(step, 0, 593270.2919143771, 0, -step, 5747657.4158721585)
    pan = write("pan.tif", np.ones((1, 600, 600), np.uint16), transform=grid)
    ms = write("ms.tif", np.ones((4, 150, 150), np.uint16), transform=grid * Affine.scale(4 + 1e-9))
    with RasterPair(pan, ms) as pair:
        assert (pair.ratio, pair.phase) == ((4.0, 4.0), (1.5, 1.5))


@pytest.mark.parametrize("flip", [(1, -1), (-1, 1), (-1, -1)])
def test_ms_counted_from_another_corner(write, flip):
    """South-up and mirrored grids are read from the other end: no resampling."""
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    corner = Affine.translation(40 if flip[0] < 0 else 0, 30 if flip[1] < 0 else 0)
    ms = landscape(write, "ms.tif", 4, 30, 40, MS_GRID * corner * Affine.scale(*flip))
    with RasterPair(pan, ms) as pair:
        assert (pair.warped, pair.ratio, pair.phase) == (False, (4, 4), (1.5, 1.5))
        assert not pair.may_lack_data
        expect_truth(pair, 1e-3)
        part, valid = pair.read_ms(-1, 5, 4, 6)
        whole, _ = pair.read_ms(0, 0, 30, 40)
        np.testing.assert_array_equal(part[:, 1:], whole[:, :3, 5:11])
        assert not valid[:, 0].any()
        assert valid[:, 1:].all()


def test_both_grids_south_up(write):
    south = GRID * Affine.translation(0, 120) * Affine.scale(1, -1)
    pan = landscape(write, "pan.tif", 1, 120, 160, south)
    ms = landscape(write, "ms.tif", 4, 30, 40, south * Affine.scale(4))
    with RasterPair(pan, ms) as pair:
        assert (pair.warped, pair.ratio, pair.phase) == (False, (4, 4), (1.5, 1.5))
        values, _ = pair.read_ms(0, 0, 30, 40)
        with rasterio.open(ms) as file:
            np.testing.assert_array_equal(values, file.read())


def test_both_grids_rotated(write):
    turned = GRID * Affine.rotation(30)
    pan = landscape(write, "pan.tif", 1, 120, 160, turned)
    ms = landscape(write, "ms.tif", 4, 30, 40, turned * Affine.scale(4))
    with RasterPair(pan, ms) as pair:
        assert (pair.warped, pair.ratio, pair.phase) == (False, (4, 4), (1.5, 1.5))


@pytest.mark.parametrize("angle", [7.0, 90.0, -160.0])
def test_rotated_ms_is_resampled(write, angle):
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    middle = Affine.translation(80, 60) * Affine.rotation(angle) * Affine.translation(-110, -110)
    ms = landscape(write, "ms.tif", 4, 55, 55, GRID * middle * Affine.scale(4))
    with RasterPair(pan, ms) as pair:
        assert pair.warped
        assert pair.ratio == (4, 4)
        assert [(phase - 1.5) % 4 for phase in pair.phase] == [0, 0]
        assert any("resampled" in note for note in pair.notes)
        expect_truth(pair, 3)
        top, left = (int(1.5 - phase) // 4 for phase in pair.phase)
        assert pair.read_ms(top, left, 30, 40)[1].all(), "MS covers all of PAN"
        whole, holds = pair.read_ms(0, 0, pair.ms_height, pair.ms_width)
        part, valid = pair.read_ms(7, 5, 9, 11)
        np.testing.assert_array_equal(part, whole[:, 7:16, 5:16])
        np.testing.assert_array_equal(valid, holds[:, 7:16, 5:16])


def test_ms_in_another_crs_is_resampled(write):
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    (west, east), (north, south) = reproject(CRS, "EPSG:32632", [593250, 593370], [5747680, 5747580])
    ms = landscape(write, "ms.tif", 4, 70, 80, Affine(2, 0, west, 0, -2, north), "EPSG:32632")
    assert abs(east - west) < 160, south
    with RasterPair(pan, ms) as pair:
        assert pair.warped
        assert pair.ratio == (4, 4)
        expect_truth(pair, 3)


def test_same_crs_by_another_name_is_not_resampled(write):
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    ms = landscape(write, "ms.tif", 4, 30, 40, MS_GRID, "+proj=utm +zone=31 +datum=WGS84 +units=m +type=crs")
    with RasterPair(pan, ms) as pair:
        assert (pair.warped, pair.ratio, pair.phase) == (False, (4, 4), (1.5, 1.5))


@pytest.mark.parametrize(
    ("pan", "ms", "ratio", "spare"),
    [
        ((1000, 1000), (250, 250), 4, (0, 0)),
        ((201, 240), (51, 60), 4, (0, 0)),
        ((202, 241), (50, 60), 4, (1, 1)),
        ((5, 7), (2, 2), 4, (0, 0)),
        ((1, 1), (1, 1), 4, (0, 0)),
        ((375, 558), (187, 279), 2, (1, 0)),
        ((600, 900), (100, 150), 6, (0, 0)),
    ],
)
def test_sizes_tell_the_ratio(write, pan, ms, ratio, spare):
    paths = (
        write("pan.tif", np.ones((1, *pan), np.uint16), crs=None, transform=None),
        write("ms.tif", np.ones((4, *ms), np.uint16), crs=None, transform=None),
    )
    with RasterPair(*paths) as pair:
        assert pair.ratio == (ratio, ratio)
        assert pair.phase == ((ratio - 1) / 2,) * 2
        assert pair.spare == spare
        assert not pair.may_lack_data
        _, valid = pair.read_ms(0, 0, ms[0] + 1, ms[1] + 1)
        assert valid[0, -1, 0] == bool(spare[0])
        assert valid[0, 0, -1] == bool(spare[1])
    with RasterPair(*paths, phase=ratio / 2) as pair:
        assert pair.phase == (ratio / 2, ratio / 2)
    with RasterPair(*paths, phase=(0.5, 1.25)) as pair:
        assert pair.phase == (0.5, 1.25)


def test_ratio_that_is_not_whole(write):
    plain: dict[str, Any] = {"crs": None, "transform": None}
    pan, ms = (
        write("pan.tif", np.ones((1, 70, 105), "u2"), **plain),
        write("ms.tif", np.ones((4, 20, 30), "u2"), **plain),
    )
    with RasterPair(pan, ms) as pair:
        assert pair.ratio == (3.5, 3.5)
        assert pair.phase == (1.25, 1.25)
        assert pair.notes == ["ratio 3.5 x 3.5, from the sizes, as neither file says more"]
    assert fit_ratio((700, 1050), (200, 300)) == (3.5, 3.5)
    assert aligned_phase(3.5) == 1.25
    with pytest.raises(
        ValueError, match="MS: expected sizes that stand to PAN's 700 x 1050 in one ratio, got 200 x 200"
    ):
        fit_ratio((700, 1050), (200, 200))
    with pytest.raises(ValueError, match=r"ratio: expected MS pixels 1\.5 to 16 times the size of PAN's, got 20 x 20"):
        fit_ratio((4000, 4000), (200, 200))


def test_given_phase_counts_from_the_area(write):
    pan = write("pan.tif", np.ones((1, 120, 160), np.uint16))
    ms = write("ms.tif", np.ones((4, 20, 20), np.uint16), transform=MS_GRID * Affine.translation(5, 2))
    with RasterPair(pan, ms, phase=2) as pair:
        assert pair.phase == (10, 22)


def test_real_landsat_pairs(shared):
    folders = (shared / "data/native/landsat", shared / "open_imagery/landsat8_pairs/landsat8_a")
    for stem, phase, sizes in zip(folders, (0, 1), ((375, 558, 187, 279), (1207, 1254, 603, 627)), strict=True):
        if not Path(f"{stem}_pan.tif").exists():
            pytest.skip(f"{stem}_pan.tif is absent")
        with RasterPair(f"{stem}_pan.tif", f"{stem}_ms.tif") as pair:
            assert (pair.ratio, pair.phase, pair.warped) == ((2, 2), (phase, phase), False)
            assert (pair.height, pair.width, pair.ms_height, pair.ms_width) == sizes


def test_windows_beyond_the_rasters(write):
    pan = landscape(write, "pan.tif", 1, 120, 160, GRID)
    ms = landscape(write, "ms.tif", 4, 30, 40, MS_GRID)
    with RasterPair(pan, ms) as pair:
        for read, height, width in ((pair.read_pan, 120, 160), (pair.read_ms, 30, 40)):
            values, valid = read(-5, -7, height + 12, width + 15)
            whole, all_valid = read(0, 0, height, width)
            assert all_valid.all()
            np.testing.assert_array_equal(values[:, 5 : 5 + height, 7 : 7 + width], whole)
            assert valid.sum() == all_valid.sum()
            assert valid[..., 5 : 5 + height, 7 : 7 + width].all()
            values, valid = read(-500, height + 500, 4, 6)
            assert values.shape[1:] == (4, 6)
            assert np.isfinite(values).all()
            assert not valid.any()


def test_unchosen_bands_can_be_read(write):
    pan = write("pan.tif", np.ones((1, 40, 40), np.uint16))
    pixels = np.arange(1, 6, dtype=np.float32)[:, None, None] * np.ones((5, 10, 10), np.float32)
    pixels[4, 2, 3] = np.nan
    ms = write("ms.tif", pixels, transform=MS_GRID)
    with RasterPair(pan, ms, bands=[3, 1]) as pair:
        assert pair.bands == [3, 1]
        assert pair.image_bands == [1, 2, 3, 4, 5]
        np.testing.assert_array_equal(pair.read_ms(0, 0, 10, 10)[0][:, 0, 0], [3, 1])
        values, valid = pair.read_ms(0, 0, 10, 10, pair.image_bands)
        np.testing.assert_array_equal(values[:, 0, 0], [1, 2, 3, 4, 5])
        assert np.argwhere(~valid).tolist() == [[4, 2, 3]]
        assert np.isfinite(values).all()
    with RasterPair(pan, ms, bands=[1, 5]) as pair, pytest.raises(ValueError, match="MS: expected finite values or"):
        pair.read_ms(0, 0, 10, 10)
    with RasterPair(pan, ms, nodata=np.nan) as pair:
        assert pair.read_ms(0, 0, 10, 10)[1].sum() == 499


def test_bands_of_several_types(write, tmp_path):
    """A VRT over files of several types, each band with a nodata value of its own."""
    pan = write("pan.tif", np.ones((1, 40, 40), np.uint16))
    types, values = ("uint16", "float32", "int16"), (0, -9999, -1)
    pixels = [np.full((1, 10, 10), 5 + k, dtype) for k, dtype in enumerate(types)]
    for k, (image, value) in enumerate(zip(pixels, values, strict=True)):
        image[0, k, k] = value
        write(f"band{k}.tif", image, transform=MS_GRID)
    names = {"uint16": "UInt16", "float32": "Float32", "int16": "Int16"}
    bands = "".join(
        f'<VRTRasterBand dataType="{names[dtype]}" band="{k + 1}">'
        f"<NoDataValue>{value}</NoDataValue><SimpleSource><SourceFilename>{tmp_path}/band{k}.tif</SourceFilename>"
        "<SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        for k, (dtype, value) in enumerate(zip(types, values, strict=True))
    )
    transform = ",".join(str(value) for value in MS_GRID.to_gdal())
    (tmp_path / "ms.vrt").write_text(
        f'<VRTDataset rasterXSize="10" rasterYSize="10"><SRS>{CRS}</SRS><GeoTransform>{transform}</GeoTransform>{bands}'
        "</VRTDataset>"
    )
    with RasterPair(pan, tmp_path / "ms.vrt") as pair:
        values, valid = pair.read_ms(0, 0, 10, 10)
        assert np.argwhere(~valid).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
        np.testing.assert_array_equal(values[:, 5, 5], [5, 6, 7])
        assert values.dtype == np.float32


def test_mask_beside_nodata(write):
    pan = write("pan.tif", np.ones((1, 40, 40), np.uint16))
    pixels = np.full((3, 10, 10), 7, np.uint16)
    pixels[1, 4, 4] = 0
    mask = np.ones((10, 10), bool)
    mask[8, 8] = False
    ms = write("ms.tif", pixels, transform=MS_GRID, nodata=0, mask=mask)
    with RasterPair(pan, ms) as pair:
        assert pair.declares_nodata
        _, valid = pair.read_ms(0, 0, 10, 10)
        assert np.argwhere(~valid).tolist() == [[0, 8, 8], [1, 4, 4], [1, 8, 8], [2, 8, 8]]


def test_nir_tagged_alpha(write):
    """What GDAL tags by itself in 8-bit files of four bands: a mask unless it is named."""
    pan = write("pan.tif", np.ones((1, 40, 40), np.uint8))
    pixels = np.full((4, 10, 10), 7, np.uint8)
    pixels[3, 2, 2] = 0
    ms = write("ms.tif", pixels, transform=MS_GRID, photometric="RGB", alpha="YES")
    with rasterio.open(ms) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    with RasterPair(pan, ms) as pair:
        assert pair.bands == pair.image_bands == [1, 2, 3]
        assert pair.notes == ["band 4 of MS is tagged alpha and taken as a mask (bands 1,2,3,4 takes it as an image)"]
        assert np.argwhere(~pair.read_ms(0, 0, 10, 10)[1]).tolist() == [[band, 2, 2] for band in range(3)]
    for bands in ([1, 2, 3, 4], [4], [4, 1]):
        with RasterPair(pan, ms, bands=bands) as pair:
            assert pair.image_bands == [1, 2, 3, 4]
            assert pair.notes == []
            assert not pair.may_lack_data
            values, valid = pair.read_ms(0, 0, 10, 10)
            assert valid.all()
            assert values[bands.index(4), 2, 2] == 0
    rng = np.random.default_rng(0)
    write("ms.tif", rng.integers(1, 200, (4, 10, 10)).astype("u1"), transform=MS_GRID, photometric="RGB", alpha="YES")
    with pytest.warns(UserWarning, match="MS: band 4 of MS is tagged alpha .* but it looks like an image"):
        RasterPair(pan, ms)
    ms = write("ms.tif", pixels, transform=MS_GRID, photometric="RGB", alpha="YES")
    with RasterPair(pan, ms, bands=[1, 2, 3, 4], nodata=0) as pair:
        assert np.argwhere(~pair.read_ms(0, 0, 10, 10)[1]).tolist() == [[3, 2, 2]]


def test_resampled_void_is_that_of_the_nearest_pixel(write):
    """A pixel void in one band is void there alone, and lends nothing to its neighbours."""
    pan = write("pan.tif", np.ones((1, 120, 120), np.uint16))
    pixels = np.full((3, 50, 50), 100, np.float32)
    pixels[1, 20:24, 20:24] = np.nan
    turned = GRID * Affine.translation(60, 60) * Affine.rotation(20) * Affine.translation(-100, -100)
    ms = write("ms.tif", pixels, transform=turned * Affine.scale(4), nodata=np.nan)
    with RasterPair(pan, ms) as pair:
        values, valid = pair.read_ms(0, 0, pair.ms_height, pair.ms_width)
        rows, columns = np.mgrid[: pair.ms_height, : pair.ms_width]
        y, x = (p + r * v for p, r, v in zip(pair.phase, pair.ratio, (rows, columns), strict=True))
        column, row = _places(~(turned * Affine.scale(4)) * GRID, x + 0.5, y + 0.5)
        column, row = (np.floor(v).astype(int).reshape(rows.shape) for v in (column, row))
        inside = (row >= 0) & (row < 50) & (column >= 0) & (column < 50)
        np.testing.assert_array_equal(valid[0], inside)
        np.testing.assert_array_equal(valid[2], inside)
        hole = (row >= 20) & (row < 24) & (column >= 20) & (column < 24)
        assert hole.any()
        np.testing.assert_array_equal(valid[1], inside & ~hole)
        np.testing.assert_allclose(values[valid], 100, rtol=1e-6)


def points(height: int, width: int, east: float) -> list[GroundControlPoint]:
    return [
        GroundControlPoint(r * height, c * width, 500000 + 64 * c + east, 5000000 - 64 * r)
        for r in (0, 1)
        for c in (0, 1)
    ]


def rpc(height: int, width: int, east: float) -> RPC:
    """A plain projection: longitude along columns, latitude against rows."""
    first, second = [0.0] * 20, [0.0] * 20
    first[2], second[1] = -1.0, 1.0
    one = [1.0] + [0.0] * 19
    return RPC(
        height_off=100, height_scale=500, lat_off=45, lat_scale=0.0003, line_den_coeff=one, line_num_coeff=first,
        line_off=height / 2 - 0.5, line_scale=height / 2, long_off=9 + east, long_scale=0.0003, samp_den_coeff=one,
        samp_num_coeff=second, samp_off=width / 2 - 0.5, samp_scale=width / 2,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["points", "rpc"])
def test_control_points_and_rpcs_are_compared(write, kind):
    plain: dict[str, Any] = {"crs": None, "transform": None}
    pan = write("pan.tif", np.ones((1, 128, 128), np.uint16), **plain)
    for shift, expected in ((0.0, "silent"), (0.5, "silent"), (5.0, "warns"), (40.0, "refuses")):
        ms = write("ms.tif", np.ones((4, 32, 32), np.uint16), **plain)
        for path, size, distance in ((pan, 128, 0.0), (ms, 32, shift)):
            with rasterio.open(path, "r+") as file:
                if kind == "points":
                    file.gcps = (points(size, size, distance * 2), rasterio.CRS.from_epsg(32633))
                else:
                    file.rpcs = rpc(size, size, distance * 0.0006 / 32)
        text = rf"0\.0 rows and {shift:.1f} columns of MS from where it lies by its size"
        if expected == "refuses":
            with pytest.raises(ValueError, match=f"MS: expected control points or RPCs that put it on PAN, got {text}"):
                RasterPair(pan, ms)
        elif expected == "warns":
            with pytest.warns(UserWarning, match=f"MS: control points or RPCs put it {text}"), RasterPair(pan, ms):
                pass
        else:
            with RasterPair(pan, ms) as pair:
                assert pair.notes == []


def test_control_points_in_one_file_are_said(write):
    pan = write("pan.tif", np.ones((1, 128, 128), np.uint16), crs=None, transform=None)
    ms = write("ms.tif", np.ones((4, 32, 32), np.uint16), crs=None, transform=None)
    with rasterio.open(pan, "r+") as file:
        file.gcps = (points(128, 128, 0), rasterio.CRS.from_epsg(32633))
    with RasterPair(pan, ms) as pair:
        assert len(pair.notes) == 1
        assert pair.notes[0].startswith("only PAN has control points or RPCs")


@pytest.mark.parametrize(
    ("pan", "ms", "message"),
    [
        ({}, {"crs": None, "transform": None}, "MS: expected georeferencing as in the other .*EPSG:32631.*got none"),
        ({"crs": None, "transform": None}, {}, "PAN: expected georeferencing as in the other .*EPSG:32631.*got none"),
        ({"crs": None}, {}, "MS: expected a CRS like PAN's, none, got EPSG:32631"),
        ({}, {"transform": GRID}, "ratio: expected MS pixels 1.5 to 16 times the size of PAN's, got 1 x 1"),
        ({}, {"transform": GRID * Affine.scale(40)}, "ratio: expected MS pixels 1.5 to 16 times .*got 40 x 40"),
        (
            {},
            {"transform": MS_GRID * Affine.translation(200, 0)},
            "MS: expected to overlap PAN, columns 0 to 80 and rows 0 to 80 of its grid, got columns 800 to 880",
        ),
        ({"count": 2}, {}, "PAN: expected 1 band, got 2"),
    ],
)  # fmt: skip
def test_refused_pairs(write, pan, ms, message):
    count = pan.pop("count", 1)
    paths = (
        write("pan.tif", np.ones((count, 80, 80), np.uint16), **pan),
        write("ms.tif", np.ones((4, 20, 20), np.uint16), **{"transform": MS_GRID, **ms}),
    )
    with pytest.raises(ValueError, match=message):
        RasterPair(*paths)


@pytest.mark.parametrize("bands", [[0], [5], [1, 9], []])
def test_refused_bands(write, bands):
    pan, ms = (
        write("pan.tif", np.ones((1, 8, 8), np.uint8)),
        write("ms.tif", np.ones((4, 2, 2), "u2"), transform=MS_GRID),
    )
    with pytest.raises(ValueError, match="bands: expected"):
        RasterPair(pan, ms, bands=bands)


def test_colour_tables(write):
    pan = write("pan.tif", np.ones((1, 8, 8), np.uint8))
    ms = write("ms.tif", np.ones((4, 2, 2), np.uint16), transform=MS_GRID)
    with rasterio.open(pan, "r+") as file:
        file.write_colormap(1, {value: (value, value, value, 255) for value in range(256)})
    with RasterPair(pan, ms):
        pass
    with rasterio.open(pan, "r+") as file:
        file.write_colormap(1, {value: (255 - value, value, value, 255) for value in range(256)})
    with pytest.raises(ValueError, match=r"PAN: expected values, got indices of a colour table in band 1 of .*expand"):
        RasterPair(pan, ms)


def test_files_that_cannot_be_read(write, tmp_path):
    pan = write("pan.tif", np.ones((1, 8, 8), np.uint8))
    (tmp_path / "text.tif").write_text("no raster")
    for path in (tmp_path / "none.tif", tmp_path / "text.tif"):
        with pytest.raises(OSError, match="MS: expected a readable raster, got"):
            RasterPair(pan, path)
    with pytest.raises(ValueError, match="MS: expected integers or real numbers, got complex64"):
        RasterPair(pan, write("complex.tif", np.ones((4, 2, 2), np.complex64), transform=MS_GRID))


def test_reading_loads_no_network():
    code = "import sys, pansharp_fast.data.rasters; print([m for m in sys.modules if '.models' in m or '.nn' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pansharp_fast" not in done.stdout


@pytest.mark.parametrize(
    ("pan", "ms", "message"),
    [
        ((1, 2, 8, 8), (1, 4, 2, 2), r"pan: expected shape \[B, 1, H, W\]"),
        ((1, 1, 8, 8), (4, 2, 2), r"ms: expected shape \[B, 4, h, w\]"),
        ((1, 1, 8, 8), (1, 3, 2, 2), "ms: expected 4 bands, got 3"),
        ((2, 1, 8, 8), (1, 4, 2, 2), "ms: expected a batch of 2 as in pan, got 1"),
        ((1, 1, 8, 8), (1, 4, 2, 0), "ms: expected at least one pixel"),
        ((1, 1, 8, 9), (1, 4, 2, 2), "pan: expected 4 times the size of ms .*8x8, got 8x9"),
    ],
)
def test_check_pair(pan, ms, message):
    with pytest.raises(ValueError, match=message):
        check_pair(np.zeros(pan), np.zeros(ms), bands=4)
    check_pair(np.zeros((2, 1, 8, 12)), np.zeros((2, 5, 2, 3)))
    check_pair(np.zeros((2, 1, 9, 13)), np.zeros((2, 5, 2, 3)), ratio=None)
