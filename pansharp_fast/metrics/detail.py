"""Detail and its flaws at full resolution: what PAN shows, what the eye sees.

Every function takes [B, C, H, W] in digital numbers, NumPy arrays or tensors on any device and of any dtype, all in
PAN's frame, computes in float64 and returns one value per image, [B]. A NaN pixel makes an image's value NaN. `cut`
leaves that many border pixels out, where filters and displaced bands have seen no data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._common import takes_arrays

#: Share of the pixels that count as flat: those where PAN deviates least.
FLAT = 0.25
#: Share of the pixels that are strong edges, and how far from them, in PAN pixels, a halo may lie.
EDGES, NEAR = 0.05, 6
#: Share of a band's pixels that lie below its haze.
HAZE = 0.001
#: Brightness, relative to the scene's mean, below which chroma is no longer relative to it: dark colours hide flaws.
DARK = 0.5
#: Standard deviations of MS's chroma by which a pixel has to leave the local range.
TOLERANCE = 0.5


def _prepare(cut: int, **images: torch.Tensor) -> list[torch.Tensor]:
    """The images in float64 without `cut` border pixels.

    Raises:
        ValueError: an image is not [B, C, H, W] of the first one's size (`pan`: one band), or nothing is left.
    """
    shape = tuple(next(iter(images.values())).shape)
    for name, image in images.items():
        expected = (*shape[:1], 1, *shape[2:]) if name == "pan" else shape
        if len(shape) != 4 or tuple(image.shape) != expected or 0 in expected:
            got = ", ".join(str(tuple(each.shape)) for each in images.values())
            raise ValueError(f"{', '.join(images)}: expected [B, C, H, W] of one size (pan: one band), got {got}")
    if cut < 0 or min(shape[2:]) - 2 * cut < 3:
        raise ValueError(f"cut: expected 0 or more that leaves 3 pixels or more of {shape[2]} x {shape[3]}, got {cut}")
    keep = slice(cut, -cut) if cut else slice(None)
    return [image.double()[..., keep, keep] for image in images.values()]


def _laplacian(x: torch.Tensor) -> torch.Tensor:
    """Eight times a pixel less its eight neighbours, [B, C, H-2, W-2]."""
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    return 9 * x[..., 1:-1, 1:-1] - (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:])


def _std(x: torch.Tensor) -> torch.Tensor:
    return x.std((2, 3), unbiased=False)


@takes_arrays
def laplacian_correlation(fused: torch.Tensor, pan: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Correlation of each band's Laplacian with PAN's, mean over bands; the Laplacian is 8 less the eight neighbours.

    J. Zhou et al., "A wavelet transform method to merge Landsat TM and SPOT panchromatic data", IJRS 1998.

    Args:
        fused: [B, C, H, W].
        pan: [B, 1, H, W].
        cut: border pixels left out.

    Raises:
        ValueError: shapes do not fit each other, or nothing is left.
    """
    fused, pan = _prepare(cut, fused=fused, pan=pan)
    detail, edges = (_laplacian(x) for x in (fused, pan))
    detail, edges = (x - x.mean((2, 3), keepdim=True) for x in (detail, edges))
    covariance = (detail * edges).mean((2, 3))
    return (covariance / (_std(detail) * _std(edges))).mean(1)


@takes_arrays
def laplacian_energy(fused: torch.Tensor, pan: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Detail beside PAN's: standard deviation of a band's Laplacian over the band's own, over the same of PAN.

    The mean over bands. 1 is as sharp as PAN, less is softer.

    Args:
        fused: [B, C, H, W].
        pan: [B, 1, H, W].
        cut: border pixels left out.

    Raises:
        ValueError: shapes do not fit each other, or nothing is left.
    """
    fused, pan = _prepare(cut, fused=fused, pan=pan)
    return (_std(_laplacian(fused)) / _std(fused) / (_std(_laplacian(pan)) / _std(pan))).mean(1)


def _gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """[B, C, H, W] through a Gaussian, border repeated."""
    reach = math.ceil(4 * sigma)
    taps = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
    for dim in (2, 3):
        n = x.shape[dim]
        wide = x.index_select(dim, torch.arange(-reach, n + reach, device=x.device).clamp(0, n - 1))
        out = wide.narrow(dim, 0, n) * (taps[0] / sum(taps))
        for k in range(1, len(taps)):
            out.add_(wide.narrow(dim, k, n), alpha=taps[k] / sum(taps))
        x = out
    return x


def _quantile(x: torch.Tensor, share: float) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, 1, 1]: the value below which `share` of the pixels lie."""
    count = x.shape[2] * x.shape[3]
    return x.flatten(2).kthvalue(max(1, math.ceil(share * count)), dim=2).values[..., None, None]


def _chroma(image: torch.Tensor, ms: torch.Tensor) -> torch.Tensor:
    """Colour without brightness, [B, C, H, W].

    Bands less MS's haze, over MS's mean, are the colour; what they differ from their mean, over that mean, is chroma:
    a shadow or a brighter roof leaves it as it is.
    """
    haze = _quantile(ms, HAZE)
    colour = (image - haze) / (ms - haze).mean((2, 3), keepdim=True)
    brightness = colour.mean(1, keepdim=True)
    return (colour - brightness) / brightness.clamp_min(DARK)


@takes_arrays
def mottle(
    fused: torch.Tensor,
    reference: torch.Tensor,
    ms: torch.Tensor,
    pan: torch.Tensor,
    ratio: float = 4,
    cut: int = 0,
) -> torch.Tensor:
    """Colour mottle where PAN is flat, over that of a reference: above 1 is more than it has.

    Root mean square of chroma less its Gaussian (sigma one MS pixel), over the quarter of the pixels in which PAN
    deviates least (same window).

    Args:
        fused: [B, C, H, W].
        reference: [B, C, H, W], what is known to be clean: registered GSA without back-projection.
        ms: [B, C, H, W], upsampled into PAN's frame (`data.observation.upsample`).
        pan: [B, 1, H, W].
        ratio: PAN pixels per MS pixel.
        cut: border pixels left out.

    Raises:
        ValueError: shapes differ, or nothing is left.
    """
    fused, reference, ms, pan = _prepare(cut, fused=fused, reference=reference, ms=ms, pan=pan)
    deviation = _gaussian((pan - _gaussian(pan, ratio)).square(), ratio)
    flat = deviation <= _quantile(deviation, FLAT)

    def strength(image: torch.Tensor) -> torch.Tensor:
        chroma = _chroma(image, ms)
        energy = (chroma - _gaussian(chroma, ratio)).square().mean(1, keepdim=True)
        return ((energy * flat).sum((1, 2, 3)) / flat.sum((1, 2, 3))).sqrt()

    return strength(fused) / strength(reference)


@takes_arrays
def halo(
    fused: torch.Tensor,
    reference: torch.Tensor,
    ms: torch.Tensor,
    pan: torch.Tensor,
    ratio: float = 4,
    cut: int = 0,
) -> torch.Tensor:
    """Coloured halos round strong edges, over those of a reference: above 1 is more than it has.

    Share of the pixels within 6 PAN pixels of the strongest 5 % of PAN's gradients (Sobel) whose chroma, in any band,
    leaves the range that MS has within one MS pixel by more than half a standard deviation of MS's chroma.

    Args:
        fused, reference, ms, pan, ratio, cut: as in `mottle`.

    Raises:
        ValueError: shapes differ, or nothing is left.
    """
    fused, reference, ms, pan = _prepare(cut, fused=fused, reference=reference, ms=ms, pan=pan)
    gradient = F.pad(_sobel(pan), (1, 1, 1, 1))
    edges = (gradient > _quantile(gradient, 1 - EDGES)).float()
    offset = torch.arange(-NEAR, NEAR + 1, device=pan.device)
    disc = (offset[:, None] ** 2 + offset**2 <= NEAR**2).float()[None, None]
    near = F.conv2d(edges, disc, padding=NEAR) > 0.5
    allowed, reach = _chroma(ms, ms), round(ratio)

    def extreme(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, 2 * reach + 1, stride=1, padding=reach)

    margin = TOLERANCE * allowed.std((2, 3), keepdim=True, unbiased=False)
    high, low = extreme(allowed) + margin, -extreme(-allowed) - margin

    def share(image: torch.Tensor) -> torch.Tensor:
        chroma = _chroma(image, ms)
        outside = ((chroma > high) | (chroma < low)).any(1, keepdim=True)
        value = (outside & near).sum((1, 2, 3)) / near.sum((1, 2, 3))
        return torch.where(image.isnan().any(3).any(2).any(1), torch.nan, value.double())

    return share(fused) / share(reference)


def _sobel(x: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude, [B, C, H-2, W-2]."""
    rows = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :]
    return (dx.square() + dy.square()).sqrt()
