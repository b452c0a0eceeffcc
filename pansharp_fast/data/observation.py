"""How a sensor sees a scene: `ms_b = sample(mtf_b(move(x_b, d_b)), ratio, phase)`, and the way back.

All of it is linear and separable: an image is multiplied by a banded matrix along each axis (`ops.resample`), so that
blur, displacement and sampling are one step, exact at any fraction of a pixel, and gradients flow through the images.

Conventions. `ratio` is PAN pixels per MS pixel, any real number. `phase` is the PAN index of the first MS pixel's
centre: (ratio - 1) / 2 where pixel areas are aligned (GeoTIFF), ratio / 2 in PanCollection and toolbox files. `d` is
the displacement (dy, dx) of each band in PAN pixels, down and right positive: band b shows at p + d_b what PAN shows at
p. Ratio and phase are one number, or two for rows and columns. An image "in PAN's frame" shows things where PAN does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..reference.resample import Banded
from .grid import Both, both, both_ratios, default_phase
from .resample import TAPS, check_image, cubic

#: MS pixels that the interpolation kernel reaches to each side.
REACH = 11
#: Standard deviations at which the Gaussian of the MTF is cut off.
CUT = 4.5
_STAGES = 8


def mtf_sigma(gain: float, ratio: float) -> float:
    """Standard deviation, in PAN pixels, of the Gaussian whose response at MS's Nyquist frequency is `gain`.

    Raises:
        ValueError: `gain` is not between 0 and 1.
    """
    if not 0 < gain < 1:
        raise ValueError(f"gains: expected numbers between 0 and 1, got {gain}")
    return ratio / math.pi * math.sqrt(-2 * math.log(gain))


@functools.cache
def _table() -> np.ndarray:
    """The interpolation kernel from -REACH to REACH, 2**_STAGES values a pixel.

    The limit of doubling again and again by the 23 taps of `interp23`: at halves, quarters and eighths of a pixel it
    is exactly what `interp23` computes, and it is defined in between.
    """
    taps = np.zeros(4 * len(TAPS) - 1)
    middle = len(taps) // 2
    taps[middle] = 1
    for j, tap in enumerate(TAPS):
        taps[[middle - 2 * j - 1, middle + 2 * j + 1]] = tap
    kernel = np.ones(1)
    for _ in range(_STAGES):
        spread = np.zeros(2 * len(kernel) - 1)
        spread[::2] = kernel
        kernel = np.convolve(spread, taps)
    reach = REACH << _STAGES
    return np.pad(kernel, reach + 1)[len(kernel) // 2 + 1 :][: 2 * reach + 1]


def _interpolation(t: np.ndarray) -> np.ndarray:
    """The interpolation kernel at `t` source pixels from its centre."""
    place = (t * (1 << _STAGES) + (REACH << _STAGES)).clip(0, (REACH << _STAGES + 1) - 1e-6)
    left = place.astype(np.int64)
    part, table = place - left, _table()
    return table[left] * (1 - part) + table[left + 1] * part


def _cubic(t: np.ndarray) -> np.ndarray:
    return cubic(torch.from_numpy(t)).numpy()


def _kernel(sigma: float | str | None) -> tuple[int, Callable[[np.ndarray], np.ndarray]]:
    """Reach in pixels, and weight at a distance, of interpolation, of "cubic", or of a Gaussian of `sigma` pixels."""
    if sigma is None:
        return REACH, _interpolation
    if isinstance(sigma, str):
        return 2, _cubic
    return math.ceil(CUT * sigma), lambda t: np.exp(-0.5 * (t / sigma) ** 2)


def _band(
    count: int, start: float, step: float, length: int, sigma: float | str | None, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """First pixels [count] and weights [count, taps]: sample i weighs `length` pixels around start + i * step.

    Weights add up to 1, and there are `most` or `length` taps, whatever is less. Beyond its border an image repeats
    its last pixel; for "cubic" there is nothing.
    """
    reach, kernel = _kernel(sigma)
    position = start + step * np.arange(count)
    index = np.floor(position).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    weight = kernel(index - position[:, None])
    if sigma == "cubic":
        weight *= (index >= 0) & (index < length)
    weight /= weight.sum(1, keepdims=True)
    taps = min(most, length)
    first = index[:, 0].clip(0, length - taps)
    out, place = np.zeros((count, taps)), index.clip(0, length - 1) - first[:, None]
    np.put_along_axis(out, place, weight, 1)
    beyond = np.flatnonzero((index[:, 0] < 0) | (index[:, -1] >= length))  # several weights for a pixel of the border
    out[beyond] = 0
    np.add.at(out, (beyond[:, None], place[beyond]), weight[beyond])
    return first, out


@functools.lru_cache(maxsize=32)
def _banded(
    starts: tuple[tuple[float, ...], ...],
    sigmas: tuple[float | str | None, ...],
    count: int,
    step: float,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Banded:
    """The matrices along one axis for `ops.resample`; one for everything where all are the same.

    Args:
        starts: position of the first sample, for each image its bands'.
        sigmas: of the bands, as `_kernel` takes them.
        count, step, length: as `_band`.
        dtype, device: of the weights.
    """
    if len({*starts}) == len({*starts[0]}) == len({*sigmas}) == 1:
        starts, sigmas = ((starts[0][0],),), sigmas[:1]
    most = 2 * max(_kernel(sigma)[0] for sigma in sigmas)
    pairs = [pair for image in starts for pair in zip(image, sigmas, strict=True)]
    bands = [_band(count, place, step, length, sigma, most) for place, sigma in pairs]
    first, weight = (
        np.stack(part).reshape(len(starts), len(sigmas), *part[0].shape) for part in zip(*bands, strict=True)
    )
    return torch.from_numpy(first).to(device), torch.from_numpy(weight).to(device, dtype)


def _starts(d: Tensor | None, bands: int) -> np.ndarray:
    """Displacements as [B or 1, C, 2], rounded far below what can be seen, so that equal ones share a matrix."""
    if d is None:
        return np.zeros((1, bands, 2))
    values = d.detach().cpu().double().numpy().round(6)
    if values.ndim not in (2, 3) or values.shape[-2:] != (bands, 2):
        raise ValueError(f"d: expected [{bands}, 2] or [B, {bands}, 2], got {tuple(values.shape)}")
    return values.reshape(-1, bands, 2)


def _apply(
    x: Tensor, size: tuple[int, int], start: np.ndarray, step: tuple[float, float], sigma: np.ndarray | str | None
) -> Tensor:
    """[B,C,H,W] sampled at rows and columns start + i * step; start [B or 1, C, 2], sigma [C, 2] or as `_kernel`."""
    check_image("x", x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    axes = []
    for axis in (0, 1):
        starts = tuple(tuple(image[:, axis].tolist()) for image in start)
        sigmas = tuple(sigma[:, axis].tolist()) if isinstance(sigma, np.ndarray) else (sigma,) * x.shape[1]
        axes.append(_banded(starts, sigmas, size[axis], step[axis], x.shape[2 + axis], wide, x.device))
    return ops.resample(x, axes[0], axes[1])


def resample(x: Tensor, size: tuple[int, int], start: Tensor | None, step: Both) -> Tensor:
    """Interpolate [B,C,h,w] at rows and columns start + i * step of its own pixels.

    The kernel is that of `interp23` made continuous (B. Aiazzi et al., IEEE TGRS 2002); the border is repeated.

    Args:
        x: [B, C, h, w], floating point.
        size: rows and columns of the result.
        start: [C, 2] or [B, C, 2], position of the first sample in pixels of `x`; None is 0.
        step: pixels of `x` from one sample to the next.

    Returns:
        [B, C, *size], dtype of `x`. Differentiable in `x`.

    Raises:
        ValueError, TypeError: `x` is no image or `start` has another shape.
    """
    return _apply(x, size, _starts(start, x.shape[1]), both(step), None)


def move(x: Tensor, d: Tensor) -> Tensor:
    """Move each band's content by d [C, 2] or [B, C, 2] pixels: down and right where positive. Border repeated."""
    return resample(x, (x.shape[2], x.shape[3]), -d, 1.0)


def upsample(
    ms: Tensor,
    size: tuple[int, int],
    *,
    ratio: Both,
    phase: Both | None = None,
    d: Tensor | None = None,
    every: float = 1.0,
    first: Both = 0.0,
    gdal: bool = False,
) -> Tensor:
    """MS on PAN's grid and in PAN's frame: at p stands what band b shows at p + d_b. One interpolation.

    Args:
        ms: [B, C, h, w], floating point.
        size: rows and columns of the result.
        ratio, phase: of the grids, see the module; phase None means aligned pixel areas.
        d: [C, 2] or [B, C, 2] displacements in PAN pixels; None is none.
        every: PAN pixels from one sample to the next.
        first: PAN row and column of the first sample.
        gdal: by GDAL's cubic kernel (R. Keys, IEEE TASSP 1981, a = -0.5) instead; beyond the border there is nothing.

    Returns:
        [B, C, *size], dtype of `ms`. Differentiable in `ms`.

    Raises:
        ValueError, TypeError: a shape, the ratio or the dtype is none of the above.
    """
    ratios, phases, firsts = both_ratios(ratio), default_phase(phase, ratio), both(first)
    start = (_starts(d, ms.shape[1]) + np.subtract(firsts, phases)) / ratios
    return _apply(ms, size, start, (every / ratios[0], every / ratios[1]), "cubic" if gdal else None)


def observe(
    x: Tensor,
    size: tuple[int, int],
    *,
    gains: Sequence[float],
    ratio: Both,
    phase: Both | None = None,
    d: Tensor | None = None,
    every: float | None = None,
) -> Tensor:
    """What the sensor would see of `x`, an image in PAN's frame: each band moved, blurred by its MTF and sampled.

    Args:
        x: [B, C, H, W], floating point.
        size: rows and columns of the result.
        gains: MTF at MS's Nyquist frequency, one a band (a Gaussian; normalised, where the toolbox's sums to .999).
        ratio, phase, d: as `upsample`.
        every: PAN pixels from one sample to the next; None is the ratio.

    Returns:
        [B, C, *size], dtype of `x`. Differentiable in `x`.

    Raises:
        ValueError, TypeError: a shape, the ratio, a gain or the dtype is none of the above.
    """
    ratios, phases, bands = both_ratios(ratio), default_phase(phase, ratio), x.shape[1]
    if len(gains) != bands:
        raise ValueError(f"gains: expected {bands}, got {len(gains)}")
    sigma = np.array([[mtf_sigma(gain, value) for value in ratios] for gain in gains])
    start = np.array(phases) - _starts(d, bands)
    return _apply(x, size, start, ratios if every is None else (every, every), sigma)


def blur(x: Tensor, sigma: float) -> Tensor:
    """[B,C,H,W] through a Gaussian of `sigma` pixels, border repeated."""
    widths = np.full((x.shape[1], 2), float(sigma))
    return _apply(x, (x.shape[2], x.shape[3]), np.zeros((1, x.shape[1], 2)), (1.0, 1.0), widths)


#: `back_projection="auto"`: steps, and the Gaussian (in MS pixels) through which the residual goes. Full steps lay
#: mottle and coloured halos on real images, whose MTF, noise and local displacement are never known exactly.
AUTO_STEPS, AUTO_BLUR = 2, 0.5
#: Share of an image whose residual counts as noise, and the Gaussian (in MS pixels) over which its energy is taken.
QUIET, QUIET_WINDOW = 0.2, 2.0


def energy(residual: Tensor) -> Tensor:
    """Local mean square of a residual [B, C, h, w]."""
    return blur(residual**2, QUIET_WINDOW)


def noise_floor(residual: Tensor, usable: Tensor | None = None) -> Tensor:
    """[B, C, 1, 1]: energy that the QUIET share of the usable pixels stays below; 0 where none is usable."""
    values = energy(residual).detach()
    if usable is not None:
        values = torch.where(usable, values, torch.nan)
    ordered = values.flatten(2).sort(2).values  # NaN last
    count = (~ordered.isnan()).sum(2, keepdim=True)
    place = (QUIET * (count - 1)).long().clamp_min(0)
    return ordered.gather(2, place).nan_to_num(0.0)[..., None]


def soften(residual: Tensor, floor: Tensor) -> Tensor:
    """A residual less what noise makes of it (Wiener's weight, 1 - floor / local energy), blurred."""
    weight = (1 - floor / energy(residual).clamp_min(torch.finfo(residual.dtype).tiny)).clamp(0, 1)
    return blur(residual * weight, AUTO_BLUR)


def hold_chroma(x: Tensor, start: Tensor, up: Tensor, ratio: Both) -> Tensor:
    """`x` with each band's distance from the mean of bands held within what `up` has near, or `start` has there.

    Args:
        x: [B, C, H, W].
        start: [B, C, H, W], the image before it was changed.
        up: [B, C, H, W], MS on that grid; one MS pixel around counts as near.
        ratio: PAN pixels per MS pixel.
    """
    rows, columns = both(ratio)
    return ops.hold_chroma(x, start, up, (round(rows), round(columns)))


def back_project(
    x: Tensor,
    ms: Tensor,
    *,
    gains: Sequence[float],
    ratio: Both,
    phase: Both | None = None,
    d: Tensor | None = None,
    steps: int | str = "auto",
) -> Tensor:
    """Bring `x` closer to MS: `x += upsample(ms - observe(x))`, step by step.

    M. Irani and S. Peleg, "Improving resolution by image registration", CVGIP 1991.

    Args:
        x: [B, C, H, W] in PAN's frame, floating point.
        ms: [B, C, h, w].
        gains, ratio, phase, d: as `observe`.
        steps: how often in full; "auto" is `AUTO_STEPS`, where noise is left alone (`soften`) and colours stay within
            those of MS (`hold_chroma`); 0 returns `x`.

    Returns:
        [B, C, H, W], dtype of `x`. Differentiable.

    Raises:
        ValueError, TypeError: as `observe`, or steps is none of the above.
    """
    soft = steps == "auto"
    count = AUTO_STEPS if steps == "auto" else steps
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"back_projection: expected auto or a number from 0, got {steps!r}")
    small, large, start = (ms.shape[2], ms.shape[3]), (x.shape[2], x.shape[3]), x
    for _ in range(count):
        residual = ms.to(x.dtype) - observe(x, small, gains=gains, ratio=ratio, phase=phase, d=d)
        if soft:
            residual = soften(residual, noise_floor(residual))
        x = x + upsample(residual, large, ratio=ratio, phase=phase, d=d)
    return hold_chroma(x, start, upsample(ms.to(x.dtype), large, ratio=ratio, phase=phase, d=d), ratio) if soft else x
