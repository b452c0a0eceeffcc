"""Classical pan-sharpening to compare with: each a function of one pair, named in `BASELINES`.

All take `pan` [B, 1, ratio*h, ratio*w] and `ms` [B, C, h, w], floating point, in digital numbers (or any linear scale),
and return [B, C, ratio*h, ratio*w] in the dtype of `ms`; they compute in float64. MS is upsampled by `interp23`. Means,
variances and regressions are taken over each whole image, so results depend on its extent. Shapes that do not fit raise
ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .data import Sensor, decimate, get_sensor, interp23, mtf_filter
from .data.resample import check_image


def _prepare(pan: torch.Tensor, ms: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PAN, MS and upsampled MS, all float64."""
    check_image("pan", pan)
    check_image("ms", ms)
    batch, _, height, width = ms.shape
    if pan.shape != (batch, 1, height * ratio, width * ratio):
        raise ValueError(f"pan: expected {(batch, 1, height * ratio, width * ratio)}, got {tuple(pan.shape)}")
    ms = ms.double()
    return pan.double(), ms, interp23(ms, ratio)


def _quotient(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, and 1 (no detail) where the denominator is not above 0."""
    used = ~(denominator <= 0)
    return torch.where(used, numerator / torch.where(used, denominator, 1), 1)


def _modulation(detailed: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """detailed / low within 0 and 5: both may approach 0 in dark bands, and no real detail is that strong."""
    return _quotient(detailed, low).clamp(0, 5)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)


def _match(pan: torch.Tensor, low: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PAN with the mean of `target` and its standard deviation as far as the low-pass PAN `low` carries it."""
    spread = low.std((2, 3), keepdim=True)
    gain = torch.where(spread > 0, target.std((2, 3), keepdim=True) / torch.where(spread > 0, spread, 1), 0)
    return (pan - _mean(pan)) * gain + _mean(target)


def _regress(bands: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares weights [B, C, 1, 1] and offset [B, 1, 1, 1] of `bands` [B, C, h, w] for `target` [B, 1, h, w]."""
    x, y = (bands - _mean(bands)).flatten(2), (target - _mean(target)).flatten(2)
    gram = x @ x.transpose(1, 2)
    # Flat or repeated bands leave the solution open: the pseudo-inverse takes the smallest weights. It cannot take NaN,
    # which reaches the weights through the second factor.
    weights = (torch.linalg.pinv(gram.nan_to_num(), hermitian=True) @ (x @ y.transpose(1, 2)))[..., None]
    return weights, _mean(target) - (weights * _mean(bands)).sum(1, keepdim=True)


def exp(pan: torch.Tensor, ms: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4) -> torch.Tensor:
    """Upsampled MS (`interp23`) without any detail of PAN, the field's EXP."""
    return _prepare(pan, ms, ratio)[2].to(ms.dtype)


def brovey(
    pan: torch.Tensor,
    ms: torch.Tensor,
    sensor: str | Sensor = "default",
    ratio: int = 4,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Weighted Brovey, as GDAL's pansharpening: ms_b * pan / sum_b(w_b * ms_b). Weights are 1/C unless given.

    PAN is taken as it is: its scale must be that of the weighted sum. Where that sum is not above 0, MS stays.
    """
    pan, _, expanded = _prepare(pan, ms, ratio)
    bands = expanded.shape[1]
    if weights is not None and len(weights) != bands:
        raise ValueError(f"weights: expected {bands}, got {len(weights)}")
    w = expanded.new_tensor([1 / bands] * bands if weights is None else weights).view(-1, 1, 1)
    return (expanded * _quotient(pan, (w * expanded).sum(1, keepdim=True))).to(ms.dtype)


def _low_pan(pan: torch.Tensor, sensor: str | Sensor, ratio: int) -> torch.Tensor:
    return decimate(mtf_filter(pan, get_sensor(sensor), ratio, pan=True), ratio)


def gsa(pan: torch.Tensor, ms: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4) -> torch.Tensor:
    """Adaptive Gram-Schmidt: the intensity is the regression of the low-pass PAN on the MS bands.

    B. Aiazzi et al., "Improving component substitution pansharpening through multivariate regression of MS+Pan data",
    IEEE TGRS 2007.
    """
    pan, original, expanded = _prepare(pan, ms, ratio)
    weights, _ = _regress(original, _low_pan(pan, sensor, ratio))
    centred = expanded - _mean(expanded)
    intensity = (weights * centred).sum(1, keepdim=True)
    variance = _mean(intensity**2)
    gain = torch.where(variance > 0, _mean(intensity * centred) / torch.where(variance > 0, variance, 1), 0)
    return (expanded + gain * (pan - _mean(pan) - intensity)).to(ms.dtype)


def mtf_glp_hpm(pan: torch.Tensor, ms: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4) -> torch.Tensor:
    """Generalised Laplacian pyramid with MTF-matched filters and high-pass modulation: ms_b * pan_b / lowpass(pan_b).

    B. Aiazzi et al., "MTF-tailored multiscale fusion of high-resolution MS and PAN imagery", PE&RS 2006; G. Vivone et
    al., "Contrast and error-based fusion schemes for multispectral image pansharpening", IEEE GRSL 2014. Keeps the
    toolbox's unnormalised filter, which brightens by about 0.1 %.
    """
    pan, _, expanded = _prepare(pan, ms, ratio)
    matched = _match(pan, mtf_filter(pan, get_sensor(sensor), ratio, pan=True), expanded)
    low = interp23(decimate(mtf_filter(matched, sensor, ratio), ratio), ratio)
    return (expanded * _modulation(matched, low)).to(ms.dtype)


def bt_h(pan: torch.Tensor, ms: torch.Tensor, sensor: str | Sensor = "default", ratio: int = 4) -> torch.Tensor:
    """Brovey with haze correction: each band's smallest value is path radiance and takes no part in the modulation.

    S. Lolli et al., "Haze correction for contrast-based multispectral pansharpening", IEEE GRSL 2017.
    """
    pan, original, expanded = _prepare(pan, ms, ratio)
    low = _low_pan(pan, sensor, ratio)
    weights, offset = _regress(original, low)
    intensity = (weights * expanded).sum(1, keepdim=True) + offset
    haze = original.amin((2, 3), keepdim=True)
    haze_pan = (weights * haze).sum(1, keepdim=True) + offset
    matched = _match(pan, low, intensity)
    return ((expanded - haze) * _modulation(matched - haze_pan, intensity - haze_pan) + haze).to(ms.dtype)


#: Name -> function(pan, ms, sensor="default", ratio=4).
BASELINES: dict[str, Callable[..., torch.Tensor]] = {
    "EXP": exp,
    "Brovey": brovey,
    "GSA": gsa,
    "MTF-GLP-HPM": mtf_glp_hpm,
    "BT-H": bt_h,
}
