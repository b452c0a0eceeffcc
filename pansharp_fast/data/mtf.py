"""Filters matched to a sensor's modulation transfer function (MTF), and the Wald protocol built on them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch

from .resample import check_image, check_whole_ratio, imresize
from .sensors import Sensor, get_sensor

_SIZE = 41


@functools.cache
def _kernel(gain: float, ratio: int) -> np.ndarray:
    half = (_SIZE - 1) // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    alpha = math.sqrt((half / ratio) ** 2 / (-2 * math.log(gain)))
    response = np.exp(-(x**2 + y**2) / (2 * alpha**2))
    # Frequency sampling; then a 1-D Kaiser window turned about the centre (beta 0.5, zero outside the circle).
    kernel = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(response)).real)
    radius = np.hypot(x, y) / half
    window = np.interp(radius, np.linspace(-1, 1, _SIZE), np.kaiser(_SIZE, 0.5), right=0.0)
    return kernel * window


def mtf_kernel(gains: Sequence[float], ratio: int = 4) -> torch.Tensor:
    """Gaussian-like low-pass kernels whose response at the Nyquist frequency of the coarse grid is `gains`.

    B. Aiazzi et al., "MTF-tailored multiscale fusion of high-resolution MS and PAN imagery", PE&RS 2006, by the DLPan
    toolbox's `genMTF`: 41 x 41 frequency samples, Kaiser window, not normalised (the sum is about 0.999).

    Args:
        gains: amplitudes in (0, 1), one per band.
        ratio: a whole number above 1.

    Returns:
        [bands, 41, 41], float64.

    Raises:
        ValueError: a gain or the ratio is out of range.
    """
    check_whole_ratio(ratio)
    if not all(0 < gain < 1 for gain in gains):
        raise ValueError(f"gains: expected numbers between 0 and 1, got {tuple(gains)}")
    return torch.from_numpy(np.stack([_kernel(float(gain), ratio) for gain in gains]))


def mtf_filter(x: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4, pan: bool = False) -> torch.Tensor:
    """Blur an image as the sensor would at a resolution `ratio` times coarser; replicate borders, same size.

    Equals the DLPan toolbox's `MTF` (`MTF_PAN` with `pan`). Differentiable. Computed through a Fourier transform:
    one NaN makes its whole band NaN.

    Args:
        x: [B, C, H, W], floating point.
        sensor: name or `Sensor`; its gains must fit C bands.
        ratio: a whole number above 1.
        pan: use the PAN gain for every band.

    Returns:
        [B, C, H, W], dtype of `x`.

    Raises:
        ValueError, TypeError: shape, sensor, band count, ratio or dtype is none of the above.
    """
    check_image("x", x)
    sensor = get_sensor(sensor)
    gains = (sensor.mtf_pan,) * x.shape[1] if pan else sensor.gains(x.shape[1])
    kernel = mtf_kernel(gains, ratio)
    half, (height, width) = _SIZE // 2, x.shape[-2:]
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    for dim in (2, 3):
        n = wide.shape[dim]
        wide = wide.index_select(dim, torch.arange(-half, n + half, device=x.device).clamp(0, n - 1))
    size = wide.shape[-2:]
    # The kernel is symmetric: correlation and convolution are one.
    response = torch.fft.rfft2(kernel.to(wide), s=size)
    blurred = torch.fft.irfft2(torch.fft.rfft2(wide) * response, s=size)
    return blurred[..., 2 * half : 2 * half + height, 2 * half : 2 * half + width].to(x.dtype)


def decimate(x: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Every `ratio`-th pixel from `ratio // 2` on, the grid that `interp23` starts from: [B, C, H/ratio, W/ratio].

    Raises:
        ValueError: `ratio` is no whole number above 1 or does not divide a side.
    """
    check_whole_ratio(ratio)
    height, width = x.shape[-2:]
    if height % ratio or width % ratio:
        raise ValueError(f"x: expected sides divisible by {ratio}, got {height} x {width}")
    return x[..., ratio // 2 :: ratio, ratio // 2 :: ratio]


def degrade(
    ms: torch.Tensor, pan: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4, pan_filter: str = "imresize"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce a pair by the Wald protocol, so that the original MS can serve as ground truth.

    L. Wald et al., PE&RS 1997, as the DLPan toolbox's `resize_images`: MS through the MTF filter, then every
    `ratio`-th pixel; PAN by antialiased bicubic `imresize`. Differentiable.

    Args:
        ms: [B, C, h, w], floating point.
        pan: [B, 1, H, W], floating point; its own size, usually `ratio` times that of `ms`.
        sensor: name or `Sensor`; its gains must fit C bands.
        ratio: a whole number above 1 that divides every side.
        pan_filter: "imresize", or "mtf" for the MTF filter of PAN and every `ratio`-th pixel.

    Returns:
        ([B, C, h/ratio, w/ratio], [B, 1, H/ratio, W/ratio]).

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """
    check_image("pan", pan)
    reduced = decimate(mtf_filter(ms, sensor, ratio), ratio)
    if pan_filter == "mtf":
        return reduced, decimate(mtf_filter(pan, sensor, ratio, pan=True), ratio)
    if pan_filter != "imresize":
        raise ValueError(f"pan_filter: expected imresize or mtf, got {pan_filter!r}")
    if pan.shape[-2] % ratio or pan.shape[-1] % ratio:
        raise ValueError(f"pan: expected sides divisible by {ratio}, got {pan.shape[-2]} x {pan.shape[-1]}")
    return reduced, imresize(pan, 1 / ratio)
