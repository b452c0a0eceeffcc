"""Reduced resolution: quality of a fused image against its ground truth.

Every function takes [B, C, H, W] in digital numbers, NumPy arrays or tensors on any device and of any dtype, computes
in float64 and returns one value per image, [B]. A NaN pixel makes an image's value NaN. `cut` leaves a border out
(`prepare`); the papers' tables take 21. PSNR and SSIM are those that the papers' numbers match; the rest follow the
DLPan toolbox (G. Vivone et al., IEEE GRSM 2021).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from ._common import BLOCK, blocks, prepare, takes_arrays


@takes_arrays
def psnr(fused: torch.Tensor, gt: torch.Tensor, peak: float, cut: int = 0) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB from one mean squared error over all bands and pixels; infinite if equal.

    Raises:
        ValueError: shapes differ, or `peak` is not above 0.
    """
    _check_peak(peak)
    fused, gt = prepare(fused, gt, cut)
    return 10 * torch.log10(peak**2 / (fused - gt).square().mean((1, 2, 3)))


def _check_peak(peak: float) -> None:
    if not peak > 0:
        raise ValueError(f"peak: expected a number above 0, got {peak}")


@takes_arrays
def ssim(fused: torch.Tensor, gt: torch.Tensor, peak: float, cut: int = 0) -> torch.Tensor:
    """Structural similarity: Gaussian window of 11 x 11 pixels, sigma 1.5, population variances, mean over bands.

    Z. Wang et al., "Image quality assessment: from error visibility to structural similarity", IEEE TIP 2004. Windows
    lie wholly inside the image, as in scikit-image; torchmetrics also counts windows that leave it (1e-5).

    Raises:
        ValueError: shapes differ, a side is under 11 pixels, or `peak` is not above 0.
    """
    _check_peak(peak)
    fused, gt = prepare(fused, gt, cut)
    if min(fused.shape[-2:]) < 11:
        raise ValueError(f"fused: expected sides of at least 11 pixels, got {tuple(fused.shape[-2:])}")
    taps = [math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-5, 6)]
    taps = [tap / sum(taps) for tap in taps]

    def smooth(x: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):  # sums of slices: several times faster than a convolution in float64
            n = x.shape[dim] - 10
            out = x.narrow(dim, 0, n) * taps[0]
            for k in range(1, 11):
                out.add_(x.narrow(dim, k, n), alpha=taps[k])
            x = out
        return x

    mean_f, mean_g = smooth(fused), smooth(gt)
    var_f, var_g = smooth(fused**2) - mean_f**2, smooth(gt**2) - mean_g**2
    covariance = smooth(fused * gt) - mean_f * mean_g
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similarity = (2 * mean_f * mean_g + c1) * (2 * covariance + c2)
    return (similarity / ((mean_f**2 + mean_g**2 + c1) * (var_f + var_g + c2))).mean((1, 2, 3))


@takes_arrays
def sam(fused: torch.Tensor, gt: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Spectral angle in degrees, mean over the pixels where neither spectrum is zero; NaN where there are none.

    R. Yuhas et al., JPL Airborne Geoscience Workshop 1992. (torchmetrics: radians, NaN at zero spectra.)

    Raises:
        ValueError: shapes differ.
    """
    fused, gt = prepare(fused, gt, cut)
    norms = (fused.square().sum(1) * gt.square().sum(1)).sqrt()
    used = norms != 0
    angle = torch.acos(((fused * gt).sum(1) / torch.where(used, norms, 1)).clamp(-1, 1))
    return torch.rad2deg(torch.where(used, angle, 0).sum((1, 2)) / used.sum((1, 2)))


@takes_arrays
def ergas(fused: torch.Tensor, gt: torch.Tensor, ratio: float = 4, cut: int = 0) -> torch.Tensor:
    """Relative dimensionless global error of synthesis, (100/ratio)*sqrt(mean_b(MSE_b / mean(gt_b)^2)).

    L. Wald, "Quality of high resolution synthesised images", Fusion of Earth Data 2000.

    Raises:
        ValueError: shapes differ, or `ratio` is not above 0.
    """
    if not ratio > 0:
        raise ValueError(f"ratio: expected a number above 0, got {ratio}")
    fused, gt = prepare(fused, gt, cut)
    relative = (fused - gt).square().mean((2, 3)) / gt.mean((2, 3)).square()
    return 100 / ratio * relative.mean(1).sqrt()


def gradient(x: torch.Tensor) -> torch.Tensor:
    """Sobel gradient magnitude of [B, C, H, W], zeros outside the image."""
    x = F.pad(x, (1, 1, 1, 1))
    dy, dx = x[..., 2:, :] - x[..., :-2, :], x[..., 2:] - x[..., :-2]
    dy = dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]
    dx = dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :]
    return torch.sqrt(dx**2 + dy**2)


@takes_arrays
def scc(fused: torch.Tensor, gt: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Spatial correlation: cosine between the Sobel gradient magnitudes of all bands together.

    One border pixel is left out, then gradients take zeros outside. NaN where an image is zero throughout.

    Raises:
        ValueError: shapes differ, or a side is under 3 pixels.
    """
    fused, gt = prepare(fused, gt, cut)
    if min(fused.shape[-2:]) < 3:
        raise ValueError(f"fused: expected sides of at least 3 pixels, got {tuple(fused.shape[-2:])}")
    f, g = gradient(fused[..., 1:-1, 1:-1]), gradient(gt[..., 1:-1, 1:-1])
    over = (1, 2, 3)
    return (f * g).sum(over) / (f.square().sum(over).sqrt() * g.square().sum(over).sqrt())


@takes_arrays
def q(fused: torch.Tensor, gt: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Universal quality index over sliding 32 x 32 windows, mean over positions and bands; NaN under 32 pixels.

    Z. Wang and A. Bovik, "A universal image quality index", IEEE SPL 2002.

    Raises:
        ValueError: shapes differ.
    """
    fused, gt = prepare(fused, gt, cut)
    if min(fused.shape[-2:]) < BLOCK:
        return fused.new_full((fused.shape[0],), torch.nan)

    def total(x: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):  # sums of 2, 4, ... 32 neighbours
            for step in (1, 2, 4, 8, 16):
                n = x.shape[dim] - step
                x = x.narrow(dim, 0, n) + x.narrow(dim, step, n)
        return x

    n = BLOCK * BLOCK
    sum_f, sum_g = total(fused), total(gt)
    means, product = sum_f**2 + sum_g**2, sum_f * sum_g
    variances = n * total(fused**2 + gt**2) - means
    index = 4 * (n * total(fused * gt) - product) * product / (variances * means)
    # Two flat windows agree as far as their means do; two windows of zeros agree.
    index = torch.where((variances == 0) & (means != 0), 2 * product / means, index)
    return torch.where((means == 0), 1, index).mean((1, 2, 3))


@functools.cache
def _product_table(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hypercomplex units: e_i * conj(e_j) = sign[i, j] * e_target[i, j] (Cayley-Dickson), `size` a power of two."""

    def signs(n: int) -> torch.Tensor:
        if n == 1:
            return torch.ones(1, 1)
        half, s = n // 2, signs(n // 2)
        conj = torch.ones(half)
        conj[1:] = -1
        # (a, b)(c, d) = (a c - conj(d) b, d a + b conj(c))
        top = torch.cat([s, s.T], 1)
        bottom = torch.cat([s * conj, -(conj[:, None] * s).T], 1)
        return torch.cat([top, bottom])

    index = torch.arange(size)
    conj = torch.ones(size)
    conj[1:] = -1
    return (signs(size) * conj).double(), index[:, None] ^ index


@takes_arrays
def q2n(fused: torch.Tensor, gt: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Q2n index for any number of bands (Q4, Q8): hypercomplex quality, mean over 32 x 32 blocks.

    A. Garzelli and F. Nencini, "Hypercomplex quality assessment of multi/hyperspectral images", IEEE GRSL 2009, with
    the toolbox's habits: sides are mirrored up to a multiple of 32, values rounded to uint16 (half away from zero,
    saturating), bands filled with zeros to a power of two, moments taken with N/(N-1).

    Raises:
        ValueError: shapes differ, or a side is under 16 pixels (too short to mirror).
    """
    fused, gt = prepare(fused, gt, cut)
    bands, height, width = fused.shape[1:]
    if min(height, width) < BLOCK // 2:
        raise ValueError(f"fused: expected sides of at least {BLOCK // 2} pixels, got {(height, width)}")
    size = 1 << (bands - 1).bit_length()

    def units(x: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3):
            n = x.shape[dim]
            if n % BLOCK:
                index = torch.arange(-(-n // BLOCK) * BLOCK, device=x.device)
                x = x.index_select(dim, torch.minimum(index, 2 * n - 1 - index))
        x = x.clamp(0, 65535)
        whole = x.floor()
        whole += x.sub_(whole).ge_(0.5)
        return blocks(F.pad(whole, (0, 0, 0, 0, 0, size - bands)))

    # Blocks in units of the ground truth's own spread, centred: the moments below then cancel nothing.
    x, y = units(gt), units(fused)
    n = x.shape[-1]
    mean, mean_y = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    x, y = x - mean, y - mean_y
    std = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / (n - 1) ** 0.5
    std = torch.where(std == 0, torch.finfo(torch.float64).eps, std)
    x, y = x.div_(std), y.div_(std)
    mean_x, mean_y = torch.ones_like(mean[..., 0]), ((mean_y - mean) / std + 1)[..., 0]
    variances = sum(torch.linalg.vector_norm(each, dim=(-1, -2)).square() for each in (x, y)) / (n - 1)
    sign, target = (table.to(x.device) for table in _product_table(size))
    covariance = x.new_zeros(*x.shape[:2], size).index_add(
        2, target.flatten(), (x @ y.transpose(-1, -2) / (n - 1) * sign).flatten(-2)
    )
    square_x, square_y = mean_x.square().sum(-1), mean_y.square().sum(-1)
    bias = 2 * (square_x * square_y).sqrt() / (square_x + square_y)
    contrast = 2 * covariance.norm(dim=-1) / torch.where(variances == 0, 1, variances)
    value = torch.where(variances == 0, bias, bias * contrast).mean(-1)
    broken = fused.amax((1, 2, 3)) + gt.amax((1, 2, 3))  # which hand NaN on
    return torch.where(broken.isnan(), torch.nan, value)
