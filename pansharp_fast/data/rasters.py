"""Reading of a PAN and an MS raster as a pair: where MS lies on PAN's grid, and where each band holds data."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError, TransformError
from rasterio.fill import fillnodata
from rasterio.io import DatasetReader
from rasterio.transform import GCPTransformer, RPCTransformer
from rasterio.warp import transform as reproject
from rasterio.windows import Window

from .grid import SNAP, aligned_phase, check_ratio, fit_ratio, snap

#: A grid that leaves rows and columns of PAN's by less than this many PAN pixels is read as it is, not resampled.
STRAIGHT = 0.02
#: MS pixels beyond PAN's edge that are read where MS has to be resampled.
MARGIN = 32
#: Pixels up to which void ones are filled from their surroundings.
FILL_DISTANCE = 64
#: MS pixels by which control points or RPCs may put MS beside PAN: beyond, a warning; far beyond, an error.
APART, FAR_APART = 2, 16


@contextlib.contextmanager
def reading(name: str, path: str) -> Iterator[None]:
    """Turns a failure to read raster `name` into one line.

    Raises:
        OSError: the block raised an error of rasterio's.
    """
    try:
        yield
    except RasterioError as error:
        cause = error.__cause__ or error
        raise OSError(f"{name}: expected a readable raster, got {path} ({cause})") from error


def open_raster(name: str, path: str | os.PathLike[str]) -> DatasetReader:
    """Open a raster by path or any other name that GDAL takes; `name` is what messages call it.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: its values are complex.
    """
    with reading(name, str(path)), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        dataset = rasterio.open(path)
    if any(np.dtype(dtype).kind not in "iuf" for dtype in dataset.dtypes):
        with dataset:
            raise ValueError(f"{name}: expected integers or real numbers, got {dataset.dtypes[0]} in {path}")
    return dataset


def alpha_bands(dataset: DatasetReader) -> list[int]:
    """Indexes (from 1) of the bands tagged as alpha; never all of them."""
    tagged = [i for i, colour in zip(dataset.indexes, dataset.colorinterp, strict=True) if colour == ColorInterp.alpha]
    return tagged if len(tagged) < dataset.count else []


def image_bands(dataset: DatasetReader) -> list[int]:
    """Indexes (from 1) of the bands that are not alpha."""
    alpha = alpha_bands(dataset)
    return [i for i in dataset.indexes if i not in alpha]


Values = NDArray[np.float32]
Valid = NDArray[np.bool_]
Places = NDArray[np.float64]


@dataclass
class _Raster:
    """Bands of a dataset, each with the pixels in which it holds data.

    Attributes:
        name: what messages call the dataset.
        path: where it was opened.
        dataset: open for reading.
        alpha: bands (from 1) that mask the others.
        chosen: bands whose data has to be finite; elsewhere NaN and infinity count as void.
        nodata: value without data in a band that declares nothing itself; NaN also where it does.
        flip: whether rows, and columns, are counted from the other end.
        spare: rows, and columns, beyond the end that count as data, repeating the last ones.
    """

    name: str
    path: str
    dataset: DatasetReader
    alpha: list[int]
    chosen: list[int]
    nodata: float | None
    flip: tuple[bool, bool] = (False, False)
    spare: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.dataset.shape
        return height, width

    def declares(self, band: int) -> bool:
        """Whether the dataset says itself where `band` holds data."""
        return bool(self.alpha) or self._has_mask(band)

    def _has_mask(self, band: int) -> bool:
        flags = self.dataset.mask_flag_enums[band - 1]
        return MaskFlags.all_valid not in flags and MaskFlags.alpha not in flags

    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> tuple[Values, Valid]:
        """Values and validity [C, height, width]; outside the dataset its border, not valid."""
        axes, inside = [], []
        for start, length, size, flip, spare in zip(
            (top, left), (height, width), self.shape, self.flip, self.spare, strict=True
        ):
            index = np.arange(start, start + length)
            inside.append((index >= 0) & (index < size + spare))
            index = index.clip(0, size - 1)
            axes.append(size - 1 - index if flip else index)
        rows, columns = axes
        first_row, first_column = int(rows.min()), int(columns.min())
        window = Window(first_column, first_row, int(columns.max()) - first_column + 1, int(rows.max()) - first_row + 1)
        with reading(self.name, self.path):
            if len({self.dataset.dtypes[band - 1] for band in bands}) == 1:
                raw = self.dataset.read(list(bands), window=window)
            else:
                raw = np.stack([self.dataset.read(band, window=window) for band in bands])
            valid = np.stack([self._valid(band, image, window) for band, image in zip(bands, raw, strict=True)])
            for band in self.alpha:
                valid &= self.dataset.read(band, window=window) != 0
        if raw.dtype.kind == "f":
            finite = np.isfinite(raw)
            for band, good in zip(bands, (finite | ~valid).all((1, 2)), strict=True):
                if not good and band in self.chosen:
                    raise ValueError(
                        f"{self.name}: expected finite values or declared nodata, got NaN or infinity in {self.path} "
                        f"at rows {first_row} to {rows.max()}, columns {first_column} to {columns.max()} "
                        "(nodata nan takes NaN as nodata)"
                    )
            valid &= finite
        values = (raw if valid.all() else np.where(valid, raw, 0)).astype(np.float32)
        within = inside[0][:, None] & inside[1]
        if values.shape[1:] == (height, width) and not any(self.flip):  # nothing to repeat or turn
            return values, valid & within
        place = np.s_[:, (rows - first_row)[:, None], columns - first_column]
        return values[place], valid[place] & within

    def _valid(self, band: int, image: NDArray[np.generic], window: Window) -> Valid:
        valid = np.ones(image.shape, np.bool_)
        if self._has_mask(band):
            valid &= self.dataset.read_masks(band, window=window) != 0
        own = self.dataset.nodatavals[band - 1]  # where there is a mask as well, GDAL's mask leaves nodata out
        values = [own] if own is not None else [self.nodata] if not self.declares(band) else []
        if self.nodata is not None and math.isnan(self.nodata):
            values.append(self.nodata)
        for value in values:
            if value is None:
                continue
            if math.isnan(value):
                valid &= ~np.isnan(image)
            elif image.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    valid &= image != image.dtype.type(value)
            else:
                valid &= image != value
        return valid


@dataclass
class _Resampled:
    """A raster resampled to another grid: cubic, exact at every pixel whatever the window.

    A pixel holds data where the nearest pixel of the raster does. Void pixels have no share in it: where some of the
    16 that cubic interpolation takes are void, those of the four nearest that are not are interpolated linearly.

    Attributes:
        raster: what is resampled.
        transform: of the grid, from its pixel corners to `crs`.
        crs: None is the raster's own.
        shape: rows and columns of the grid.
    """

    raster: _Raster
    transform: Affine
    crs: CRS | None
    shape: tuple[int, int]

    def declares(self, band: int) -> bool:
        return self.raster.declares(band)

    def read(self, top: int, left: int, height: int, width: int, bands: Sequence[int]) -> tuple[Values, Valid]:
        """Values and validity [C, height, width]; outside the raster not valid."""
        rows, columns = np.mgrid[top : top + height, left : left + width] + 0.5
        xs, ys = _apply(self.transform, columns.ravel(), rows.ravel())
        dataset = self.raster.dataset
        if self.crs is not None and self.crs != dataset.crs:
            xs, ys = _reproject(self.crs, dataset.crs, xs, ys)
        with np.errstate(invalid="ignore"):
            x, y = (v.reshape(height, width) - 0.5 for v in _apply(~dataset.transform, xs, ys))
        on = (y > -0.5) & (y <= dataset.height - 0.5) & (x > -0.5) & (x <= dataset.width - 0.5)
        if not on.any():
            shape = (len(bands), height, width)
            return np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
        x, y = np.where(on, x, x[on][0]), np.where(on, y, y[on][0])
        row, column = np.floor(y).astype(int), np.floor(x).astype(int)
        first_row, first_column = int(row.min()) - 1, int(column.min()) - 1
        values, valid = self.raster.read(
            first_row, first_column, int(row.max()) - first_row + 3, int(column.max()) - first_column + 3, bands
        )
        dy, dx = y - row, x - column
        row, column = row - first_row - 1, column - first_column - 1
        cubic, linear = np.zeros((2, len(bands), height, width))
        weight, whole = np.zeros_like(linear), np.ones(linear.shape, np.bool_)
        for i in range(4):
            for j in range(4):
                holds, value = valid[:, row + i, column + j], values[:, row + i, column + j]
                whole &= holds
                cubic += _cubic(dy - (i - 1)) * _cubic(dx - (j - 1)) * value
                if i in (1, 2) and j in (1, 2):
                    share = (1 - abs(dy - (i - 1))) * (1 - abs(dx - (j - 1))) * holds
                    linear += share * value
                    weight += share
        holds = valid[:, row + 1 + (dy > 0.5), column + 1 + (dx > 0.5)] & on
        mixed = np.divide(linear, weight, out=np.zeros_like(linear), where=weight > 0)
        return np.where(holds, np.where(whole, cubic, mixed), 0).astype(np.float32), holds


def _cubic(t: Places) -> Places:
    """Keys' kernel (IEEE TASSP 1981), a = -0.5."""
    t = np.abs(t)
    return np.where(t <= 1, (1.5 * t - 2.5) * t * t + 1, np.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0))


def _apply(transform: Affine, xs: Places, ys: Places) -> tuple[Places, Places]:
    return (
        transform.a * xs + transform.b * ys + transform.c,
        transform.d * xs + transform.e * ys + transform.f,
    )


def _reproject(source: CRS, target: CRS, xs: Places, ys: Places) -> tuple[Places, Places]:
    try:
        x, y = reproject(source, target, xs, ys)
    except CPLE_BaseError:  # PROJ gives up on some points and calls others infinite
        return np.full(len(xs), np.inf), np.full(len(xs), np.inf)
    return np.array(x), np.array(y)


def fill(values: Values, valid: Valid) -> Values:
    """Void pixels replaced from their surroundings, so that filters do not carry a border into the data.

    Args:
        values: [C, H, W].
        valid: where they hold data, [C, H, W] or one [H, W] for all.

    Returns:
        [C, H, W]; up to 64 pixels from data interpolated from it, beyond the mean; 0 where a band is void throughout.
    """
    filled = []
    for image, mask in zip(values, np.broadcast_to(valid, values.shape), strict=True):
        if mask.all() or not mask.any():
            filled.append(image if mask.all() else np.zeros_like(image))
            continue
        start = np.where(mask, image, image[mask].mean(dtype=np.float64).astype(np.float32))
        filled.append(fillnodata(start, mask=mask, max_search_distance=FILL_DISTANCE))
    return np.stack(filled)


class RasterPair:
    """A PAN and an MS raster, opened together; a context manager.

    MS is read on its own grid, without resampling. Only where that grid is rotated against PAN's, or curved on it as
    in another CRS, is it resampled (cubic), to MS pixels of about their size along PAN's rows and columns. A grid that
    counts rows or columns from the other end is read from that end.

    Args:
        pan: raster with one band (alpha not counted), by path or any name that GDAL takes.
        ms: raster with the MS bands. Without georeferencing in both, the areas of the first pixels of PAN and MS share
            their corner, and the ratio follows from the sizes.
        bands: MS bands to use, counted from 1; None is all but those tagged alpha. A band named here is never a mask.
        nodata: value that means "no data" in a band that declares nothing itself; NaN also where it does.
        phase: (row, column), or one number for both: distance in PAN pixels from the centre of the first PAN pixel in
            an MS pixel's area to where that MS pixel was sampled; None is the area's middle, (ratio - 1) / 2.

    Attributes:
        height, width: of PAN.
        ms_height, ms_width: of MS, on the grid that `read_ms` reads.
        bands: numbers of the chosen MS bands.
        image_bands: numbers of all MS bands that are not masks.
        ratio: (rows, columns), PAN pixels per MS pixel.
        phase: (row, column), PAN index of the centre of MS pixel (0, 0).
        warped: whether MS is resampled.
        spare: (rows, columns) of MS after its last, at most 1: the part of PAN there is too small for an MS pixel of
            its own; they are read as data that repeats the last.
        notes: sentences on what was assumed, for a summary.
        pan_file, ms_file: the open datasets.

    Raises:
        OSError: a file is missing, is no raster or is damaged.
        ValueError: PAN has several bands, a band holds indices of a colour table, the ratio is out of range, only one
            of the two is georeferenced, they do not overlap, or there is no such band.
    """

    def __init__(
        self,
        pan: str | os.PathLike[str],
        ms: str | os.PathLike[str],
        *,
        bands: Sequence[int] | None = None,
        nodata: float | None = None,
        phase: float | tuple[float, float] | None = None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            self.pan_file = stack.enter_context(open_raster("PAN", pan))
            self.ms_file = stack.enter_context(open_raster("MS", ms))
            self._paths = str(pan), str(ms)
            pan_bands = image_bands(self.pan_file)
            if len(pan_bands) != 1:
                raise ValueError(f"PAN: expected 1 band, got {len(pan_bands)} in {pan}")
            self.bands = list(bands) if bands is not None else image_bands(self.ms_file)
            for band in self.bands:
                if band not in self.ms_file.indexes:
                    raise ValueError(f"bands: expected numbers from 1 to {self.ms_file.count}, got {band}")
            if not self.bands:
                raise ValueError("bands: expected at least one number, got none")
            alpha = [band for band in alpha_bands(self.ms_file) if band not in self.bands]
            self.image_bands = [band for band in self.ms_file.indexes if band not in alpha]
            for name, dataset, used in (("PAN", self.pan_file, pan_bands), ("MS", self.ms_file, self.bands)):
                _check_colours(name, dataset, used)
            self.notes: list[str] = []
            if alpha:
                every = ",".join(str(band) for band in self.ms_file.indexes)
                self.notes.append(
                    f"band {', '.join(map(str, alpha))} of MS is tagged alpha and taken as a mask "
                    f"(bands {every} takes it as an image)"
                )
                with reading("MS", str(ms)):
                    if any(_looks_like_image(self.ms_file, band) for band in alpha):
                        warnings.warn(f"MS: {self.notes[-1]}, but it looks like an image", stacklevel=2)
            self.height, self.width = self.pan_file.shape
            self._pan = _Raster("PAN", str(pan), self.pan_file, alpha_bands(self.pan_file), pan_bands, nodata)
            self._pan_band = pan_bands[0]
            self._ms: _Raster | _Resampled = _Raster("MS", str(ms), self.ms_file, alpha, self.bands, nodata)
            self.spare = (0, 0)
            with reading("MS", str(ms)):
                start = self._align()
            centre = (phase, phase) if phase is None or isinstance(phase, int | float) else phase
            row, column = (
                snap(s + (aligned_phase(r) if c is None else c), 0.25, SNAP)
                for s, r, c in zip(start, self.ratio, centre, strict=True)
            )
            self.phase = row, column
            self.ms_height, self.ms_width = self._ms.shape
            self._stack = stack.pop_all()

    def __enter__(self) -> RasterPair:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def warped(self) -> bool:
        return isinstance(self._ms, _Resampled)

    @property
    def declares_nodata(self) -> bool:
        """Whether PAN or a chosen MS band says where it holds data: a value, a mask or alpha."""
        return self._pan.declares(self._pan_band) or any(self._ms.declares(band) for band in self.bands)

    @property
    def may_lack_data(self) -> bool:
        """Whether PAN or a chosen MS band may hold no data somewhere on PAN's area."""
        raster = self._ms.raster if isinstance(self._ms, _Resampled) else self._ms
        return self.warped or self.declares_nodata or raster.nodata is not None or not self._covers()

    def _covers(self) -> bool:
        ends = (self.ms_height + self.spare[0], self.ms_width + self.spare[1])
        return all(
            phase - ratio / 2 <= -0.5 + STRAIGHT and phase + ratio * (end - 0.5) >= size - 0.5 - STRAIGHT
            for phase, ratio, end, size in zip(self.phase, self.ratio, ends, self.pan_file.shape, strict=True)
        )

    def read_pan(self, top: int, left: int, height: int, width: int) -> tuple[Values, Valid]:
        """A window of PAN, which may leave it.

        Args:
            top: first row.
            left: first column.
            height: rows.
            width: columns.

        Returns:
            values [1, height, width] and where they hold data [height, width]; elsewhere they are finite and mean
            nothing.

        Raises:
            OSError: the file is damaged.
            ValueError: NaN or infinity among the data.
        """
        values, valid = self._pan.read(top, left, height, width, [self._pan_band])
        return values, valid[0]

    def read_ms(
        self, top: int, left: int, height: int, width: int, bands: Sequence[int] | None = None
    ) -> tuple[Values, Valid]:
        """A window of MS on its own grid, which may leave it.

        Args:
            top: first row.
            left: first column.
            height: rows.
            width: columns.
            bands: some of `image_bands`; None is the chosen ones.

        Returns:
            values and where they hold data, band by band, both [C, height, width]; elsewhere they are finite and mean
            nothing.

        Raises:
            OSError: the file is damaged.
            ValueError: NaN or infinity among the data of chosen bands; in others these count as void.
        """
        return self._ms.read(top, left, height, width, self.bands if bands is None else bands)

    def _align(self) -> tuple[float, float]:
        """Sets how MS is read, and the ratio; returns where on PAN (pixel corners) MS's first area begins."""
        pan, ms, raster = self.pan_file, self.ms_file, self._ms
        assert isinstance(raster, _Raster)
        if not (_georeferenced(pan) or _georeferenced(ms)):
            self.ratio = fit_ratio(pan.shape, ms.shape)
            if not self.ratio[0].is_integer():
                self.notes.append(
                    f"ratio {self.ratio[0]:.4g} x {self.ratio[1]:.4g}, from the sizes, as neither file says more"
                )
            self._find_spare(raster, (0.0, 0.0))
            self._compare_positions()
            return 0.0, 0.0
        for name, one, other in (("MS", ms, pan), ("PAN", pan, ms)):
            if not _georeferenced(one):
                has = "only control points or RPCs" if one.gcps[0] or one.rpcs is not None else "none"
                raise ValueError(
                    f"{name}: expected georeferencing as in the other file ({other.crs or 'no CRS'}, pixels of "
                    f"{abs(other.transform.a):g}), got {has} in {self._paths[name == 'MS']}"
                )
        if (pan.crs is None) != (ms.crs is None):
            raise ValueError(f"MS: expected a CRS like PAN's, {pan.crs or 'none'}, got {ms.crs or 'none'}")
        rows, columns = np.meshgrid(np.linspace(0, ms.height, 5), np.linspace(0, ms.width, 5), indexing="ij")
        points = self._on_pan(columns, rows)
        step = min(1.0, ms.width / 2), min(1.0, ms.height / 2)
        centre = ms.width / 2, ms.height / 2
        near = self._on_pan(*np.array([centre, (centre[0] + step[0], centre[1]), (centre[0], centre[1] + step[1])]).T)
        if not np.isfinite(near).all() or not np.isfinite(points).any():
            raise ValueError(f"MS: expected a place in PAN's CRS {pan.crs}, got {ms.bounds} in {ms.crs}")
        right, down = (near[1] - near[0]) / step[0], (near[2] - near[0]) / step[1]
        known = points[np.isfinite(points).all(-1)]
        low, high = known.min(0), known.max(0)
        straight = self._straight(points, rows, columns)
        ratio = straight[1] if straight else (float(np.hypot(*down)), float(np.hypot(*right)))
        check_ratio(ratio)
        if (high <= 0).any() or (low >= (self.width, self.height)).any():
            raise ValueError(
                f"MS: expected to overlap PAN, columns 0 to {self.width} and rows 0 to {self.height} of its grid, got "
                f"columns {low[0]:.0f} to {high[0]:.0f} and rows {low[1]:.0f} to {high[1]:.0f}"
            )
        if straight:
            start, self.ratio, raster.flip = straight
            self._find_spare(raster, start)
            return start
        return self._resample(raster, ratio, low[::-1], high[::-1])

    def _straight(
        self, points: Places, rows: Places, columns: Places
    ) -> tuple[tuple[float, float], tuple[float, float], tuple[bool, bool]] | None:
        """(start, ratio, flip) where MS's rows and columns are PAN's, else None; `points` [5, 5, 2] lie on MS."""
        grid = []
        for axis, place, length in ((1, rows, self.ms_file.height), (0, columns, self.ms_file.width)):
            first, last = (points[[0, -1], :, axis].T if axis == 1 else points[:, [0, -1], axis])[0]
            scale = (last - first) / length
            with np.errstate(invalid="ignore"):
                if not (np.abs(points[..., axis] - (first + scale * place)) <= STRAIGHT).all() or scale == 0:
                    return None
            ratio = snap(abs(scale), 0.5, SNAP / length)
            grid.append((snap(min(first, last), 0.25, SNAP), ratio, bool(scale < 0)))
        (top, height, flip_rows), (left, width, flip_columns) = grid
        return (top, left), (height, width), (flip_rows, flip_columns)

    def _find_spare(self, raster: _Raster, start: tuple[float, float]) -> None:
        """An MS that ends one pixel early, as that pixel would lie on PAN only in part; PAN's grid and MS's in step."""
        spare = []
        for begin, ratio, size, length in zip(start, self.ratio, self.pan_file.shape, raster.shape, strict=True):
            missing = (size - begin) / ratio - length
            spare.append(int(0 < missing < 1 and ratio.is_integer() and (begin / ratio).is_integer()))
        self.spare = raster.spare = (spare[0], spare[1])

    def _resample(self, raster: _Raster, ratio: tuple[float, float], low: Places, high: Places) -> tuple[float, float]:
        """Read MS on a grid along PAN's rows and columns, from `low` to `high` on PAN but not far off it."""
        height, width = (float(round(value)) if abs(value / round(value) - 1) < 0.05 else value for value in ratio)
        self.ratio = height, width
        first, shape = [], []
        for value, begin, end, size in zip(self.ratio, low, high, self.pan_file.shape, strict=True):
            start = max(math.floor(begin / value), -MARGIN)
            first.append(start)
            shape.append(min(math.ceil(end / value), math.ceil(size / value) + MARGIN) - start)
        self._ms = _Resampled(
            raster,
            self.pan_file.transform * Affine.scale(width, height) * Affine.translation(first[1], first[0]),
            self.pan_file.crs,
            (shape[0], shape[1]),
        )
        self.notes.append("MS resampled to PAN's grid")
        return first[0] * height, first[1] * width

    def _on_pan(self, columns: Places, rows: Places) -> Places:
        """MS positions (pixel corners) as positions (column, row) on PAN's grid [..., 2]; infinite for none."""
        pan, ms = self.pan_file, self.ms_file
        if pan.crs == ms.crs:
            return np.stack(_apply(~pan.transform * ms.transform, columns, rows), -1)
        xs, ys = _reproject(ms.crs, pan.crs, *_apply(ms.transform, columns.ravel(), rows.ravel()))
        with np.errstate(invalid="ignore"):
            points = np.stack(_apply(~pan.transform, xs, ys), -1).reshape(*columns.shape, 2)
        return np.where(np.isfinite(points), points, np.inf)

    def _compare_positions(self) -> None:
        """Compare the places that control points or RPCs give to a pair whose grids say nothing.

        Raises:
            ValueError: they lie far apart.
        """
        on_pan, on_ms = _locator(self.pan_file, self.pan_file), _locator(self.ms_file, self.pan_file)
        if on_pan is None and on_ms is None:
            return
        if on_pan is None or on_ms is None:
            self.notes.append(
                f"only {'MS' if on_pan is None else 'PAN'} has control points or RPCs: PAN and MS are laid on "
                "each other by their sizes"
            )
            return
        (pan, pan_crs), (ms, ms_crs) = on_pan, on_ms
        rows = np.array([0.1, 0.1, 0.5, 0.9, 0.9]) * self.ms_file.height
        columns = np.array([0.1, 0.9, 0.5, 0.1, 0.9]) * self.ms_file.width
        try:
            xs, ys = (np.array(values) for values in ms.xy(rows, columns, offset="ul"))
            if ms_crs != pan_crs and ms_crs is not None and pan_crs is not None:
                xs, ys = _reproject(ms_crs, pan_crs, xs, ys)
            found = pan.rowcol(xs, ys, op=lambda value: value, precision=None)
        except (TransformError, CPLE_BaseError) as error:
            self.notes.append(f"control points or RPCs of PAN and MS could not be compared ({error})")
            return
        apart = [
            round(float(np.median(np.asarray(values, float) / ratio - place)), 1) + 0.0  # no -0.0
            for values, ratio, place in zip(found, self.ratio, (rows, columns), strict=True)
        ]
        distance = math.hypot(*apart)
        text = f"{apart[0]:.1f} rows and {apart[1]:.1f} columns of MS from where it lies by its size"
        if not distance <= FAR_APART:
            raise ValueError(f"MS: expected control points or RPCs that put it on PAN, got {text}")
        if distance > APART:
            warnings.warn(f"MS: control points or RPCs put it {text}", stacklevel=3)
            self.notes.append(f"control points or RPCs put MS {text}")


def _looks_like_image(dataset: DatasetReader, band: int) -> bool:
    """Whether a band tagged alpha has many values between void and opaque, by a few windows of it."""
    side = 64
    tops, lefts = (sorted({0, max(0, (size - side) // 2), max(0, size - side)}) for size in dataset.shape)
    windows = [Window(left, top, side, side) for top in tops for left in lefts]
    values = np.concatenate([dataset.read(band, window=window).ravel() for window in windows])
    return bool(((values != 0) & (values != values.max())).mean() > 0.2)


def _georeferenced(dataset: DatasetReader) -> bool:
    return dataset.crs is not None or not dataset.transform.is_identity


def _locator(
    dataset: DatasetReader, reference: DatasetReader
) -> tuple[GCPTransformer | RPCTransformer, CRS | None] | None:
    """What turns pixels into places by control points or RPCs, at the height where the RPCs of `reference` start."""
    points, crs = dataset.gcps
    if points:
        return GCPTransformer(points), crs
    if dataset.rpcs is not None:
        height = (reference.rpcs or dataset.rpcs).height_off
        return RPCTransformer(dataset.rpcs, rpc_height=height), CRS.from_epsg(4326)
    return None


def _check_colours(name: str, dataset: DatasetReader, bands: Sequence[int]) -> None:
    """Raise ValueError where a band holds indices of a colour table; grey at its own value is none."""
    for band in bands:
        if dataset.colorinterp[band - 1] != ColorInterp.palette:
            continue
        with contextlib.suppress(ValueError):  # a palette without a table
            if all(entry[:3] == (value,) * 3 for value, entry in dataset.colormap(band).items()):
                continue
        raise ValueError(
            f"{name}: expected values, got indices of a colour table in band {band} of {dataset.name} "
            "(gdal_translate -expand gray or rgb writes what they stand for)"
        )
