"""Full resolution: quality of a fused image where no ground truth exists.

Every function takes [B, C, H, W] in digital numbers, NumPy arrays or tensors on any device and of any dtype, computes
in float64 and returns one value per image, [B]. A NaN pixel, or a block that is flat in two images compared, makes an
image's value NaN.

As the textbook has them (DLPan toolbox; G. Vivone et al., IEEE GRSM 2021; blocks of 32 x 32 pixels, exponents 1), the
measures bring MS to the fused image's size by `interp23`, whose pixels lie at phase ratio / 2, and know of no
displacement between PAN and MS: they reward an image that keeps the misfit. With `phase` or `d` given they are
*registered*: `fused` then shows things where PAN does, and is compared with MS through the model of observation
(`data.observation`), so that any real ratio from 1.5 to 16 will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..data import Sensor, get_sensor, imresize, interp23, mtf_filter
from ..data.grid import Both, both
from ..data.observation import observe, upsample
from ._common import BLOCK, block_uqi, displacement, takes_arrays
from .reduced import q2n

Bands = Sequence[int | str] | None


def _check(fused: torch.Tensor, ms: torch.Tensor) -> None:
    if fused.ndim != 4 or ms.ndim != 4 or fused.shape[:2] != ms.shape[:2]:
        raise ValueError(f"fused, ms: expected [B, C, H, W] of equal B, C, got {tuple(fused.shape)}, {tuple(ms.shape)}")


def _expand(fused: torch.Tensor, ms: torch.Tensor, ratio: Both) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused image and MS at its size as the textbook has it, both in float64."""
    _check(fused, ms)
    height, width = fused.shape[-2:]
    if height % BLOCK or width % BLOCK or not height * width:
        raise ValueError(f"fused: expected sides that are multiples of {BLOCK}, got {height} x {width}")
    if ms.shape != fused.shape:
        number = _integer(ratio)
        if (ms.shape[-2] * number, ms.shape[-1] * number) != (height, width):
            raise ValueError(f"ms: expected {height}/{ratio} x {width}/{ratio} pixels, got {tuple(ms.shape[-2:])}")
        ms = interp23(ms.double(), number)
    return fused.double(), ms.double()


def _integer(ratio: Both) -> int:
    rows, columns = both(ratio)
    if rows != columns or rows != int(rows):
        raise ValueError(f"ratio: expected one whole number for measures without phase and d, got {ratio}")
    return int(rows)


def _gains(sensor: str | Sensor, bands: Bands, count: int) -> tuple[Sensor, tuple[float, ...]]:
    chosen = get_sensor(sensor) if bands is None else get_sensor(sensor).select(bands)
    return chosen, chosen.gains(count)


@takes_arrays
def d_lambda_k(
    fused: torch.Tensor,
    ms: torch.Tensor,
    sensor: str | Sensor,
    ratio: Both = 4,
    *,
    phase: Both | None = None,
    d: Any = None,
    bands: Bands = None,
    cut: int = 0,
) -> torch.Tensor:
    """Spectral distortion of Khan: 1 - Q2n between the upsampled MS and the fused image blurred by the sensor's MTF.

    M. M. Khan et al., "Pansharpening quality assessment using the modulation transfer functions of instruments", IEEE
    TGRS 2009. Registered, both lie in MS's frame: the fused image is moved there, MS is upsampled at its own phase.

    Args:
        fused: [B, C, H, W].
        ms: [B, C, h, w], the original MS image, or (without `phase` and `d`) that image upsampled.
        sensor: name or `Sensor`, for the gains of its MTF.
        ratio: PAN pixels per MS pixel.
        phase: PAN index of the first MS pixel's centre, one number or (row, column); None is ratio / 2.
        d: displacement of the bands against PAN in PAN pixels, [C, 2] or [B, C, 2]; None is none.
        bands: the sensor's bands that the images hold, by name or by number from 1; None is all.
        cut: border pixels left out after the blur, where displaced bands have seen no data; registered alone.

    Raises:
        ValueError: shapes do not fit each other, sides are no multiples of 32 (textbook) or under 16 (registered), or
            the sensor has another band count.
    """
    _check(fused, ms)
    chosen, gains = _gains(sensor, bands, fused.shape[1])
    if phase is None and d is None:
        fused, ms = _expand(fused, ms, ratio)
        return 1 - q2n(mtf_filter(fused, chosen, _integer(ratio)), ms)
    phase = default(phase, ratio)
    size = (fused.shape[2], fused.shape[3])
    blurred = observe(fused.double(), size, gains=gains, ratio=ratio, phase=0, d=displacement(d), every=1)
    keep = slice(cut, -cut) if cut else slice(None)
    return 1 - q2n(blurred[..., keep, keep], upsample(ms.double(), size, ratio=ratio, phase=phase)[..., keep, keep])


def default(phase: Both | None, ratio: Both) -> Both:
    """`phase`, by default that of PanCollection and toolbox files, ratio / 2."""
    rows, columns = both(ratio)
    return (rows / 2, columns / 2) if phase is None else phase


@takes_arrays
def d_s(
    fused: torch.Tensor,
    ms: torch.Tensor,
    pan: torch.Tensor,
    ratio: Both = 4,
    *,
    phase: Both | None = None,
    d: Any = None,
) -> torch.Tensor:
    """Spatial distortion of the QNR protocol: mean over bands of |UQI(fused_b, pan) - UQI(ms_b, low-pass pan)|.

    L. Alparone et al., "Multispectral and panchromatic data fusion assessment without reference", PE&RS 2008. The
    low-pass PAN is `pan` reduced by `imresize` and brought back by `interp23`, half a pixel off where the ratio is
    even. Registered, MS is upsampled into PAN's frame, and PAN's low-pass image lies where PAN does.

    Args:
        fused: [B, C, H, W].
        ms: [B, C, h, w], the original MS image, or (without `phase` and `d`) that image upsampled.
        pan: [B, 1, H, W].
        ratio: PAN pixels per MS pixel.
        phase, d: as in `d_lambda_k`.

    Raises:
        ValueError: shapes do not fit each other, or sides are no multiples of 32.
    """
    _check(fused, ms)
    if pan.shape != (fused.shape[0], 1, *fused.shape[-2:]):
        raise ValueError(f"pan: expected {(fused.shape[0], 1, *fused.shape[-2:])}, got {tuple(pan.shape)}")
    pan = pan.double()
    if phase is None and d is None:
        fused, ms = _expand(fused, ms, ratio)
        low = interp23(imresize(pan, 1 / _integer(ratio)), _integer(ratio))
    else:
        size = (fused.shape[2], fused.shape[3])
        ms = upsample(ms.double(), size, ratio=ratio, phase=default(phase, ratio), d=displacement(d))
        fused, ms = _expand(fused, ms, ratio)
        rows, columns = both(ratio)
        small = (int(size[0] / rows), int(size[1] / columns))
        gains = (0.3,)  # about what imresize leaves
        low = upsample(observe(pan, small, gains=gains, ratio=ratio), size, ratio=ratio)
    return (block_uqi(fused, pan) - block_uqi(ms, low)).abs().mean((1, 2))


@takes_arrays
def d_lambda(fused: torch.Tensor, ms: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Spectral distortion of the original QNR: mean over band pairs of |UQI(fused_i, fused_j) - UQI(ms_i, ms_j)|.

    L. Alparone et al., PE&RS 2008. Not the papers' D_lambda, which is `d_lambda_k`. NaN for a single band.

    Args:
        fused: [B, C, H, W].
        ms: [B, C, h, w], or upsampled.
        ratio: PAN pixels per MS pixel.

    Raises:
        ValueError: shapes do not fit each other, or sides are no multiples of 32.
    """
    fused, ms = _expand(fused, ms, ratio)
    first, second = torch.triu_indices(fused.shape[1], fused.shape[1], 1, device=fused.device)
    return (block_uqi(fused, fused) - block_uqi(ms, ms)).abs()[:, first, second].mean(1)


@takes_arrays
def hqnr(
    fused: torch.Tensor,
    ms: torch.Tensor,
    pan: torch.Tensor,
    sensor: str | Sensor,
    ratio: Both = 4,
    *,
    phase: Both | None = None,
    d: Any = None,
    bands: Bands = None,
) -> torch.Tensor:
    """Hybrid quality with no reference, (1 - D_lambda_K)(1 - D_s): the papers' column.

    B. Aiazzi et al., "Full-scale assessment of pansharpening methods and data products", SPIE 2014. Arguments as in
    `d_lambda_k` and `d_s`.

    Raises:
        ValueError: as `d_lambda_k` and `d_s`.
    """
    spectral = d_lambda_k(fused, ms, sensor, ratio, phase=phase, d=d, bands=bands)
    return (1 - spectral) * (1 - d_s(fused, ms, pan, ratio, phase=phase, d=d))


@takes_arrays
def qnr(fused: torch.Tensor, ms: torch.Tensor, pan: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Quality with no reference, (1 - D_lambda)(1 - D_s). L. Alparone et al., PE&RS 2008.

    Raises:
        ValueError: as `d_lambda` and `d_s`.
    """
    return (1 - d_lambda(fused, ms, ratio)) * (1 - d_s(fused, ms, pan, ratio))


@takes_arrays
def consistency(
    fused: torch.Tensor,
    ms: torch.Tensor,
    sensor: str | Sensor,
    ratio: Both = 4,
    *,
    phase: Both | None = None,
    d: Any = None,
    bands: Bands = None,
    cut: int = 0,
) -> torch.Tensor:
    """What is left of ms - A(fused), A being the model of observation: root mean square over MS's standard deviation.

    The mean over bands; 0 is an image that holds all that MS shows.

    Args:
        fused: [B, C, H, W] in PAN's frame.
        ms: [B, C, h, w].
        sensor, ratio, phase, d, bands: as in `d_lambda_k`.
        cut: border pixels of MS left out: A repeats the border of `fused`, where MS saw what lies beyond.

    Raises:
        ValueError: shapes do not fit each other, the sensor has another band count, or nothing is left.
    """
    _check(fused, ms)
    _, gains = _gains(sensor, bands, fused.shape[1])
    size = (ms.shape[2], ms.shape[3])
    if cut < 0 or min(size) <= 2 * cut:
        raise ValueError(f"cut: expected 0 or more that leaves something of {size[0]} x {size[1]} pixels, got {cut}")
    seen = observe(fused.double(), size, gains=gains, ratio=ratio, phase=default(phase, ratio), d=displacement(d))
    keep = slice(cut, -cut) if cut else slice(None)
    residual = (ms.double() - seen)[..., keep, keep]
    spread = ms.double()[..., keep, keep].std((2, 3), unbiased=False)
    return (residual.square().mean((2, 3)).sqrt() / spread).mean(1)
