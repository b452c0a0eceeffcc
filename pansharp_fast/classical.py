"""Classical pan-sharpening: the formulas of seven methods, once, for whole images, tiles of scenes and `baselines`.

A method is a function of one piece of a scene (PAN, MS on PAN's grid, PAN at MS's sharpness) and of the scene's
`Statistics`, so that a piece gives what the whole gives. How MS comes onto PAN's grid is not the formulas' business:
`fuse` registers and up-samples by `data.observation`, `baselines` by the toolbox's own filters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import options
from .data.grid import Both, both_ratios, check_pair, default_phase
from .data.observation import back_project, observe, resample, upsample
from .data.sensors import Sensor, get_sensor

#: Variance over squared mean up to which an image is flat: interpolation makes a constant ripple by about 1e-7.
RIPPLE = 1e-12


@dataclass
class Moments:
    """Means and second central moments of K quantities over samples, for a batch; sums in float64.

    Attributes:
        count: [B] samples.
        mean: [B, K].
        scatter: [B, K, K], sums of products of deviations from the mean.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, values: Tensor, valid: Tensor | None = None) -> Moments:
        """Of images [B, K, h, w], over the pixels where valid [B, 1, h, w]."""
        x = values.double().flatten(2)
        if valid is None or bool(valid.all()):
            count, mean = x.new_full((len(x),), x.shape[2]), x.mean(2)
            centred = x - mean[..., None]
        else:
            used = valid.flatten(2)
            count = used.sum((1, 2)).double()
            x = torch.where(used, x, 0)
            mean = x.sum(2) / count.clamp_min(1)[:, None]
            centred = (x - mean[..., None]) * used
        return cls(count, mean, centred @ centred.transpose(1, 2))

    def __add__(self, other: Moments) -> Moments:
        """T. Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979."""
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        step = other.mean - self.mean
        product = step[:, :, None] * step[:, None, :] * (self.count * share)[:, None, None]
        return Moments(count, self.mean + step * share[:, None], self.scatter + other.scatter + product)

    @property
    def covariance(self) -> Tensor:
        """[B, K, K], unbiased."""
        return self.scatter / (self.count - 1).clamp_min(1)[:, None, None]


@dataclass
class Statistics:
    """What methods need to know of a whole scene, C bands.

    Attributes:
        low: at MS's resolution, of the C bands and the low-pass PAN.
        high: at PAN's, of the C up-sampled bands, PAN and, where a method needs it, PAN as each band sees it (C).
        haze: [B, C], the smallest value of each band.
        pan_spread: [B, 1, 1, 1], variance that PAN's own filter leaves it; None takes that of the samples in `low`.
    """

    low: Moments
    high: Moments
    haze: Tensor
    pan_spread: Tensor | None = None

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.low + other.low, self.high + other.high, torch.minimum(self.haze, other.haze))

    @property
    def bands(self) -> int:
        return self.low.mean.shape[1] - 1

    @functools.cached_property
    def intensity(self) -> tuple[Tensor, Tensor]:
        """Weights [B, C, 1, 1] and offset [B, 1, 1, 1] by which the bands best make the low-pass PAN."""
        c, scatter = self.bands, self.low.scatter
        # Flat or repeated bands leave the solution open: the pseudo-inverse takes the smallest weights. It cannot take
        # NaN, which reaches the weights through the second factor.
        inverse = torch.linalg.pinv(scatter[:, :c, :c].nan_to_num(), hermitian=True)
        weights = inverse @ scatter[:, :c, c:]
        offset = self.low.mean[:, c:] - (weights[..., 0] * self.low.mean[:, :c]).sum(1, keepdim=True)
        return weights[..., None], offset[..., None, None]

    @property
    def spread(self) -> Tensor:
        """Variance that PAN's own filter leaves it, [B, 1, 1, 1]."""
        spread = self.pan_spread
        if spread is None:
            spread = self.low.covariance[:, self.bands, self.bands].view(-1, 1, 1, 1)
        return torch.where(spread <= RIPPLE * self.mean(self.bands, self.bands + 1) ** 2, 0, spread)

    def mean(self, start: int, stop: int) -> Tensor:
        """Means at PAN's resolution, [B, stop - start, 1, 1]."""
        return self.high.mean[:, start:stop, None, None]

    def variance(self, start: int, stop: int) -> Tensor:
        """Variances at PAN's resolution, [B, stop - start, 1, 1]."""
        return self.high.covariance.diagonal(dim1=1, dim2=2)[:, start:stop, None, None]


@dataclass
class Piece:
    """A part of a scene.

    Attributes:
        pan: [B, 1, H, W].
        up: [B, C, H, W], MS on PAN's grid.
        low: [B, C, H, W], PAN through each band's MTF and back on its grid; None for methods that do not look at it.
        gain: [C, 1, 1] or 1, what the filter behind `low` makes of a constant: the toolbox's .999.
    """

    pan: Tensor
    up: Tensor
    low: Tensor | None = None
    gain: Tensor | float = 1.0


def _quotient(numerator: Tensor, denominator: Tensor, otherwise: float = 1) -> Tensor:
    """numerator / denominator, and `otherwise` where the denominator is not above 0."""
    used = ~(denominator <= 0)
    return torch.where(used, numerator / torch.where(used, denominator, 1), otherwise)


def _modulation(detailed: Tensor, low: Tensor) -> Tensor:
    """detailed / low within 0 and 5: both may approach 0 in dark bands, and no real detail is that strong."""
    return _quotient(detailed, low).clamp(0, 5)


def _combination(weights: Tensor, bands: Tensor) -> Tensor:
    """[B, 1, H, W]: sum of bands [B, C, H, W], each by its weight [B, C, 1, 1], in one pass."""
    return (weights.flatten(1)[:, None] @ bands.flatten(2)).unflatten(2, bands.shape[2:])


def exp(piece: Piece, s: Statistics) -> Tensor:
    """Up-sampled MS without any detail of PAN, the field's EXP."""
    return piece.up


def brovey(piece: Piece, s: Statistics | None, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted Brovey, as GDAL's pansharpening: ms_b * pan / sum_b(w_b * ms_b). Weights are 1/C unless given.

    PAN is taken as it is: its scale must be that of the weighted sum. Where that sum is not above 0, MS stays.
    """
    bands = piece.up.shape[1]
    if weights is not None and len(weights) != bands:
        raise ValueError(f"weights: expected {bands}, got {len(weights)}")
    w = piece.up.new_tensor([1 / bands] * bands if weights is None else list(weights)).view(-1, 1, 1)
    return piece.up * _quotient(piece.pan, (w * piece.up).sum(1, keepdim=True))


def gsa(piece: Piece, s: Statistics) -> Tensor:
    """Adaptive Gram-Schmidt: the intensity is the regression of the low-pass PAN on the MS bands.

    B. Aiazzi et al., "Improving component substitution pansharpening through multivariate regression of MS+Pan data",
    IEEE TGRS 2007.
    """
    c, (weights, _) = s.bands, s.intensity
    covariance = s.high.covariance[:, :c, :c]
    shared = covariance @ weights[..., 0]  # of each band with the intensity
    variance = (weights[..., 0] * shared).sum(1, keepdim=True)
    gain = _quotient(shared, variance, 0)[..., None]
    weights, gain, means = (x.to(piece.up) for x in (weights, gain, s.mean(0, c + 1)))
    intensity = (weights * (piece.up - means[:, :c])).sum(1, keepdim=True)
    return piece.up + gain * (piece.pan - means[:, c:] - intensity)


def bt_h(piece: Piece, s: Statistics) -> Tensor:
    """Brovey with haze correction: each band's smallest value is path radiance and takes no part in the modulation.

    S. Lolli et al., "Haze correction for contrast-based multispectral pansharpening", IEEE GRSL 2017.
    """
    c, (weights, offset) = s.bands, s.intensity
    covariance = s.high.covariance[:, :c, :c]
    variance = (weights[..., 0] * (covariance @ weights[..., 0])).sum(1)[..., None, None]
    gain = _quotient(variance.view(-1, 1, 1, 1), s.spread, 0).clamp_min(0).sqrt()
    mean = (weights * s.mean(0, c)).sum(1, keepdim=True) + offset
    haze = s.haze[..., None, None].double()
    haze_pan = (weights * haze).sum(1, keepdim=True) + offset
    shift = mean - s.mean(c, c + 1) * gain - haze_pan
    weights, gain, shift, haze = (x.to(piece.up) for x in (weights, gain, shift, haze))
    above = piece.up - haze  # first, as the intensity above the haze is what is divided by
    return torch.addcmul(haze, above, _modulation(piece.pan * gain + shift, _combination(weights, above)))


def mtf_glp_hpm(piece: Piece, s: Statistics) -> Tensor:
    """Generalised Laplacian pyramid with MTF-matched filters and high-pass modulation: ms_b * pan_b / lowpass(pan_b).

    B. Aiazzi et al., "MTF-tailored multiscale fusion of high-resolution MS and PAN imagery", PE&RS 2006; G. Vivone et
    al., "Contrast and error-based fusion schemes for multispectral image pansharpening", IEEE GRSL 2014. PAN gets each
    band's mean and the standard deviation that its own filter leaves it.
    """
    c = s.bands
    assert piece.low is not None
    gain = _quotient(s.variance(0, c), s.spread, 0).sqrt()
    shift = s.mean(0, c) - s.mean(c, c + 1) * gain
    gain, shift = gain.to(piece.up), shift.to(piece.up)
    return piece.up * _modulation(piece.pan * gain + shift, piece.low * gain + shift * piece.gain)


def _slopes(s: Statistics, other: int) -> Tensor:
    """Covariance of each band with PAN (other = 0) or its low-pass (1), over the low-pass's with that: [B, C, 1, 1]."""
    c, covariance = s.bands, s.high.covariance
    low = covariance[:, c + 1 :, c + 1 :].diagonal(dim1=1, dim2=2)
    flat = low <= RIPPLE * s.high.mean[:, c + 1 :] ** 2
    if other:
        shared, spread = covariance[:, :c, c + 1 :].diagonal(dim1=1, dim2=2), low
    else:
        shared, spread = covariance[:, :c, c], covariance[:, c + 1 :, c]
    return torch.where(flat, 0, _quotient(shared, spread, 0))[..., None, None]


def mtf_glp_fs(piece: Piece, s: Statistics) -> Tensor:
    """Generalised Laplacian pyramid, injection by regression at full scale: ms_b + g_b * (pan - lowpass_b(pan)).

    G. Vivone et al., "Full scale regression-based injection coefficients for panchromatic sharpening", IEEE TIP 2018.
    """
    assert piece.low is not None
    return piece.up + _slopes(s, 0).to(piece.up) * (piece.pan - piece.low)


def mtf_glp_hpm_r(piece: Piece, s: Statistics) -> Tensor:
    """High-pass modulation with PAN brought to each band by regression on its low-pass.

    G. Vivone et al., "A regression-based high-pass modulation pansharpening approach", IEEE TGRS 2018.
    """
    assert piece.low is not None
    c, slope = s.bands, _slopes(s, 1)
    shift = _quotient(s.mean(0, c), slope, 0) - s.mean(c, c + 1)
    usable = (slope > 0).to(piece.up.device)
    shift = shift.to(piece.up)
    return torch.where(usable, piece.up * _modulation(piece.pan + shift, piece.low + shift), piece.up)


Method = Callable[..., Tensor]

#: Name -> function(piece, statistics).
METHODS: dict[str, Method] = dict(
    zip(options.METHODS, (exp, brovey, gsa, bt_h, mtf_glp_hpm, mtf_glp_fs, mtf_glp_hpm_r), strict=True)
)
#: Methods that look at PAN as each band sees it.
NEED_LOW = ("mtf-glp-hpm", "mtf-glp-fs", "mtf-glp-hpm-r")
#: What `auto` stands for.
AUTO = "bt-h"


def check_method(name: str) -> str:
    """The method meant by `name`, "auto" included.

    Raises:
        ValueError: there is none.
    """
    if name == "auto":
        return AUTO
    if name not in METHODS:
        raise ValueError(f"method: expected auto or one of {', '.join(METHODS)}, got {name!r}")
    return name


def apply(method: str, piece: Piece, statistics: Statistics, band_weights: Sequence[float] | None = None) -> Tensor:
    """The result [B, C, H, W] of a method on a piece.

    Raises:
        ValueError: no such method; or weights of bands for another one than brovey, or of another number.
    """
    name = check_method(method)
    if name == "brovey":
        return brovey(piece, statistics, band_weights)
    if band_weights is not None:
        raise ValueError(f"band_weights: expected none for {name}, which finds its own, got {list(band_weights)}")
    return METHODS[name](piece, statistics)


def fuse(
    method: str,
    pan: Tensor,
    ms: Tensor,
    *,
    sensor: str | Sensor = "default",
    ratio: Both | None = None,
    phase: Both | None = None,
    d: Tensor | None = None,
    back_projection: int | str = 0,
    band_weights: Sequence[float] | None = None,
) -> Tensor:
    """Sharpen whole images, in PAN's frame; statistics are those of each image. Differentiable in pan and ms.

    Args:
        method: "auto" or a name of `METHODS`.
        pan: [B, 1, H, W], floating point, no NaN.
        ms: [B, C, h, w], likewise.
        sensor: name or `Sensor`, for the MTFs.
        ratio: PAN pixels per MS pixel; None is H / h and W / w.
        phase: PAN index of the first MS pixel's centre; None means aligned pixel areas.
        d: displacements [C, 2] or [B, C, 2] in PAN pixels, see `data.observation`; None is none.
        back_projection: full steps, or "auto" (`data.observation.back_project`).
        band_weights: of brovey, one a band.

    Returns:
        [B, C, H, W], dtype of `ms`.

    Raises:
        ValueError, TypeError: an argument is none of the above.
    """
    check_pair(pan, ms, ratio=None)
    name, sensor = check_method(method), get_sensor(sensor)
    high, small = (pan.shape[2], pan.shape[3]), (ms.shape[2], ms.shape[3])
    ratios = both_ratios((high[0] / small[0], high[1] / small[1]) if ratio is None else ratio)
    grid: dict[str, Any] = {"ratio": ratios, "phase": default_phase(phase, ratios)}
    gains = sensor.gains(ms.shape[1])
    pan = pan.to(ms.dtype)
    up = upsample(ms, high, **grid, d=d, gdal=name == "brovey")
    low = low_pan(pan, gains, small, **grid) if name in NEED_LOW else None
    piece = Piece(pan, up, low)
    registered = resample(ms, small, None if d is None else d / d.new_tensor(ratios), 1)
    found = statistics(piece, registered, low_pan(pan, [sensor.mtf_pan], small, **grid, back=False), ms)
    out = apply(name, piece, found, band_weights)
    return back_project(out, ms, gains=gains, **grid, d=d, steps=back_projection)


def low_pan(
    pan: Tensor, gains: Sequence[float], size: tuple[int, int], ratio: Both, phase: Both, back: bool = True
) -> Tensor:
    """PAN [B,1,H,W] as bands of these MTFs see it on an MS grid of `size`, [B, C, *size], or back on its own grid."""
    low = observe(pan.expand(-1, len(gains), -1, -1), size, gains=gains, ratio=ratio, phase=phase)
    return upsample(low, (pan.shape[2], pan.shape[3]), ratio=ratio, phase=phase) if back else low


def statistics(
    piece: Piece,
    registered: Tensor,
    pan_low: Tensor,
    ms: Tensor,
    valid: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Statistics:
    """Statistics of one piece.

    Args:
        piece: see `Piece`.
        registered: [B, C, h, w], bands at MS's resolution where PAN's low-pass lies.
        pan_low: [B, 1, h, w], PAN through its own filter, there.
        ms: [B, C, h', w'], the bands as they are.
        valid: bool [B, 1, h, w], [B, 1, H, W] and [B, C, h', w'], which of these hold data; None is all.
    """
    low, high, own = valid or (None, None, None)
    seen = [] if piece.low is None else [piece.low]
    haze = ms if own is None else torch.where(own, ms, torch.inf)
    return Statistics(
        Moments.of(torch.cat([registered, pan_low], 1), low),
        Moments.of(torch.cat([piece.up, piece.pan, *seen], 1), high),
        haze.amin((2, 3)),
    )
