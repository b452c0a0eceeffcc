"""What is written, and what becomes of the files beside it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, Resampling

from pansharp_fast.data.sources import check_local, source_files
from pansharp_fast.inference import sharpen_scene
from pansharp_fast.inference.output import check_creation_options, place

from .conftest import GRID, NAMES
from .local_model import LocalModel

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def run(pan: Path, ms: Path, **options):
    options = {"weights": LocalModel(), "overwrite": True, "tile": 96, "overlap": 16, **options}
    return sharpen_scene(pan, ms, options.pop("out", pan.parent / "out.tif"), **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def look_at(path: Path) -> None:
    """What viewers leave beside a raster: overviews, a mask, statistics."""
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4], Resampling.average)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(np.indices(file.shape)[0] > file.height // 2)
    with rasterio.open(path) as file:
        file.stats(approx=False)


@pytest.mark.parametrize("cog", [False, True])
def test_files_beside_an_older_out_do_not_speak_of_the_new_one(scene, tmp_path, cog):
    pan, ms = scene(160, 160)
    picture = tmp_path / "look.png"
    run(pan, ms, preview=picture)
    look_at(tmp_path / "out.tif")
    with rasterio.open(picture) as file:
        file.stats(approx=False)
    for name in ("out.tif.msk.ovr", "out.tif.ovr.aux.xml", "out.tfw", "out.wld", "look.pgw", "look.wld"):
        (tmp_path / name).write_text("2\n0\n0\n-2\n7\n9\n")
    (tmp_path / "out.tif.txt").write_text("mine")
    (tmp_path / "out.png").write_text("mine")
    with rasterio.open(ms, "r+") as file:
        file.write(file.read() // 3)
    run(pan, ms, cog=cog, preview=picture)
    kept = {"out.tif", "pan.tif", "ms.tif", "look.png", "out.tif.txt", "out.png"}
    assert kept <= set(names(tmp_path))
    for path in (tmp_path / "out.tif", picture):
        with rasterio.open(path) as file:
            assert {Path(name).name for name in file.files} == {path.name}
            assert file.tags(1).get("STATISTICS_MAXIMUM") is None
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.read_masks() == 255).all()
        whole, small = file.read(1), file.read(1, out_shape=(40, 40))
        assert abs(whole.mean() - small.mean()) < 3


def test_world_file_of_an_older_raster_without_place(scene, tmp_path):
    pan, ms = scene(64, 64, crs=None, transform=None)
    (tmp_path / "out.tfw").write_text("2\n0\n0\n-2\n7\n9\n")
    run(pan, ms)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.transform.is_identity


def test_failure_keeps_the_older_out_and_what_belongs_to_it(scene, tmp_path):
    pan, ms = scene(64, 64)
    run(pan, ms)
    look_at(tmp_path / "out.tif")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RuntimeError):
        run(pan, ms, weights=Broken())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Broken(LocalModel):
    def sharpen(self, *arguments, **options):
        raise RuntimeError


def test_files_of_the_driver_move_with_the_raster(raster, tmp_path):
    part = raster("out.tif", np.ones((1, 4, 4), np.uint8), transform=GRID, tfw="YES")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("out.tif", "out.tfw"):
        (tmp_path / name).rename(work / name)
    (tmp_path / "out.tif.aux.xml").write_text("<PAMDataset/>")
    place(work / part.name, tmp_path / "out.tif")
    assert names(tmp_path) == ["out.tfw", "out.tif", "work"]
    assert names(work) == []


def vrt(path: Path, source: Path | str, relative: bool = False, **extra: str) -> Path:
    with rasterio.open(source if not relative else path.parent / source) as file:
        height, width, count, kind = *file.shape, file.count, file.dtypes[0]
        place_ = ",".join(str(value) for value in file.transform.to_gdal())
    kind = {"uint16": "UInt16", "float32": "Float32"}[kind]
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{band}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="{int(relative)}">{source}</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for band in range(1, count + 1)
    )
    path.write_text(
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}"><SRS>EPSG:32631</SRS>'
        f"<GeoTransform>{place_}</GeoTransform>{bands}</VRTDataset>"
    )
    return path


def test_no_output_is_an_input_or_another_output(scene, tmp_path, monkeypatch):
    pan, ms = scene(64, 64)
    monkeypatch.chdir(tmp_path)
    inner = vrt(tmp_path / "inner.vrt", "ms.tif", relative=True)
    outer = vrt(tmp_path / "outer.vrt", inner)
    (tmp_path / "soft.tif").symlink_to("pan.tif")
    (tmp_path / "hard.tif").hardlink_to(ms)
    (tmp_path / "soft.png").symlink_to("pan.tif")
    (tmp_path / "pan.png").hardlink_to(pan)
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    cases = [
        ({"out": Path("pan.tif")}, "OUT: expected another file than the input, got pan.tif, a file of PAN"),
        ({"out": tmp_path / "soft.tif"}, "OUT: .*a file of PAN"),
        ({"out": tmp_path / "hard.tif"}, "OUT: .*a file of MS"),
        ({"ms": outer, "out": tmp_path / "ms.tif"}, "OUT: .*a file of MS"),
        ({"ms": outer, "out": inner}, "OUT: .*a file of MS"),
        ({"ms": outer, "out": outer}, "OUT: .*a file of MS"),
        ({"ms": f"GTIFF_DIR:1:{ms}", "out": ms}, "OUT: .*a file of MS"),
        ({"preview": Path("soft.png")}, "preview: .*a file of PAN"),
        ({"preview": Path("pan.png")}, "preview: .*a file of PAN"),
        ({"uncertainty": Path("ms.tif")}, "uncertainty: .*a file of MS"),
        ({"uncertainty": Path("out.tif")}, "uncertainty: expected another file than OUT"),
        ({"uncertainty": Path("out.tif.msk")}, "uncertainty: expected another file than OUT"),
        ({"uncertainty": Path("x.png"), "preview": Path("x.png")}, "preview: expected another file than uncertainty"),
        ({"weights": "w.safetensors", "out": Path("w.safetensors")}, "OUT: .*a file of weights"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            run(pan, options.pop("ms", ms), **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_out_that_is_a_link_keeps_the_link(scene, tmp_path):
    pan, ms = scene(64, 64)
    (tmp_path / "store").mkdir()
    (tmp_path / "out.tif").symlink_to(tmp_path / "store" / "real.tif")
    (tmp_path / "store" / "real.tif.aux.xml").write_text("<PAMDataset/>")
    run(pan, ms)
    assert (tmp_path / "out.tif").is_symlink()
    assert names(tmp_path / "store") == ["real.tif"]
    with rasterio.open(tmp_path / "store" / "real.tif") as file:
        assert file.descriptions == NAMES


@pytest.mark.parametrize(
    ("options", "cog", "message"),
    [
        ({"COMPRESS": "DEFALTE"}, False, "co: COMPRESS: expected NONE, LZW.*DEFLATE.*, got DEFALTE"),
        (
            {"COMPRES": "LZW"},
            False,
            "co: expected an option of GDAL's GTiff driver, got COMPRES; did you mean",
        ),
        ({"DTYPE": "uint8"}, False, "co: expected an option of GDAL's GTiff driver, got DTYPE"),
        ({"NODATA": "5"}, False, "co: expected an option of GDAL's GTiff driver, got NODATA"),
        ({"CRS": "EPSG:4326"}, False, "co: expected an option of GDAL's GTiff driver, got CRS"),
        ({"TRANSFORM": "1"}, False, "co: expected an option of GDAL's GTiff driver, got TRANSFORM"),
        ({"WIDTH": "9"}, False, "co: expected an option of GDAL's GTiff driver, got WIDTH"),
        ({"DRIVER": "PNG"}, False, "co: expected an option of GDAL's GTiff driver, got DRIVER"),
        ({"BLOCKSIZE": "256"}, False, "co: expected an option of GDAL's GTiff driver, got BLOCKSIZE; did you mean"),
        ({"TILED": "maybe"}, False, "co: TILED: expected YES or NO, got maybe"),
        ({"ZLEVEL": "high"}, False, "co: ZLEVEL: expected a number, got high"),
        ({"ZLEVEL": "99"}, False, "co: expected options by which uint16 .* got ZLEVEL=99"),
        ({"PREDICTOR": "7"}, False, "co: expected options by which uint16 .* got PREDICTOR=7"),
        ({"BLOCKXSIZE": "100"}, False, "co: expected options by which uint16 .* got BLOCKXSIZE=100"),
        ({"COMPRESS": "JPEG"}, False, "co: expected options by which uint16 .* got COMPRESS=JPEG"),
        ({"COMPRESS": "JPEG"}, True, "co: expected options by which uint16 .* got COMPRESS=JPEG"),
        ({"COMPRESS": "WEBP"}, True, "co: expected options by which uint16 .* got COMPRESS=WEBP"),
        ({"BLOCKSIZE": "100"}, True, "co: BLOCKSIZE: expected a number from 128, got 100"),
        ({"BLOCKSIZE": "130"}, True, "co: expected options by which uint16 .*BLOCKSIZE=130"),
        ({"TARGET_SRS": "EPSG:4326"}, True, "co: expected options that leave OUT on PAN's grid, got TARGET_SRS"),
        ({"TILING_SCHEME": "GoogleMapsCompatible"}, True, "co: expected options that leave OUT on PAN's grid, got"),
        ({"TILED": "YES"}, True, "co: expected an option of GDAL's COG driver, got TILED"),
    ],
)
def test_creation_options_that_are_refused(scene, tmp_path, options, cog, message):
    """Before the first tile, with nothing written."""
    pan, ms = scene(64, 64)
    model = LocalModel()
    with pytest.raises(ValueError, match=message):
        run(pan, ms, weights=model, creation_options=options, cog=cog)
    assert model.calls == []
    assert names(tmp_path) == ["ms.tif", "pan.tif"]


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({}, []),
        ({"tfw": "YES"}, ["out.tfw"]),
        ({"PROFILE": "BASELINE"}, ["out.tif.aux.xml"]),
        ({"PROFILE": "GeoTIFF"}, ["out.tif.aux.xml"]),
        ({"TILED": "NO", "BLOCKYSIZE": "16"}, []),
        ({"COMPRESS": "LERC"}, []),
        ({"NBITS": "11"}, []),
        ({"INTERLEAVE": "band", "COMPRESS": "ZSTD", "ZSTD_LEVEL": "3"}, []),
    ],
)
def test_creation_options_that_are_followed(scene, tmp_path, options, beside):
    pan, ms = scene(80, 96, nodata=0)
    with rasterio.open(pan, "r+") as file:
        pixels = file.read()
        pixels[:, :8] = 0
        file.write(pixels)
    run(pan, ms)
    with rasterio.open(tmp_path / "out.tif") as file:
        plain = file.read()
    run(pan, ms, creation_options=options)
    with rasterio.open(tmp_path / "out.tif") as file:
        np.testing.assert_array_equal(file.read(), plain)
        assert (file.crs, file.transform, file.nodata, file.descriptions) == ("EPSG:32631", GRID, 0, NAMES)
        assert file.dtypes == ("uint16",) * 4
        if "COMPRESS" in options:
            assert file.profile["compress"] == options["COMPRESS"].lower()
    assert names(tmp_path) == sorted(["ms.tif", "out.tif", "pan.tif", *beside])


def test_options_of_cog(scene, tmp_path):
    check_creation_options("COG", {"blocksize": "256", "OVERVIEWS": "none", "PREDICTOR": "2", "LEVEL": "9"})
    pan, ms = scene(300, 300)
    run(pan, ms, cog=True, creation_options={"BLOCKSIZE": "128", "COMPRESS": "LZW", "OVERVIEWS": "NONE"})
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.block_shapes[0] == (128, 128)
        assert file.profile["compress"] == "lzw"
        assert file.overviews(1) == []


def test_tags_and_units_are_kept(scene, tmp_path):
    pan, ms = scene(64, 64)
    with rasterio.open(ms, "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2020:01:02 03:04:05", SENSOR="X", AREA_OR_POINT="Point")
        file.update_tags(2, WAVELENGTH="560", STATISTICS_MAXIMUM="7")
        file.units = ["DN", "W", "", "K"]
    for cog in (False, True):
        run(pan, ms, bands=[2, 1, 4, 3], cog=cog)
        with rasterio.open(tmp_path / "out.tif") as file:
            assert file.tags()["TIFFTAG_DATETIME"] == "2020:01:02 03:04:05"
            assert file.tags()["SENSOR"] == "X"
            assert file.tags()["AREA_OR_POINT"] == "Area"
            assert file.tags(1)["WAVELENGTH"] == "560"
            assert "STATISTICS_MAXIMUM" not in file.tags(1)
            assert [unit or "" for unit in file.units] == ["W", "DN", "K", ""]


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "PNG"])
def test_preview_follows_its_suffix(scene, tmp_path, suffix):
    pan, ms = scene(64, 64)
    run(pan, ms, preview=tmp_path / f"look.{suffix}")
    with rasterio.open(tmp_path / f"look.{suffix}") as file:
        assert file.driver == ("PNG" if suffix.lower() == "png" else "JPEG")
        assert file.shape == (64, 64)


@pytest.mark.parametrize("name", ["look.tif", "look", "look.webp", "png"])
def test_other_suffixes_are_refused(scene, tmp_path, name):
    pan, ms = scene(64, 64)
    with pytest.raises(ValueError, match=r"preview: expected a name that ends in .png, .jpg, .jpeg, got"):
        run(pan, ms, preview=tmp_path / name)
    assert names(tmp_path) == ["ms.tif", "pan.tif"]


def test_a_band_named_alpha_is_written_as_an_image(scene, raster, tmp_path):
    pan, _ = scene(64, 64, "uint8")
    pixels = np.random.default_rng(0).integers(1, 200, (4, 16, 16)).astype(np.uint8)
    pixels[3, 4:8, 4:8] = 0
    ms = raster("ms.tif", pixels, transform=GRID * Affine.scale(4), photometric="RGB", alpha="YES")
    run(pan, ms, bands=[1, 2, 3, 4])
    with rasterio.open(tmp_path / "out.tif") as file:
        assert ColorInterp.alpha not in file.colorinterp
        assert (file.read_masks() == 255).all()


def test_sources(scene, tmp_path):
    pan, _ = scene(64, 64)
    inner = vrt(tmp_path / "inner.vrt", "pan.tif", relative=True)
    outer = vrt(tmp_path / "outer.vrt", inner)
    assert {path.resolve() for path in source_files(outer)} == {pan, inner, outer}
    assert pan in source_files(f"GTIFF_DIR:1:{pan}")
    assert pan in source_files(f"vrt://{pan}?bands=1")
    (tmp_path / "a.zip").touch()
    assert tmp_path / "a.zip" in source_files(f"/vsizip/{tmp_path}/a.zip/pan.tif")
    assert tmp_path / "a.zip" in source_files(f"zip://{tmp_path}/a.zip!pan.tif")
    assert source_files("none.tif") == set()


def test_local_sources(scene, tmp_path, monkeypatch):
    pan, _ = scene(64, 64)
    monkeypatch.chdir(tmp_path)
    for name in (
        pan,
        "pan.tif",
        f"GTIFF_DIR:1:{pan}",
        vrt(tmp_path / "a.vrt", pan),
        vrt(tmp_path / "b.vrt", "a.vrt", True),
    ):
        check_local("PAN", name)


@pytest.mark.parametrize(
    "name",
    [
        "/vsicurl/http://localhost:9/a.tif",
        "/vsis3/bucket/a.tif",
        "/vsigs/bucket/a.tif",
        "/vsiaz/box/a.tif",
        "/vsicurl?url=http://localhost:9/,pan.tif",
        "/vsizip//vsicurl/http://localhost:9/a.zip/a.tif",
        "/vsizip/{/vsis3/bucket/a.zip}/a.tif",
        "/vsistdin/",
        "http://localhost:9/a.tif",
        "https://localhost:9/a.tif,pan.tif",
        "s3://bucket/a.tif",
        "WMS:http://localhost:9/wms?pan.tif",
        "WCS:http://localhost:9/wcs",
        "EEDAI:image",
        "vrt:///vsicurl/http://localhost:9/a.tif",
        "<GDAL_WMS><Service name='TMS'><ServerUrl>http://localhost:9/</ServerUrl></Service></GDAL_WMS>",
        "<VRTDataset rasterXSize='4' rasterYSize='4'><VRTRasterBand dataType='Byte' band='1'><SimpleSource>"
        "<SourceFilename>/vsicurl/http://localhost:9/a.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>",
        "wms.xml",
        "remote.vrt",
        "nested.vrt",
        "python.vrt",
        "stac.json",
        "none.tif",
    ],
)
def test_sources_that_are_not_local(scene, tmp_path, monkeypatch, name):
    scene(64, 64)
    monkeypatch.chdir(tmp_path)
    head = "<VRTDataset rasterXSize='4' rasterYSize='4'><VRTRasterBand dataType='Byte' band='1'"
    band = head + "{}</VRTRasterBand></VRTDataset>"
    source = "><SimpleSource><SourceFilename relativeToVRT='{}'>{}</SourceFilename></SimpleSource>"
    (tmp_path / "wms.xml").write_text("<GDAL_WMS><Service name='TMS'/></GDAL_WMS>")
    (tmp_path / "remote.vrt").write_text(band.format(source.format(0, "/vsicurl/http://localhost:9/a.tif")))
    (tmp_path / "nested.vrt").write_text(band.format(source.format(1, "remote.vrt")))
    (tmp_path / "python.vrt").write_text(
        band.format(
            " subClass='VRTDerivedRasterBand'><PixelFunctionLanguage>Python</PixelFunctionLanguage><PixelFunctionType>f"
            "</PixelFunctionType>"
        )
    )
    (tmp_path / "stac.json").write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(ValueError, match=r"PAN: expected local files, got .*local_only"):
        check_local("PAN", name)


def test_an_earlier_result_can_be_the_source(scene, tmp_path):
    """Its tags are replaced by the new ones."""
    pan, ms = scene(64, 64)
    with rasterio.open(ms, "r+") as file:
        file.update_tags(PANSHARP_METHOD="older", PANSHARP_FRAME="older", KEPT="yes")
    run(pan, ms)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert file.tags()["KEPT"] == "yes"
        assert "older" not in file.tags().values()


def test_control_points_and_rpcs_are_kept(scene, tmp_path):
    """Also with options, tags of any letters, and beside each other."""
    pan, ms = scene(64, 64, crs=None, transform=None)
    points = [GroundControlPoint(r * 64, c * 64, 500000 + 32 * c, 5000000 - 32 * r) for r in (0, 1) for c in (0, 1)]
    for path, scale in ((pan, 1), (ms, 0.25)):
        with rasterio.open(path, "r+") as file:
            moved = [GroundControlPoint(p.row * scale, p.col * scale, p.x, p.y) for p in points]
            file.gcps = (moved, rasterio.CRS.from_epsg(32633))
            file.update_tags(PLACE="Zürich <&> 東京", LONG="x" * 3000)
    for options in ({}, {"COMPRESS": "LZW"}):
        for cog in (False, True):
            run(pan, ms, creation_options=options, cog=cog)
            with rasterio.open(tmp_path / "out.tif") as file:
                assert [(p.row, p.col, p.x, p.y) for p in file.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
                assert file.gcps[1] == "EPSG:32633"
                assert file.tags()["PLACE"] == "Zürich <&> 東京"
                assert len(file.tags()["LONG"]) == 3000


def test_threads_write_side_by_side(scene, tmp_path):
    pan, ms = scene(120, 120, nodata=0)

    def one(number: int) -> bytes:
        out, picture = tmp_path / f"{number}.tif", tmp_path / f"{number}.png"
        run(pan, ms, out=out, preview=picture, creation_options={"COMPRESS": "LZW"}, cog=number % 2 == 1)
        with rasterio.open(out) as file, rasterio.open(picture) as look:
            return file.read().tobytes() + look.read().tobytes()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(8)))
    assert len(set(results[::2])) == len(set(results[1::2])) == 1
    assert len(names(tmp_path)) == 18
