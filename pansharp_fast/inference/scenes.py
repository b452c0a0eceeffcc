"""Reading of a PAN and an MS raster as one scene: MS aligned on PAN's grid, nodata known and filled."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import MaskFlags, Resampling
from rasterio.fill import fillnodata
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reproject
from rasterio.windows import Window
from torch import Tensor

from ..data.grid import RATIO
from ..data.rasters import alpha_bands, image_bands, open_raster, reading
from .tiles import Span

#: Grids whose MS pixels lie within this many PAN pixels of their ideal place count as aligned.
ALIGNED = 0.25
#: Relative deviation from the ratio 4 that resampling MS may make up for.
RATIO_TOLERANCE = 0.05
#: Pixels (PAN, and MS) up to which nodata is filled from its surroundings before the network sees it; beyond, the mean.
FILL_DISTANCE = 64


@dataclass
class _Raster:
    """Bands of a dataset on a grid whose pixel (0, 0) is pixel (top, left) of the dataset.

    spare: how many rows and columns beyond the dataset's end count as valid, repeating its last ones.
    """

    name: str
    path: str
    dataset: DatasetReader
    indexes: list[int]
    nodata: float | None  # where the dataset declares nothing
    top: int = 0
    left: int = 0
    spare: tuple[int, int] = (0, 0)

    @property
    def declares_nodata(self) -> bool:
        flags = [self.dataset.mask_flag_enums[i - 1] for i in self.indexes]
        return bool(alpha_bands(self.dataset)) or any(MaskFlags.all_valid not in flag for flag in flags)

    def read(self, top: int, left: int, height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Values [C, height, width] and validity [height, width]; outside the dataset its border, not valid."""
        rows = np.arange(top + self.top, top + self.top + height)
        columns = np.arange(left + self.left, left + self.left + width)
        ys, xs = rows.clip(0, self.dataset.height - 1), columns.clip(0, self.dataset.width - 1)
        window = Window(xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1)
        with reading(self.name, self.path):
            raw = self.dataset.read(self.indexes, window=window)
            if self.declares_nodata:
                valid = (self.dataset.read_masks(self.indexes, window=window) != 0).all(0)
                for alpha in alpha_bands(self.dataset):  # GDAL's masks know alpha with one or three bands only
                    valid &= self.dataset.read(alpha, window=window) != 0
            else:
                valid = np.ones(raw.shape[1:], np.bool_)
        if self.nodata is not None and math.isnan(self.nodata):
            valid &= ~np.isnan(raw).any(0)
        elif self.nodata is not None and not self.declares_nodata:
            valid &= (raw != self.nodata).all(0)
        if raw.dtype.kind == "f" and not np.isfinite(raw[:, valid]).all():
            raise ValueError(
                f"{self.name}: expected finite values or declared nodata, got NaN or infinity in {self.path} at rows "
                f"{ys[0]} to {ys[-1]}, columns {xs[0]} to {xs[-1]} (nodata nan takes NaN as nodata)"
            )
        inside = ((rows >= 0) & (rows < self.dataset.height + self.spare[0]))[:, None] & (
            (columns >= 0) & (columns < self.dataset.width + self.spare[1])
        )
        ys, xs = ys[:, None] - ys[0], xs - xs[0]
        return raw[:, ys, xs].astype(np.float32), valid[ys, xs] & inside


def _fill(values: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Invalid pixels of [C, H, W] replaced from their surroundings, or by the mean far from any; some must be valid."""
    if valid.all():
        return values
    means = values[:, valid].mean(1, dtype=np.float64).astype(np.float32)
    filled = np.where(valid, values, means[:, None, None])
    return np.stack([fillnodata(band, mask=valid, max_search_distance=FILL_DISTANCE) for band in filled])


class Scene:
    """A PAN and an MS raster, opened together; a context manager.

    Args:
        pan: raster with one band (alpha not counted), by path or any name that GDAL takes.
        ms: raster with the MS bands. Without georeferencing in both, MS pixel (i, j) covers PAN pixels 4i..4i+3,
            4j..4j+3; else MS is read where PAN's grid says, and resampled (cubic) where the two grids do not fit.
        bands: MS bands to use, counted from 1; None is all of them but alpha.
        nodata: value that means "no data" where a raster declares nothing itself; NaN also where it does.

    Attributes:
        height, width: of PAN. bands: numbers of the MS bands. resampled: whether MS was resampled.
        pan_file, ms_file: the open datasets.

    Raises:
        OSError: a file is missing, is no raster or is damaged.
        ValueError: PAN has several bands, the ratio is not 4, only one of the two is georeferenced, they do not
            overlap, or there is no such band.
    """

    def __init__(
        self,
        pan: str | os.PathLike[str],
        ms: str | os.PathLike[str],
        *,
        bands: Sequence[int] | None = None,
        nodata: float | None = None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            self.pan_file = stack.enter_context(open_raster("PAN", pan))
            self.ms_file = stack.enter_context(open_raster("MS", ms))
            pan_bands = image_bands(self.pan_file)
            if len(pan_bands) != 1:
                raise ValueError(f"PAN: expected 1 band, got {len(pan_bands)} in {pan}")
            self.bands = list(bands) if bands is not None else image_bands(self.ms_file)
            for band in self.bands:
                if band not in self.ms_file.indexes:
                    raise ValueError(f"bands: expected numbers from 1 to {self.ms_file.count}, got {band}")
            self.height, self.width = self.pan_file.shape
            self._pan = _Raster("PAN", str(pan), self.pan_file, pan_bands, nodata)
            with reading("MS", str(ms)):
                self._ms = self._align(str(ms), nodata, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def resampled(self) -> bool:
        """Whether MS is resampled to fit PAN's grid."""
        return self._ms.dataset is not self.ms_file

    @property
    def may_lack_data(self) -> bool:
        """Whether some pixels of the result may hold no data."""
        ms = self._ms
        covered = (
            ms.top >= 0
            and ms.left >= 0
            and ms.top + _needed(self.height) <= ms.dataset.height + ms.spare[0]
            and ms.left + _needed(self.width) <= ms.dataset.width + ms.spare[1]
        )
        return not covered or ms.nodata is not None or self._pan.declares_nodata or ms.declares_nodata

    def _align(self, path: str, nodata: float | None, stack: contextlib.ExitStack) -> _Raster:
        pan, ms = self.pan_file, self.ms_file
        raster = _Raster("MS", path, ms, self.bands, nodata)
        if not (_georeferenced(pan) or _georeferenced(ms)):
            short = [_needed(length) - have for length, have in zip(pan.shape, ms.shape, strict=True)]
            if not all(0 <= rows <= (length % RATIO > 0) for rows, length in zip(short, pan.shape, strict=True)):
                raise ValueError(
                    f"MS: expected {_needed(self.height)} x {_needed(self.width)} pixels, a quarter of PAN's "
                    f"{self.height} x {self.width}, got {ms.height} x {ms.width}"
                )
            raster.spare = (short[0], short[1])
            return raster
        if (pan.crs is None) != (ms.crs is None):
            raise ValueError(f"MS: expected a CRS like PAN's, {pan.crs or 'none'}, got {ms.crs or 'none'}")

        corners = np.array([(0, 0), (ms.width, 0), (0, ms.height), (ms.width, ms.height)], float)
        centre = np.array([ms.width / 2, ms.height / 2])
        points = self._on_pan(np.vstack([corners, centre + [(0, 0), (1, 0), (0, 1)]]))
        if not np.isfinite(points).all():
            raise ValueError(f"MS: expected a place in PAN's CRS {pan.crs}, got {ms.bounds} in {ms.crs}")
        corners_on_pan, (origin, right, down) = points[:4], points[4:]
        ratio = np.hypot(*(right - origin)), np.hypot(*(down - origin))
        if any(abs(value / RATIO - 1) > RATIO_TOLERANCE for value in ratio):
            raise ValueError(
                f"ratio: expected MS pixels {RATIO} times the size of PAN's, got {ratio[0]:.4g} x {ratio[1]:.4g}"
            )
        low, high = corners_on_pan.min(0), corners_on_pan.max(0)
        if (high <= 0).any() or (low >= (self.width, self.height)).any():
            raise ValueError(
                f"MS: expected to overlap PAN, columns 0 to {self.width} and rows 0 to {self.height} of its grid, got "
                f"columns {low[0]:.0f} to {high[0]:.0f} and rows {low[1]:.0f} to {high[1]:.0f}"
            )
        offset = np.round(corners_on_pan[0] / RATIO)
        if pan.crs == ms.crs and (np.abs(corners_on_pan - (corners + offset) * RATIO) <= ALIGNED).all():
            raster.left, raster.top = (-offset).astype(int).tolist()
            short = [
                _needed(length) + start - have
                for length, start, have in zip(pan.shape, (raster.top, raster.left), ms.shape, strict=True)
            ]
            raster.spare = (
                int(short[0] == 1 and self.height % RATIO > 0),
                int(short[1] == 1 and self.width % RATIO > 0),
            )
            return raster
        source_nodata = ms.nodata if ms.nodata is not None else nodata
        raster.dataset = stack.enter_context(
            WarpedVRT(
                ms,
                src_crs=ms.crs or CRS.from_epsg(3857),  # any will do where neither raster names one
                crs=pan.crs or CRS.from_epsg(3857),
                transform=pan.transform * Affine.scale(RATIO),
                width=_needed(self.width),
                height=_needed(self.height),
                resampling=Resampling.cubic,
                src_nodata=source_nodata,
                nodata=source_nodata,
                add_alpha=source_nodata is None and not alpha_bands(ms),
            )
        )
        return raster

    def _on_pan(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """MS positions (column, row) [N, 2] as positions on PAN's grid."""
        pan, ms = self.pan_file, self.ms_file
        xs, ys = ms.transform * points.T
        if pan.crs != ms.crs:
            try:
                xs, ys = (np.array(values) for values in reproject(ms.crs, pan.crs, xs, ys))
            except CPLE_BaseError:  # PROJ gives up on some points and calls others infinite
                xs = ys = np.full(len(points), np.inf)
        return np.stack(~pan.transform * (xs, ys), 1)

    def read(self, row: Span, column: Span) -> tuple[Tensor, Tensor, Tensor] | None:
        """Input of a tile, and where its result holds data; None where it does nowhere.

        Returns:
            (pan [1,1,4h,4w] float32, ms [1,C,h,w] float32, valid bool): pan and ms cover what the tile reads, rounded
            up to whole MS pixels and with nodata filled; valid covers what it writes.
        """
        height, width = _needed(row.read_stop - row.read_start), _needed(column.read_stop - column.read_start)
        pan, pan_valid = self._pan.read(row.read_start, column.read_start, RATIO * height, RATIO * width)
        ms, ms_valid = self._ms.read(row.read_start // RATIO, column.read_start // RATIO, height, width)
        valid = (pan_valid & ms_valid.repeat(RATIO, 0).repeat(RATIO, 1))[row.written, column.written]
        if not valid.any():
            return None
        pan, ms = _fill(pan, pan_valid), _fill(ms, ms_valid)
        return torch.from_numpy(pan)[None], torch.from_numpy(ms)[None], torch.from_numpy(valid)


def _needed(length: int) -> int:
    """MS pixels that cover `length` PAN pixels."""
    return -(-length // RATIO)


def _georeferenced(dataset: DatasetReader) -> bool:
    return dataset.crs is not None or not dataset.transform.is_identity
