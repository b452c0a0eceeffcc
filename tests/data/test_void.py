"""Where a band holds data, over random combinations of all ways to say so: on PAN's grid, beside it and resampled."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp

from pansharp_fast.data.rasters import RasterPair

GRID = Affine(0.5, 0, 593270.25, 0, -0.5, 5747657.5)
CRS = "EPSG:32631"
SIDE = 12
GRIDS = {
    "aligned": GRID * Affine.scale(4),
    "offset": GRID * Affine.translation(1.3, -0.7) * Affine.scale(4),
    "south-up": GRID * Affine.translation(0, 4 * SIDE) * Affine.scale(4, -4),
    "rotated": GRID * Affine.translation(24, 24) * Affine.rotation(25) * Affine.scale(4) * Affine.translation(-6, -6),
}
NAMES = {"uint8": "Byte", "uint16": "UInt16", "int16": "Int16", "float32": "Float32"}

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@st.composite
def rasters(draw: Any) -> dict[str, Any]:
    """An MS raster: values, and all that says where they hold data."""
    kind = draw(st.sampled_from(list(NAMES)))
    count = draw(st.integers(1, 4))
    values = [0, 5, 7, *([-1] if kind in ("int16", "float32") else [])]
    nodata = st.sampled_from([None, *values, *([np.nan] if kind == "float32" else [])])
    layout = draw(st.sampled_from(["tif", "vrt"]))
    own = draw(st.lists(nodata, min_size=count, max_size=count)) if layout == "vrt" else [draw(nodata)] * count
    alpha = draw(st.booleans()) and layout == "tif" and count > 1
    mask = draw(st.sampled_from([None, "inside", "beside"])) if layout == "tif" and not alpha else None
    seed = draw(st.integers(0, 2**16))
    bands = draw(st.permutations(range(1, count + 1)))[: draw(st.integers(1, count))]
    chosen = draw(st.sampled_from([None, bands]))
    asked = draw(nodata)
    return {
        **{"kind": kind, "count": count, "layout": layout, "own": own, "alpha": alpha, "mask": mask, "seed": seed},
        **{"chosen": chosen, "asked": asked, "grid": draw(st.sampled_from(list(GRIDS)))},
    }


def pixels(facts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Values [C, SIDE, SIDE] with all the special ones among them, and a mask [SIDE, SIDE]."""
    rng = np.random.default_rng(facts["seed"])
    image = rng.integers(40, 90, (facts["count"], SIDE, SIDE)).astype(facts["kind"])
    special = {value for value in (*facts["own"], facts["asked"], 0) if value is not None}
    for value in special:
        for band, own in enumerate(facts["own"]):
            if value != value and not any(v is not None and v != v for v in (own, facts["asked"])):
                continue  # NaN that nothing calls void is an error, tested elsewhere
            image[band][rng.random((SIDE, SIDE)) < 0.06] = value
    if facts["alpha"]:
        image[-1] = np.where(rng.random((SIDE, SIDE)) < 0.2, 0, 200 if facts["kind"] != "int16" else 3)
    return image, rng.random((SIDE, SIDE)) > 0.15


def written(folder: Path, facts: dict[str, Any], image: np.ndarray, mask: np.ndarray) -> Path:
    profile = {"driver": "GTiff", "count": facts["count"], "height": SIDE, "width": SIDE, "dtype": facts["kind"]}
    profile |= {"transform": GRIDS[facts["grid"]], "crs": CRS, "photometric": "minisblack", "alpha": "unspecified"}
    nodata = facts["own"][0] if facts["layout"] == "tif" else None
    inside = facts["mask"] != "beside"
    path = folder / "ms.tif"
    for old in folder.glob("ms.tif*"):
        old.unlink()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside), rasterio.open(path, "w", nodata=nodata, **profile) as file:
        file.colorinterp = [ColorInterp.undefined] * (facts["count"] - facts["alpha"]) + [ColorInterp.alpha] * facts[
            "alpha"
        ]
        file.write(image)
        if facts["mask"]:
            file.write_mask(mask)
    if facts["layout"] == "tif":
        return path
    bands = "".join(
        f'<VRTRasterBand dataType="{NAMES[facts["kind"]]}" band="{band}">'
        + (f"<NoDataValue>{own}</NoDataValue>" if own is not None else "")
        + f'<SimpleSource><SourceFilename relativeToVRT="1">ms.tif</SourceFilename><SourceBand>{band}</SourceBand>'
        "</SimpleSource></VRTRasterBand>"
        for band, own in enumerate(facts["own"], 1)
    )
    place = ",".join(str(value) for value in GRIDS[facts["grid"]].to_gdal())
    (folder / "ms.vrt").write_text(
        f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}"><SRS>{CRS}</SRS><GeoTransform>{place}</GeoTransform>'
        f"{bands}</VRTDataset>"
    )
    return folder / "ms.vrt"


def expected(facts: dict[str, Any], image: np.ndarray, mask: np.ndarray, band: int) -> np.ndarray:
    """Where a band holds data, by the documented rules."""
    values, own, asked = image[band - 1].astype(float), facts["own"][band - 1], facts["asked"]
    chosen = facts["chosen"] or []
    masked_by_alpha = facts["alpha"] and facts["count"] not in chosen
    valid = np.ones((SIDE, SIDE), bool)
    if own is not None:
        valid &= ~np.isnan(values) if own != own else values != own
    if facts["mask"]:
        valid &= mask
    if masked_by_alpha:
        valid &= image[-1] != 0
    silent = own is None and not facts["mask"] and not masked_by_alpha
    if asked is not None and asked != asked:
        valid &= ~np.isnan(values)
    elif asked is not None and silent:
        valid &= values != asked
    return valid


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(facts=rasters())
def test_validity_band_by_band(tmp_path, facts):
    """Exactly the void pixels of each band are void, on any grid; resampled, those whose nearest pixel is void."""
    pan = tmp_path / "pan.tif"
    if not pan.exists():
        profile = {"driver": "GTiff", "count": 1, "height": 4 * SIDE, "width": 4 * SIDE, "dtype": "uint8"}
        with rasterio.open(pan, "w", transform=GRID, crs=CRS, **profile) as file:
            file.write(np.full((1, 4 * SIDE, 4 * SIDE), 40, np.uint8))
    image, mask = pixels(facts)
    ms = written(tmp_path, facts, image, mask)
    with RasterPair(pan, ms, bands=facts["chosen"], nodata=facts["asked"]) as pair:
        assert pair.warped == (facts["grid"] == "rotated")
        row, column = np.mgrid[: pair.ms_height, : pair.ms_width]
        if pair.warped:
            y, x = (p + r * v + 0.5 for p, r, v in zip(pair.phase, pair.ratio, (row, column), strict=True))
            back = ~GRIDS[facts["grid"]] * GRID
            column = np.floor(back.a * x + back.b * y + back.c).astype(int)
            row = np.floor(back.d * x + back.e * y + back.f).astype(int)
        elif facts["grid"] == "south-up":
            row = row[::-1]
        inside = (row >= 0) & (row < SIDE) & (column >= 0) & (column < SIDE)
        row, column = row.clip(0, SIDE - 1), column.clip(0, SIDE - 1)
        for bands in (None, pair.image_bands):
            values, valid = pair.read_ms(0, 0, pair.ms_height, pair.ms_width, bands)
            assert np.isfinite(values).all()
            for band, some, holds in zip(bands or pair.bands, values, valid, strict=True):
                truth = expected(facts, image, mask, band)[row, column] & inside
                np.testing.assert_array_equal(holds, truth)
                source = image[band - 1][row, column].astype(float)
                if not pair.warped:
                    np.testing.assert_array_equal(some[holds], source[holds])
                elif holds.any():
                    known = image[band - 1][expected(facts, image, mask, band)].astype(float)
                    reach = 0.3 * np.ptp(known)  # cubic interpolation overshoots
                    assert known.min() - reach <= some[holds].min()
                    assert some[holds].max() <= known.max() + reach
        if not pair.may_lack_data:
            assert all(expected(facts, image, mask, band).all() for band in pair.bands)
