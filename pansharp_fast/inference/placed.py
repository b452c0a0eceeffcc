"""A window of PAN with the MS that belongs to it: read, nodata filled, every band brought where PAN lies."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.observation import AUTO_STEPS, blur, hold_chroma, move, noise_floor, observe, resample, soften, upsample
from ..data.registration import Registration, Source

#: MS pixels around a window that interpolation, blur and back-projection look at.
CONTEXT = 16
#: Widths, in pixels, of the Gaussians by which nodata is filled from its surroundings; beyond them by the band's mean.
FILL = (1.0, 2.0)
#: PAN pixels by which a displacement may vary within a window before the window is bent.
BENT = 0.02


def fill(values: Tensor, valid: Tensor, means: Tensor) -> Tensor:
    """[C, H, W] with invalid pixels replaced: from valid ones near them, else by `means` [C].

    What a pixel becomes depends on its surroundings alone, wherever a window ends.
    """
    if bool(valid.all()):
        return values
    out = torch.where(valid, values, means.to(values)[:, None, None])
    known = torch.where(valid, values, 0)[None]
    weight = valid.to(values)[None]
    for sigma in reversed(FILL):
        share = blur(weight, sigma)[0]
        near = share > 1e-3
        estimate = blur(known, sigma)[0] / share.clamp_min(1e-6)
        out = torch.where(~valid & near, estimate, out)
    return out


@dataclass
class Means:
    """Means of the pixels that hold data: pan [1], ms [C]."""

    pan: Tensor
    ms: Tensor


class Placed:
    """PAN rows top.. and columns left.. of a pair, and the bands registered on them.

    Args:
        source: the pair.
        registration: of the chosen bands, a batch of one.
        bands: numbers of the chosen bands, from 1.
        gains: their MTF at MS's Nyquist frequency.
        window: top, left, height and width in PAN pixels; may leave PAN.
        means: what stands where nothing near holds data; None takes those of the window.

    Attributes:
        pan: [1, 1, H, W] float32, filled.
        ms: [1, C, h, w] float32, filled.
        pan_valid, ms_valid: bool [H, W], [C, h, w].
        ratio, phase: of the window's grids.
        d: [C, 2] float64 PAN pixels.
        bend: [1, 2, H, W] float32 or None: what is added to `d` from place to place.
    """

    def __init__(
        self,
        source: Source,
        registration: Registration,
        bands: Sequence[int],
        gains: Sequence[float],
        window: tuple[int, int, int, int],
        means: Means | None = None,
    ) -> None:
        top, left, height, width = window
        self.ratio, self.gains, self.d = source.ratio, list(gains), registration.d[0].clone()
        self.bend: Tensor | None = None
        span = torch.zeros(2, 2, dtype=torch.float64)
        if registration.field is not None:
            rows, columns = torch.arange(top, top + height), torch.arange(left, left + width)
            field = registration.at(rows, columns, (source.height, source.width))
            middle = (field.amax((2, 3)) + field.amin((2, 3)))[0] / 2
            self.d += middle
            bend = field - middle[None, :, None, None]
            if float(bend.abs().max()) > BENT:
                self.bend = bend.float()
                span = torch.stack([bend.amin((2, 3))[0], bend.amax((2, 3))[0]])
        first, size = [], []
        for axis, (start, length) in enumerate(((top, height), (left, width))):
            low = start + float(self.d[:, axis].min() + span[0, axis]) - source.phase[axis]
            high = start + length - 1 + float(self.d[:, axis].max() + span[1, axis]) - source.phase[axis]
            first.append(math.floor(low / source.ratio[axis]) - CONTEXT)
            size.append(math.ceil(high / source.ratio[axis]) + CONTEXT + 1 - first[-1])
        pan, pan_valid = source.read_pan(top, left, height, width)
        ms, ms_valid = source.read_ms(first[0], first[1], size[0], size[1], bands)
        self.pan_valid, self.ms_valid = torch.from_numpy(pan_valid), torch.from_numpy(ms_valid)
        self.phase = tuple(
            source.phase[axis] + source.ratio[axis] * first[axis] - start for axis, start in ((0, top), (1, left))
        )
        pan_values, ms_values = (torch.from_numpy(np.ascontiguousarray(x, np.float32)) for x in (pan, ms))
        if means is None:
            means = Means(_means(pan_values, self.pan_valid[None]), _means(ms_values, self.ms_valid))
        self._first, self._ms_size = first, (source.ms_height, source.ms_width)
        self.pan = _whole(pan_values, self.pan_valid[None], means.pan, (top, left), (source.height, source.width))[None]
        self.ms = _whole(ms_values, self.ms_valid, means.ms, first, self._ms_size)[None]
        self._all_valid = bool(self.pan_valid.all()), bool(self.ms_valid.all())

    @property
    def largest(self) -> float:
        """Largest value with data."""
        parts = ((self.pan[0], self.pan_valid[None]), (self.ms[0], self.ms_valid))
        return max(
            (float(torch.where(valid, values, -torch.inf).max()) for values, valid in parts if bool(valid.any())),
            default=0.0,
        )

    @property
    def size(self) -> tuple[int, int]:
        return self.pan.shape[2], self.pan.shape[3]

    def up(self, *, every: float = 1.0, first: float = 0.0, gdal: bool = False) -> Tensor:
        """[1, C, ...]: the bands in PAN's frame, every so many PAN pixels from index `first` on."""
        size = tuple(max(0, math.ceil((length - first) / every)) for length in self.size)
        place: dict[str, Any] = {"ratio": self.ratio, "phase": self.phase, "d": self.d}
        if self.bend is None:
            place |= {"size": (size[0], size[1]), "every": every, "first": first}
        else:
            place |= {"size": self.size}
        whole = upsample(self.ms, **place, gdal=gdal)
        if gdal:
            # GDAL gives no weight to what holds no data, nor to what lies beyond MS, a missing last pixel included.
            held = self.ms_valid.clone()
            rows, columns = (max(0, size - first) for size, first in zip(self._ms_size, self._first, strict=True))
            held[:, rows:] = held[:, :, columns:] = False
            if not bool(held.all()):
                known = held[None].to(self.ms)
                share = upsample(known, **place, gdal=True)
                whole = torch.where(share > 0.01, upsample(self.ms * known, **place, gdal=True) / share, whole)
        if self.bend is None:
            return whole
        whole = _bent(whole, self.bend)
        if every == 1 and first == 0:
            return whole
        # Sampled again from PAN's grid, on which MS has no detail to lose.
        start = torch.full((whole.shape[1], 2), float(first))
        return resample(whole, (size[0], size[1]), start, every)

    def low_pan(self) -> Tensor:
        """[1, C, H, W]: PAN through each band's MTF and back on its grid; its border there is repeated as MS's is."""
        place: dict[str, Any] = {"ratio": self.ratio, "phase": self.phase}
        size = (self.ms.shape[2], self.ms.shape[3])
        low = observe(self.pan.expand(-1, len(self.gains), -1, -1), size, gains=self.gains, **place)
        return upsample(_repeat_border(low[0], self._first, self._ms_size)[None], self.size, **place)

    def observe(self, x: Tensor) -> Tensor:
        """[1, C, h, w]: what the sensor would see of `x` [1, C, H, W]."""
        if self.bend is not None:
            x = _bent(x, -self.bend)
        return observe(
            x, (self.ms.shape[2], self.ms.shape[3]), gains=self.gains, ratio=self.ratio, phase=self.phase, d=self.d
        )

    @functools.cached_property
    def valid(self) -> Tensor:
        """[H, W]: where PAN holds data, and every band at the place that belongs there."""
        out = self.pan_valid.clone()
        for band, place in enumerate(self.d):
            if not self._all_valid[1]:
                out &= self._band_valid(band, place, self.bend)
        return out

    def valid_in_ms_frame(self) -> Tensor:
        """[H, W]: where every band holds data, and PAN at the places that belong there."""
        out = torch.ones_like(self.pan_valid)
        for band, (dy, dx) in enumerate(self.d.tolist()):
            rows, columns = _nearest(torch.arange(self.size[0]) - dy), _nearest(torch.arange(self.size[1]) - dx)
            inside = ((rows >= 0) & (rows < self.size[0]))[:, None] & (columns >= 0) & (columns < self.size[1])
            moved = self.pan_valid[rows.clamp(0, self.size[0] - 1)][:, columns.clamp(0, self.size[1] - 1)]
            out &= moved & inside & self._band_valid(band, torch.zeros(2, dtype=torch.float64), None)
        return out

    def _band_valid(self, band: int, d: Tensor, bend: Tensor | None) -> Tensor:
        if bend is None:
            rows, columns = (
                _nearest((torch.arange(length) + float(d[axis]) - self.phase[axis]) / self.ratio[axis])
                for axis, length in enumerate(self.size)
            )
            limits = self.ms_valid.shape[1:]
            return self.ms_valid[band][rows.clamp(0, limits[0] - 1)][:, columns.clamp(0, limits[1] - 1)]
        rows = torch.arange(self.size[0])[:, None] + float(d[0]) + bend[0, 0].double()
        columns = torch.arange(self.size[1]) + float(d[1]) + bend[0, 1].double()
        row, column = (
            _nearest((place - self.phase[axis]) / self.ratio[axis]).clamp(0, self.ms_valid.shape[1 + axis] - 1)
            for axis, place in enumerate((rows, columns))
        )
        return self.ms_valid[band][row, column]

    @functools.cached_property
    def usable(self) -> Tensor:
        """[1, C, h, w] bool: MS pixels that hold data and see nothing but PAN pixels that do, inside the window."""
        out = self.ms_valid.clone()
        for axis, length in enumerate(self.size):
            place = self.phase[axis] + self.ratio[axis] * torch.arange(self.ms_valid.shape[1 + axis])
            for band in range(len(out)):
                where = place - float(self.d[band, axis])
                inside = (where >= -0.5) & (where <= length - 0.5)
                out[band] &= inside[:, None] if axis == 0 else inside
        if not self._all_valid[0]:
            lost = F.max_pool2d(1 - self.pan_valid.float()[None, None], 3, stride=1, padding=1)
            seen = observe(
                lost.expand(-1, len(out), -1, -1),
                (self.ms.shape[2], self.ms.shape[3]),
                gains=self.gains,
                ratio=self.ratio,
                phase=self.phase,
                d=self.d,
            )
            out &= seen[0] < 0.02
        return out[None]

    def back_project(self, x: Tensor, steps: int | str, floors: list[Tensor] | None = None) -> Tensor:
        """As `data.observation.back_project`; void pixels have no part in it.

        Args:
            x: [1, C, H, W] in PAN's frame.
            steps: a number, or "auto".
            floors: the scene's noise floor at each "auto" step; an empty list is filled with the window's own.
        """
        count = AUTO_STEPS if steps == "auto" else int(steps)
        if not count:
            return x
        usable, floors, start = self.usable, [] if floors is None else floors, x
        for step in range(count):
            residual = torch.where(usable, self.ms.to(x) - self.observe(x), 0)
            if steps == "auto":
                if len(floors) == step:
                    floors.append(noise_floor(residual, usable))
                residual = soften(residual, floors[step])
            extra = upsample(residual, self.size, ratio=self.ratio, phase=self.phase, d=self.d)
            x = x + (extra if self.bend is None else _bent(extra, self.bend))
        return hold_chroma(x, start, self.up(), self.ratio) if steps == "auto" else x

    def to_ms_frame(self, x: Tensor) -> Tensor:
        """[1, C, H, W] in PAN's frame, each band moved back where its own MS band lies."""
        moved = move(x, self.d)
        return moved if self.bend is None else _bent(moved, -self.bend)


def _whole(values: Tensor, valid: Tensor, means: Tensor, first: Sequence[int], size: Sequence[int]) -> Tensor:
    """[C, h, w] from pixel `first` of an image of `size` on, filled; what lies beyond the image repeats its border."""
    rows, columns = (slice(max(0, -start), max(0, length - start)) for start, length in zip(first, size, strict=True))
    inside = valid[:, rows, columns]
    if not (inside.numel() and bool(inside.all())):
        values = fill(values, valid, means)
    return _repeat_border(values, first, size)


def _repeat_border(values: Tensor, first: Sequence[int], size: Sequence[int]) -> Tensor:
    """[C, h, w] from pixel `first` of an image of `size` on: what lies beyond the image repeats its border."""
    for axis, (start, have, length) in enumerate(zip(first, values.shape[1:], size, strict=True), 1):
        if start < 0 or start + have > length:
            place = torch.arange(start, start + have).clamp(0, length - 1).sub(start).clamp(0, have - 1)
            values = values.index_select(axis, place)
    return values


def _nearest(place: Tensor) -> Tensor:
    """Index of the pixel whose area, open at its end, holds a place."""
    return (place + 0.5).floor().long()


def _means(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, 0).double().sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)


def _bent(x: Tensor, bend: Tensor) -> Tensor:
    """[1, C, H, W] read at p + bend(p): cubic, for images far smoother than the grid."""
    height, width = x.shape[2:]
    rows = torch.arange(height)[:, None] + bend[0, 0]
    columns = torch.arange(width) + bend[0, 1]
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)[None].to(x)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)
