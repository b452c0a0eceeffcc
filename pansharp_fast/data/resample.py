"""Interpolation and reduction of images as the field's toolbox does them: `interp23`, MATLAB's `imresize`, `lpan`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Odd taps of the 23-tap polynomial kernel, centre outwards, times 2 (the even ones are 0, the centre is 1).
# B. Aiazzi et al., "Context-driven fusion of high spatial and spectral resolution images based on oversampled
# multiresolution analysis", IEEE TGRS 2002.
TAPS = tuple(
    2 * tap
    for tap in (0.305334091185, -0.072698593239, 0.021809577942, -0.005192756653, 0.000807762146, -0.000060081482)
)


def check_image(name: str, x: torch.Tensor) -> None:
    """Raise unless `x` is a floating-point tensor [B, C, H, W]."""
    if x.ndim != 4:
        raise ValueError(f"{name}: expected [B, C, H, W], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_ratio(ratio: int) -> None:
    """Raise unless `ratio` is a power of two above 1."""
    if ratio < 2 or ratio & (ratio - 1):
        raise ValueError(f"ratio: expected a power of two above 1, got {ratio}")


def check_whole_ratio(ratio: int) -> None:
    """Raise unless `ratio` is a whole number above 1."""
    if ratio < 2 or ratio != int(ratio):
        raise ValueError(f"ratio: expected a whole number above 1, got {ratio}")


def _double(x: torch.Tensor, dim: int, first: bool) -> torch.Tensor:
    """Twice the samples along `dim`: old ones at odd positions (first stage) or even ones, circular border."""
    n, reach = x.shape[dim], len(TAPS)
    wrapped = x.index_select(dim, torch.arange(-reach, n + reach, device=x.device) % n)
    # The new sample lies between old ones k-1 and k in the first stage, k and k+1 in later ones.
    left = reach - 1 if first else reach
    between = torch.zeros_like(x)
    for j, tap in enumerate(TAPS):
        between = between + tap * (wrapped.narrow(dim, left - j, n) + wrapped.narrow(dim, left + 1 + j, n))
    pair = (between, x) if first else (x, between)
    return torch.stack(pair, dim + 1).flatten(dim, dim + 1)


def interp23(x: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Upsample by the 23-tap polynomial kernel, the field's EXP image and PanCollection's `lms`.

    log2(ratio) doublings with circular borders; sample k lands at index ratio*k + ratio/2. Equals the DLPan toolbox's
    `interp23tap`, which is right for ratios 2 and 4 alone. Differentiable.

    Args:
        x: [B, C, H, W], floating point.
        ratio: a power of two above 1.

    Returns:
        [B, C, ratio*H, ratio*W], dtype of `x`.

    Raises:
        ValueError, TypeError: shape, ratio or dtype is none of the above.
    """
    check_image("x", x)
    check_ratio(ratio)
    for stage in range(ratio.bit_length() - 1):
        x = _double(_double(x, 2, stage == 0), 3, stage == 0)
    return x


def cubic(t: torch.Tensor) -> torch.Tensor:
    """Keys' cubic kernel, a = -0.5."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t**2 + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, torch.where(t <= 2, far, torch.zeros_like(t)))


def _resize_dim(x: torch.Tensor, dim: int, scale: float, antialias: bool) -> torch.Tensor:
    n, shrink = x.shape[dim], min(scale, 1.0) if antialias else 1.0
    width = 4 / shrink
    # MATLAB's grid: pixel centres at integers counted from 1, both images spanning the same extent.
    centre = torch.arange(1, math.ceil(scale * n) + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
    index = (centre - width / 2).floor()[:, None] + torch.arange(math.ceil(width) + 2)
    weight = cubic(shrink * (centre[:, None] - index))
    weight = weight / weight.sum(1, keepdim=True)
    used = weight.any(0).nonzero().flatten().tolist()
    weight = weight.to(x)
    index = (index.long() - 1) % (2 * n)
    index = torch.minimum(index, 2 * n - 1 - index).to(x.device)  # mirror with the edge repeated
    shape = [1] * x.ndim
    shape[dim] = -1
    # Tap by tap: no temporary is larger than the result.
    return sum((x.index_select(dim, index[:, p]) * weight[:, p].view(shape) for p in used), x.new_zeros(()))


def imresize(x: torch.Tensor, scale: float, antialias: bool = True) -> torch.Tensor:
    """Bicubic resizing that equals MATLAB's `imresize`: widened kernel for reductions, mirrored borders.

    Differentiable.

    Args:
        x: [B, C, H, W], floating point.
        scale: factor of both sides, above 0 (0.25 reduces four times); sizes are rounded up.
        antialias: widen the kernel when reducing, as MATLAB does by default.

    Returns:
        [B, C, ceil(scale*H), ceil(scale*W)], dtype of `x`.

    Raises:
        ValueError, TypeError: shape, scale or dtype is none of the above.
    """
    check_image("x", x)
    if not scale > 0:
        raise ValueError(f"scale: expected a number above 0, got {scale}")
    return _resize_dim(_resize_dim(x, 2, scale, antialias), 3, scale, antialias)


def lpan(pan: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """PAN reduced to the MS grid, PanCollection's `lpan`: Gaussian (sigma 1.98 pixels, 41 taps), then every 4th pixel.

    Replicate borders, samples at 2, 6, 10, ... For other ratios sigma grows in proportion. Differentiable.

    Args:
        pan: [B, C, H, W], floating point.
        ratio: a power of two above 1.

    Returns:
        [B, C, H/ratio, W/ratio], dtype of `pan`.

    Raises:
        ValueError, TypeError: shape, ratio or dtype is none of the above, or ratio does not divide a side.
    """
    check_image("pan", pan)
    check_ratio(ratio)
    height, width = pan.shape[-2:]
    if height % ratio or width % ratio:
        raise ValueError(f"pan: expected sides divisible by {ratio}, got {height} x {width}")
    half = 5 * ratio
    offset = torch.arange(-half, half + 1, dtype=torch.float64)
    taps = torch.exp(-(offset**2) / (2 * (0.495 * ratio) ** 2))
    taps = (taps / taps.sum()).to(pan)
    out = pan.flatten(0, 1).unsqueeze(1)
    for dim, kernel in ((2, taps.view(1, 1, -1, 1)), (3, taps.view(1, 1, 1, -1))):
        n = out.shape[dim]
        # Output i is centred on input ratio*i + ratio/2.
        first = ratio // 2 - half
        reach = torch.arange(first, first + ratio * (n // ratio - 1) + 2 * half + 1, device=out.device)
        padded = out.index_select(dim, reach.clamp(0, n - 1))
        out = F.conv2d(padded, kernel, stride=(ratio, 1) if dim == 2 else (1, ratio))
    return out.view(*pan.shape[:2], height // ratio, width // ratio)


def shift(x: torch.Tensor, dy: float, dx: float) -> torch.Tensor:
    """Move an image's content by fractions of a pixel: down by `dy`, right by `dx`.

    A phase ramp in the Fourier domain of the image mirrored at its borders: nothing below Nyquist is damped, and what
    moves in from outside is the mirror image. Whole pixels are exact. Differentiable.

    Args:
        x: [B, C, H, W], floating point.
        dy, dx: pixels.

    Returns:
        [B, C, H, W], dtype of `x`.

    Raises:
        ValueError, TypeError: shape or dtype is none of the above.
    """
    check_image("x", x)
    for dim, distance in ((2, dy), (3, dx)):
        n = x.shape[dim]
        mirrored = torch.cat([x, x.flip(dim)], dim)
        angle = -2 * torch.pi * distance * torch.fft.rfftfreq(2 * n, dtype=torch.float64)
        ramp = torch.polar(torch.ones_like(angle), angle)
        ramp.imag[n] = 0  # a real wave at Nyquist has no phase to move
        spectrum = torch.fft.rfft(mirrored, dim=dim)
        view = [1] * x.ndim
        view[dim] = -1
        x = torch.fft.irfft(spectrum * ramp.view(view).to(spectrum), n=2 * n, dim=dim).narrow(dim, 0, n)
    return x
