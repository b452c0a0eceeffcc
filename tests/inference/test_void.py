"""Where OUT holds data: over random ways to say where PAN and MS do, on any grid, moved or not."""

from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pansharp_fast.data.rasters import RasterPair
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
