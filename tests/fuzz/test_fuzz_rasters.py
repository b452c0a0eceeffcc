"""Damaged GeoTIFFs and VRTs: read, or refused in one line."""

import functools
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from pansharp_fast.data.rasters import RasterPair
from pansharp_fast.data.sources import check_local, source_files

from .mutations import damaged, fuzz_settings, survives

GRID = Affine(0.5, 0, 593270.25, 0, -0.5, 5747657.5)
VRT = b"""<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32631</SRS>
<GeoTransform>593270.25, 2, 0, 5747657.5, 0, -2</GeoTransform>
<VRTRasterBand dataType="UInt16" band="1"><NoDataValue>0</NoDataValue><SimpleSource>
<SourceFilename relativeToVRT="1">ms.tif</SourceFilename><SourceBand>1</SourceBand>
<SrcRect xOff="0" yOff="0" xSize="16" ySize="16"/><DstRect xOff="0" yOff="0" xSize="16" ySize="16"/>
</SimpleSource></VRTRasterBand></VRTDataset>"""

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def tiff(side: int, count: int, compress: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 2000, (count, side, side)).astype(np.uint16)
    grid = GRID * Affine.scale(64 // side)
    profile = {"driver": "GTiff", "count": count, "height": side, "width": side, "dtype": "uint16"}
    with rasterio.MemoryFile() as memory:
        with memory.open(transform=grid, crs="EPSG:32631", nodata=0, compress=compress, **profile) as file:
            file.write(pixels)
            file.descriptions = [f"band {k}" for k in range(count)]
        return bytes(memory.read())


def read(pan: Path, ms: Path) -> None:
    with RasterPair(pan, ms) as pair:
        for window in ((0, 0, 64, 64), (-8, -8, 32, 32), (pair.height - 16, pair.width - 16, 64, 64)):
            values, valid = pair.read_pan(*window)
            assert values.shape == (1, *window[2:])
            assert valid.shape == window[2:]
            assert np.isfinite(values).all()
        for window in ((-2, -2, 20, 20), (pair.ms_height - 8, pair.ms_width - 8, 20, 20)):
            values, valid = pair.read_ms(*window)
            assert values.shape == valid.shape == (len(pair.bands), *window[2:])
            assert np.isfinite(values).all()


@fuzz_settings
@given(data=st.data(), compress=st.sampled_from(["none", "deflate", "lzw"]), which=st.sampled_from(["pan", "ms"]))
def test_geotiffs(tmp_path, data, compress, which):
    good = {"pan": tiff(64, 1, compress), "ms": tiff(16, 4, compress)}
    good[which] = data.draw(damaged(good[which]))
    for name, content in good.items():
        (tmp_path / f"{name}.tif").write_bytes(content)
    survives(lambda: read(tmp_path / "pan.tif", tmp_path / "ms.tif"), OSError, ValueError)


@fuzz_settings
@given(content=damaged(VRT, (b"SourceFilename", b"XSize", b"dataType", b"xSize")))
def test_vrts(tmp_path, content):
    for name, good in (("pan.tif", tiff(64, 1, "none")), ("ms.tif", tiff(16, 4, "none")), ("ms.vrt", content)):
        (tmp_path / name).write_bytes(good)
    survives(lambda: read(tmp_path / "pan.tif", tmp_path / "ms.vrt"), OSError, ValueError)
    source_files(tmp_path / "ms.vrt")
    survives(lambda: check_local("MS", tmp_path / "ms.vrt"), ValueError)


def test_vrts_inside_each_other(tmp_path):
    """A VRT of itself, and a long chain of them, end."""
    (tmp_path / "ms.tif").write_bytes(tiff(16, 4, "none"))
    (tmp_path / "self.vrt").write_bytes(VRT.replace(b"ms.tif", b"self.vrt"))
    (tmp_path / "0.vrt").write_bytes(VRT)
    for k in range(1, 300):
        (tmp_path / f"{k}.vrt").write_bytes(VRT.replace(b"ms.tif", f"{k - 1}.vrt".encode()))
    assert tmp_path / "self.vrt" in source_files(tmp_path / "self.vrt")
    assert tmp_path / "ms.tif" in source_files(tmp_path / "299.vrt")
    check_local("MS", tmp_path / "299.vrt")
