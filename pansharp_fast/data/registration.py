"""Where each MS band lies against PAN, measured from the pair itself.

PAN through the band's MTF and the band, both less a Gaussian of .6 MS pixels, are compared by the *squared local*
correlation in Gaussian windows of one MS pixel, averaged with weights of the local contrast: so contrast between PAN
and a band may differ, or flip, from place to place. The score is searched in steps of half an MS pixel, then of a
quarter; a quadratic through its best 3 x 3 values gives the fraction. See `observation` for the sign of a displacement.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .grid import Both, both_ratios, default_phase
from .observation import blur, observe, resample
from .sensors import Sensor, get_sensor

#: MS pixels within which a displacement is looked for, by default and at most.
REACH, MAX_REACH = 2.0, 16.0
#: Values of windows that are scored at once, as many as the cache holds.
_AT_ONCE = 1 << 18
#: Side of a window in MS pixels; how many windows of a scene are measured, and how many of them searched, at most.
WINDOW, MAX_WINDOWS, MAX_SEARCHED = 64, 36, 9
#: A band of confidence up to LOW follows the others, one of HIGH stands for itself; linear in between. A band that is
#: surer than SURE and lies further than APART PAN pixels from the others' median lies there in truth.
LOW, HIGH, SURE, APART = 0.5, 1.0, 0.6, 0.3
#: Windows from which a displacement that varies over the scene is looked for, and what it must gain to be believed.
FIELD_WINDOWS, FIELD_GAIN = 12, 0.8
#: PAN pixels over which such a displacement must vary to be used.
FIELD_SPAN = 0.15
#: Share of a window that must hold data.
MIN_VALID = 0.1
#: Samples an MS pixel: the score's lattice.
_FINE = 2
#: Steps of the search and of its refinement, and the Gaussian of the high-pass, in MS pixels.
_STEP, _FINE_STEP, _DETAIL = 0.5, 0.25, 0.6


class Source(Protocol):
    """A pair to be read in windows, such as `rasters.RasterPair`. Windows may leave the images: not valid there."""

    height: int
    width: int
    ms_height: int
    ms_width: int
    ratio: tuple[float, float]
    phase: tuple[float, float]

    def read_pan(self, top: int, left: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]: ...

    def read_ms(
        self, top: int, left: int, height: int, width: int, bands: Sequence[int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class Registration:
    """Displacement of the bands of one or more images against PAN.

    Attributes:
        d: [B, C, 2] float64, (dy, dx) in PAN pixels: band b shows at p + d_b what PAN shows at p. Zero where nothing
            trustworthy was found.
        confidence: [B, C] float64, 0 to 1: the score, a mean squared local correlation.
        measured: [B, C, 2] float64, what each band alone gave.
        spread: [B, C] float64, PAN pixels: standard deviation between windows (from their median deviation), NaN
            where there was one window.
        field: [B, 2, gy, gx] float64 or None: what is added to every band's `d` over the scene, PAN pixels at knots
            spread evenly from PAN's first to last row and column, bilinear between.
        model: "none" (nothing trustworthy), "constant", "affine", "smooth", or "given".
    """

    d: Tensor
    confidence: Tensor
    measured: Tensor
    spread: Tensor
    field: Tensor | None = None
    model: str = "constant"

    @classmethod
    def given(cls, d: Sequence[float] | Tensor | NDArray[Any], bands: int) -> Registration:
        """A displacement by hand: (dy, dx) for all bands, or one for each.

        Raises:
            ValueError: it has another shape, or is not finite.
        """
        values = torch.as_tensor(np.asarray(d, dtype=np.float64))
        if values.shape not in ((2,), (bands, 2)) or not bool(values.isfinite().all()):
            raise ValueError(f"shift: expected DY,DX in PAN pixels, or one pair for each of {bands} bands, got {d}")
        values = values.expand(1, bands, 2).clone()
        one = torch.ones(1, bands, dtype=torch.float64)
        return cls(values, one, values.clone(), one * math.nan, None, "given")

    @property
    def applied(self) -> bool:
        """Whether anything is displaced."""
        return bool(self.d.any()) or self.field is not None

    def select(self, bands: Sequence[int]) -> Registration:
        """Of the bands with these numbers, from 0."""
        index = list(bands)
        parts = {name: getattr(self, name)[:, index] for name in ("d", "confidence", "measured", "spread")}
        return dataclasses.replace(self, **parts)

    def image(self, index: int) -> Registration:
        """Of one image of the batch."""
        names = ("d", "confidence", "measured", "spread") + (() if self.field is None else ("field",))
        return dataclasses.replace(self, **{name: getattr(self, name)[index : index + 1] for name in names})

    def at(self, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, 2, len(rows), len(columns)]: the field at these PAN rows and columns of a PAN image of `size`."""
        assert self.field is not None
        out = self.field
        for axis, places in ((2, rows), (3, columns)):
            knots = out.shape[axis]
            place = (places.double() / max(size[axis - 2] - 1, 1)).clamp(0, 1) * (knots - 1)
            left = place.floor().long().clamp(max=max(knots - 2, 0))
            part = (place - left).view([-1, 1] if axis == 2 else [-1])
            right = (left + 1).clamp(max=knots - 1)
            out = out.index_select(axis, left) * (1 - part) + out.index_select(axis, right) * part
        return out

    def text(self) -> str:
        """One line: what was found."""
        if self.model == "none":
            return "registration: nothing trustworthy found, MS taken as it lies"
        pairs = " ".join(f"({dy:+.2f}, {dx:+.2f})" for dy, dx in self.d[0].tolist())
        more = "" if self.field is None else f", {self.model} over the scene within {float(self.field.abs().max()):.2f}"
        return f"MS lies (down, right) PAN pixels off PAN: {pairs}{more}"

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON text, also written to `path` if given."""
        values: dict[str, Any] = {"unit": "PAN pixels (dy, dx), down and right positive", "model": self.model}
        for name in ("d", "confidence", "measured", "spread", "field"):
            value = getattr(self, name)
            values[name] = None if value is None else _lists(value.tolist())
        text = json.dumps(values, indent=1) + "\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Registration:
        """From JSON text, or a file with it.

        Raises:
            OSError: no such file.
            ValueError: it is no registration.
        """
        text = str(source) if str(source).lstrip().startswith("{") else Path(source).read_text()
        try:
            values = json.loads(text)
            parts = {
                name: torch.tensor(_numbers(values[name]), dtype=torch.float64)
                for name in ("d", "confidence", "measured", "spread")
            }
            field = values["field"]
            d, model = parts["d"], str(values["model"])
            grid = None if field is None else torch.tensor(field, dtype=torch.float64)
            fits = d.ndim == 3 and d.shape[2] == 2 and bool(d.isfinite().all())
            fits &= parts["confidence"].shape == d.shape[:2] == parts["spread"].shape
            fits &= parts["measured"].shape == d.shape
            fits &= grid is None or (grid.ndim == 4 and grid.shape[:2] == (len(d), 2) and bool(grid.isfinite().all()))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"registration: expected what to_json wrote, got {source} ({error})") from None
        if not fits:
            raise ValueError(f"registration: expected finite d [B, C, 2] and its confidences, got {source}")
        return cls(**parts, field=grid, model=model)


def _lists(value: Any) -> Any:
    """NaN as None, for JSON."""
    if isinstance(value, list):
        return [_lists(v) for v in value]
    return None if math.isnan(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return math.nan if value is None else value


@dataclass
class Arrays:
    """One pair in memory as a `Source`: pan [1,H,W], ms [C,h,w]; validity of PAN [H,W] and of each band [C,h,w]."""

    pan: NDArray[Any]
    ms: NDArray[Any]
    pan_valid: NDArray[np.bool_]
    ms_valid: NDArray[np.bool_]
    ratio: tuple[float, float]
    phase: tuple[float, float]

    def __post_init__(self) -> None:
        self.height, self.width = self.pan.shape[1:]
        self.ms_height, self.ms_width = self.ms.shape[1:]

    def read_pan(self, top: int, left: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        values, valid = _window(self.pan, self.pan_valid[None], top, left, height, width)
        return values, valid[0]

    def read_ms(
        self, top: int, left: int, height: int, width: int, bands: Sequence[int] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        index = slice(None) if bands is None else [band - 1 for band in bands]
        return _window(self.ms[index], self.ms_valid[index], top, left, height, width)


def _window(
    values: NDArray[Any], valid: NDArray[np.bool_], top: int, left: int, height: int, width: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    rows, columns = np.arange(top, top + height), np.arange(left, left + width)
    inside = ((rows >= 0) & (rows < values.shape[1]))[:, None] & (columns >= 0) & (columns < values.shape[2])
    ys, xs = rows.clip(0, values.shape[1] - 1)[:, None], columns.clip(0, values.shape[2] - 1)
    return np.where(inside, values[:, ys, xs], 0), valid[:, ys, xs] & inside


class _Windows:
    """Windows of a pair on a lattice of `fine` samples an MS pixel: scores of any displacement, a window and band."""

    def __init__(
        self, source: Source, places: Sequence[tuple[int, int]], side: tuple[int, int], gains: Sequence[float],
        bands: Sequence[int] | None, reach: float, fine: int,
    ) -> None:  # fmt: skip
        self.ratio, self.fine = source.ratio, fine
        around = 4  # MS pixels that blur and high-pass see beyond a window
        far = math.ceil(reach) + around + 6  # and that a displaced band needs, interpolation included
        lows, bands_ms, masks = [], [], []
        self.used: list[int] = []
        for number, (top, left) in enumerate(places):
            # PAN around MS pixels top - around .. top + side + around.
            first = [
                math.floor(p + r * (t - around))
                for p, r, t in zip(source.phase, source.ratio, (top, left), strict=True)
            ]
            size = [math.ceil(r * (s + 2 * around)) + 1 for r, s in zip(source.ratio, side, strict=True)]
            pan, pan_valid = source.read_pan(first[0], first[1], size[0], size[1])
            ms, ms_valid = source.read_ms(top - far, left - far, side[0] + 2 * far, side[1] + 2 * far, bands)
            pan_image = _filled(torch.from_numpy(pan).float(), torch.from_numpy(pan_valid)[None])
            ms_image = _filled(torch.from_numpy(ms).float(), torch.from_numpy(ms_valid))
            # Position of MS pixel (top - around) in the PAN window.
            phase = [
                p + r * (t - around) - f
                for p, r, t, f in zip(source.phase, source.ratio, (top, left), first, strict=True)
            ]
            every = source.ratio[0] / fine
            count = (fine * (side[0] + 2 * around), fine * (side[1] + 2 * around))
            low = observe(
                pan_image[None].expand(1, len(gains), -1, -1),
                count,
                gains=gains,
                ratio=source.ratio,
                phase=phase,
                every=every,
            )
            cut = fine * around
            lows.append((low - blur(low, _DETAIL * fine))[0, :, cut:-cut, cut:-cut])
            high = ms_image[None] - blur(ms_image[None], _DETAIL)
            bands_ms.append(high[0])
            # A sample counts where everything that it saw is valid.
            good = _far_from_void(torch.from_numpy(pan_valid)[None], 5)[0]
            at = [
                (p + every * torch.arange(c)).round().long().clamp(0, s - 1)
                for p, c, s in zip(phase, count, size, strict=True)
            ]
            mask = good[at[0]][:, at[1]][cut:-cut, cut:-cut]
            inner = _far_from_void(torch.from_numpy(ms_valid), 2 * (math.ceil(reach) + 2) + 1)[:, far:-far, far:-far]
            mask = mask & inner.repeat_interleave(fine, 1).repeat_interleave(fine, 2)
            masks.append(mask.float())
            self.used.append(number)
        self.low, self.ms, self.mask = torch.stack(lows), torch.stack(bands_ms), torch.stack(masks)
        self.far, self.sigma = far, float(fine)
        self.mean, self.variance = _moments(self.low, self.sigma)
        #: What a product of variances needs to count as contrast.
        self.floor = 1e-9 * self.variance.mean((0, 2, 3), keepdim=True)
        self.floor = self.floor * _moments(self.ms, 1.0)[1].mean((0, 2, 3), keepdim=True)

    def score(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted squared correlation and weights of displacement d [C, 2] MS pixels, summed: each [N, C]."""
        count = max(1, _AT_ONCE // self.low[0].numel())
        parts = [self._score(slice(start, start + count), d) for start in range(0, len(self.low), count)]
        total, weight = (torch.cat(part) for part in zip(*parts, strict=True))
        return total, weight

    def _score(self, some: slice, d: Tensor) -> tuple[Tensor, Tensor]:
        """`score` of some of the windows."""
        low = self.low[some]
        # On MS's own grid ratio is 1: lattice sample i of a window lies at MS pixel far + i / fine.
        moved = resample(self.ms[some], (low.shape[2], low.shape[3]), self.far + d, 1 / self.fine)
        together = blur(torch.cat([moved, moved.square(), low * moved]), self.sigma)
        mean, square, product = together.split(len(low))
        variance = torch.addcmul(square, mean, mean, value=-1).clamp_min_(0)
        covariance = torch.addcmul(product, self.mean[some], mean, value=-1)
        contrast = variance.mul_(self.variance[some])
        weight = contrast.sqrt().mul_(self.mask[some])
        squared = covariance.square_().div_(contrast.add_(self.floor).clamp_min_(1e-30)).clamp_(max=1)
        return squared.mul_(weight).sum((2, 3)).double(), weight.sum((2, 3)).double()


def _moments(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Local mean and variance."""
    mean = blur(x, sigma)
    return mean, (blur(x.square(), sigma) - mean.square()).clamp_min(0)


def _far_from_void(valid: Tensor, side: int) -> Tensor:
    """[C, H, W] bool: where no pixel of a square around is invalid."""
    if bool(valid.all()):
        return valid
    return F.max_pool2d((~valid).float()[None], side, stride=1, padding=side // 2)[0] == 0


def _filled(values: Tensor, valid: Tensor) -> Tensor:
    """Invalid pixels of [C, H, W] at their band's mean; they are masked later."""
    if bool(valid.all()):
        return values
    counts = valid.sum((1, 2), keepdim=True).clamp_min(1)
    means = torch.where(valid, values, 0).sum((1, 2), keepdim=True) / counts
    return torch.where(valid, values, means)


def _peak(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], float] | None:
    """Place of the maximum of a map of scores, in steps from its first value, and its height; None at the border."""
    if not np.isfinite(scores).all():
        return None
    y, x = np.unravel_index(scores.argmax(), scores.shape)
    if not (0 < y < scores.shape[0] - 1 and 0 < x < scores.shape[1] - 1):
        return None
    v, u = (grid.ravel() for grid in np.mgrid[-1:2, -1:2])
    terms = np.stack([np.ones(9), v, u, v * v, u * u, v * u], 1)
    near = scores[y - 1 : y + 2, x - 1 : x + 2].ravel()
    c = np.linalg.lstsq(terms, near, rcond=None)[0]
    curvature = np.array([[2 * c[3], c[5]], [c[5], 2 * c[4]]])
    if np.linalg.eigvalsh(curvature).max() >= 0:
        return np.array([y, x], float), float(scores[y, x])
    step = -np.linalg.solve(curvature, c[1:3])
    return np.array([y, x]) + step.clip(-1, 1), float(scores[y, x])


def _search(
    windows: _Windows, centre: Tensor, steps: int, step: float, pooled: bool = True
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums of score and weight of displacements centre [C, 2] -n..n steps, in MS pixels.

    Each [2n+1, 2n+1, C], or [2n+1, 2n+1, N, C] a window.
    """
    offsets = step * torch.arange(-steps, steps + 1, dtype=torch.float64)
    pairs = [windows.score(centre + torch.stack([dy, dx])) for dy, dx in itertools.product(offsets, offsets)]
    total, weight = (
        np.stack([pair[i].numpy() for pair in pairs]).reshape(2 * steps + 1, 2 * steps + 1, *pairs[0][i].shape)
        for i in (0, 1)
    )
    return (total.sum(2), weight.sum(2)) if pooled else (total, weight)


def _median(values: NDArray[Any], weights: NDArray[Any]) -> float:
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _ratio(total: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


def _places(length: int, side: int, edge: int, most: int) -> list[int]:
    """First MS pixels of windows spread over an axis."""
    room = length - 2 * edge - side
    count = max(1, min(most, math.ceil((length - 2 * edge) / side)))
    return (
        sorted({edge + round(room * k / max(count - 1, 1)) for k in range(count)})
        if room > 0
        else [max(room // 2 + edge, 0)]
    )


def measure(
    source: Source, gains: Sequence[float], *, bands: Sequence[int] | None = None, reach: float = REACH
) -> Registration:
    """Registration of one pair, read in windows spread over it; the bands' median counts all bands asked for.

    Args:
        source: the pair.
        gains: MTF at MS's Nyquist frequency, one a band.
        bands: numbers of the bands, from 1; None is all.
        reach: MS pixels within which to look.

    Returns:
        A batch of one.

    Raises:
        ValueError: reach is out of range.
    """
    if not 0 < reach <= MAX_REACH:
        raise ValueError(f"reach: expected above 0 to {MAX_REACH:g} MS pixels, got {reach}")
    count = len(gains)
    ratio = np.array(source.ratio)
    sizes = (source.ms_height, source.ms_width)
    edges = [min(math.ceil(reach) + 1, size // 4) for size in sizes]
    side = tuple(max(1, min(WINDOW, size - 2 * edge)) for size, edge in zip(sizes, edges, strict=True))
    most = [max(1, round(math.sqrt(MAX_WINDOWS * sizes[i] / sizes[1 - i]))) for i in (0, 1)]
    grid = [_places(sizes[i], side[i], edges[i], most[i]) for i in (0, 1)]
    while len(grid[0]) * len(grid[1]) > MAX_WINDOWS:
        longest = int(len(grid[1]) > len(grid[0]))
        grid[longest] = _places(sizes[longest], side[longest], edges[longest], len(grid[longest]) - 1)
    places = list(itertools.product(grid[0], grid[1]))
    nothing = torch.zeros(1, count, 2, dtype=torch.float64)
    none = Registration(nothing, nothing[..., 0], nothing.clone(), nothing[..., 0] * math.nan, None, "none")
    if min(side) < 8:
        return none

    windows = _Windows(source, places, (side[0], side[1]), gains, bands, reach, _FINE)
    chosen = torch.nonzero(windows.mask.mean((1, 2, 3)) > MIN_VALID)[:, 0]
    if not len(chosen):
        return none
    few = chosen[torch.linspace(0, len(chosen) - 1, min(MAX_SEARCHED, len(chosen))).round().long()]
    coarse = _Windows(source, [places[i] for i in few], (side[0], side[1]), gains, bands, reach, 1)
    step = _STEP if reach <= 3 else 2 * _STEP
    steps = math.ceil(reach / step)
    maps = _ratio(*_search(coarse, torch.zeros(count, 2, dtype=torch.float64), steps, step))
    d, confidence = np.zeros((count, 2)), np.zeros(count)
    for band in range(count):
        peak = _peak(maps[..., band])
        if peak is not None:
            d[band], confidence[band] = (peak[0] - steps) * step, peak[1]
    for _ in range(3):  # on the finer lattice, around what is known
        maps = _ratio(*_search(windows, torch.from_numpy(d), 1, _FINE_STEP))
        for band in (b for b in range(count) if confidence[b] > 0):
            score = maps[..., band]
            if not np.isfinite(score).all():
                confidence[band] = 0
                continue
            peak = _peak(score)
            best = np.array(np.unravel_index(score.argmax(), score.shape)) if peak is None else peak[0]
            d[band] += (best - 1) * _FINE_STEP
            confidence[band] = score.max()
    confidence[(np.abs(d) > reach).any(1)] = 0
    confidence = confidence.clip(0, 1)
    tensor = torch.from_numpy
    if not (confidence > LOW).any():
        return dataclasses.replace(none, confidence=tensor(confidence)[None], measured=tensor(d * ratio)[None])

    sure = np.maximum(confidence - LOW, 0) ** 2
    common = np.array([_median(d[:, axis], sure) for axis in (0, 1)])
    own = ((confidence - LOW) / (HIGH - LOW)).clip(0, 1)
    own[(np.hypot(*((d - common) * ratio).T) > APART) & (confidence > SURE)] = 1
    drawn = own[:, None] * d + (1 - own[:, None]) * common
    spread, field, model = np.full(count, np.nan), None, "constant"
    if len(chosen) >= 4:
        deviation, trust = _deviations(windows, d, own)
        known = np.isfinite(deviation).all(2) & (windows.mask.mean((1, 2, 3)) > MIN_VALID).numpy()[:, None]
        for band in range(count):
            if known[:, band].sum() >= 4:
                off = np.abs(deviation[known[:, band], band] - np.median(deviation[known[:, band], band], 0))
                spread[band] = 1.4826 * float(np.median(off, 0).max())
        trust = np.where(known, trust, 0)
        weight = trust.sum(1)
        if (weight > 0).sum() >= FIELD_WINDOWS:
            mean = (np.where(known[..., None], deviation, 0) * trust[..., None]).sum(1) / np.maximum(weight, 1e-9)[
                :, None
            ]
            extent = np.array([source.height - 1, source.width - 1]).clip(1)
            centres = ((np.array(places) + np.array(side) / 2 - 0.5) * ratio + source.phase) / extent
            field, model = _field(centres[weight > 0], mean[weight > 0] * ratio, weight[weight > 0])
    return Registration(
        tensor(drawn * ratio)[None],
        tensor(confidence)[None],
        tensor(d * ratio)[None],
        tensor(spread * float(ratio.mean()))[None],
        None if field is None else tensor(field)[None],
        model,
    )


def _deviations(
    windows: _Windows, d: NDArray[np.float64], own: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each window adds to d [C, 2]: [N, C, 2] MS pixels, NaN where it cannot tell, and weights [N, C]."""
    steps = 2
    total, weight = _search(windows, torch.from_numpy(d), steps, _STEP, pooled=False)
    with np.errstate(invalid="ignore", divide="ignore"):
        maps = total / weight
    out = np.full((*maps.shape[2:], 2), np.nan)
    trust = np.zeros(maps.shape[2:])
    for window, band in np.ndindex(*trust.shape):
        peak = _peak(maps[..., window, band])
        if peak is not None and peak[1] > LOW:
            out[window, band] = (peak[0] - steps) * _STEP
            trust[window, band] = own[band] * (peak[1] - LOW)
    return out, trust


def _field(
    centres: NDArray[np.float64], deviation: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64] | None, str]:
    """The simplest of constant, affine and smooth that the windows' scatter supports.

    Args:
        centres: [N, 2], 0 to 1 over PAN's rows and columns. deviation: [N, 2], PAN pixels. weight: [N].

    Returns:
        Values at knots [2, gy, gx] or None for a constant, and the model's name.
    """

    def hats(x: NDArray[np.float64], knots: int) -> NDArray[np.float64]:
        return np.maximum(1 - np.abs(x[:, None] * (knots - 1) - np.arange(knots)), 0)

    def basis(places: NDArray[np.float64], knots: int) -> NDArray[np.float64]:
        if knots == 2:
            return np.column_stack([np.ones(len(places)), places])
        rows, columns = hats(places[:, 0], knots), hats(places[:, 1], knots)
        return (rows[:, :, None] * columns[:, None, :]).reshape(len(places), -1)

    def fit(knots: int) -> tuple[float, NDArray[np.float64]]:
        """Error on windows left out, and the fitted values at knots [2, g, g]."""
        design, robust = basis(centres, knots), np.ones(len(weight))
        for _ in range(4):
            root = np.sqrt(weight * robust)[:, None]
            inverse = np.linalg.pinv(design * root, rcond=1e-6)
            residual = deviation - design @ (inverse @ (deviation * root))
            size = np.hypot(*residual.T)
            scale = 1.4826 * np.median(size) + 1e-9
            robust = np.minimum(1, 2 * scale / np.maximum(size, 1e-12))
        leverage = ((design * root) * inverse.T).sum(1).clip(0, 0.999)
        left_out = np.hypot(*(residual / (1 - leverage[:, None])).T)
        grid = np.stack(np.meshgrid(*[np.linspace(0, 1, knots)] * 2, indexing="ij"), -1).reshape(-1, 2)
        values = basis(grid, knots) @ (inverse @ (deviation * root))
        return float(np.average(np.minimum(left_out, 3 * scale), weights=weight)), values.T.reshape(2, knots, knots)

    middle = np.median(deviation, 0)
    best = float(np.average(np.hypot(*(deviation - middle).T), weights=weight))
    field, model = None, "constant"
    for knots, name in ((2, "affine"), (3, "smooth")):
        if len(weight) < 3 * (3 if knots == 2 else knots * knots):
            break
        error, values = fit(knots)
        if error < FIELD_GAIN * best and np.ptp(values, axis=(1, 2)).max() > FIELD_SPAN:
            best, field, model = error, values, name
    return field, model


def register(
    pan: Tensor | NDArray[Any],
    ms: Tensor | NDArray[Any],
    *,
    sensor: str | Sensor = "default",
    ratio: Both | None = None,
    phase: Both | None = None,
    reach: float = REACH,
    valid: Tensor | NDArray[Any] | None = None,
) -> Registration:
    """Measure where each MS band lies against PAN.

    Args:
        pan: [B, 1, H, W] tensor or array of real numbers; NaN is no data.
        ms: [B, C, h, w], likewise.
        sensor: name or `Sensor`, for the MTF gains.
        ratio: PAN pixels per MS pixel; None is H / h and W / w.
        phase: PAN index of the first MS pixel's centre; None means aligned pixel areas, (ratio - 1) / 2.
        reach: MS pixels within which to look, up to 16.
        valid: [B, C, h, w] bool, where MS holds data; None is everywhere.

    Returns:
        The displacements; none where nothing trustworthy was found (model "none").

    Raises:
        ValueError: a shape, the ratio or reach is none of the above, or the sensor has another number of bands.
    """
    pan, ms = torch.as_tensor(pan), torch.as_tensor(ms)
    if pan.ndim != 4 or ms.ndim != 4 or pan.shape[1] != 1 or len(pan) != len(ms):
        raise ValueError(
            f"pan, ms: expected [B, 1, H, W] and [B, C, h, w], got {tuple(pan.shape)} and {tuple(ms.shape)}"
        )
    if ratio is None:
        ratio = (pan.shape[2] / max(ms.shape[2], 1), pan.shape[3] / max(ms.shape[3], 1))
    ratios, phases = both_ratios(ratio), default_phase(phase, ratio)
    gains = get_sensor(sensor).gains(ms.shape[1])
    pan_values, ms_values = pan.detach().cpu().float().numpy(), ms.detach().cpu().float().numpy()
    ms_valid = np.isfinite(ms_values)
    if valid is not None:
        ms_valid &= torch.as_tensor(valid).cpu().bool().expand(ms.shape).numpy()
    parts = [
        measure(Arrays(p, m, np.isfinite(p[0]), v, ratios, phases), gains, reach=reach)
        for p, m, v in zip(pan_values, ms_values, ms_valid, strict=True)
    ]
    return stack(parts)


def stack(parts: Sequence[Registration]) -> Registration:
    """One registration of a batch from those of its images."""
    models = {part.model for part in parts}
    field = None
    if any(part.field is not None for part in parts):
        knots = torch.linspace(0, 2, 3)
        field = torch.cat(
            [
                torch.zeros(1, 2, 3, 3, dtype=torch.float64) if p.field is None else p.at(knots, knots, (3, 3))
                for p in parts
            ]
        )
    values = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("d", "confidence", "measured", "spread")
    }
    return Registration(**values, field=field, model=models.pop() if len(models) == 1 else "constant")
