"""Full resolution: quality of a fused image where no ground truth exists.

Every function takes [B, C, H, W] in digital numbers, on any device and of any dtype, computes in float64 and returns
one value per image, [B]. `ms` is the original MS image, which `interp23` brings to the fused image's size, or that
upsampled image itself. Definitions follow the DLPan toolbox (G. Vivone et al., IEEE GRSM 2021): blocks of 32 x 32
pixels, exponents 1. A NaN pixel, or a block that is flat in two images compared, makes an image's value NaN.
"""

from __future__ import annotations

import torch

from ..data import Sensor, imresize, interp23, mtf_filter
from ._common import BLOCK, block_uqi
from .reduced import q2n


def _expand(fused: torch.Tensor, ms: torch.Tensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused image and MS at its size, both in float64."""
    if fused.ndim != 4 or ms.ndim != 4 or fused.shape[:2] != ms.shape[:2]:
        raise ValueError(f"fused, ms: expected [B, C, H, W] of equal B, C, got {tuple(fused.shape)}, {tuple(ms.shape)}")
    height, width = fused.shape[-2:]
    if height % BLOCK or width % BLOCK or not height * width:
        raise ValueError(f"fused: expected sides that are multiples of {BLOCK}, got {height} x {width}")
    if ms.shape != fused.shape:
        if (ms.shape[-2] * ratio, ms.shape[-1] * ratio) != (height, width):
            raise ValueError(f"ms: expected {height}/{ratio} x {width}/{ratio} pixels, got {tuple(ms.shape[-2:])}")
        ms = interp23(ms.double(), ratio)
    return fused.double(), ms.double()


def d_lambda_k(fused: torch.Tensor, ms: torch.Tensor, sensor: str | Sensor, ratio: int = 4) -> torch.Tensor:
    """Spectral distortion of Khan: 1 - Q2n between the upsampled MS and the fused image blurred by the sensor's MTF.

    M. M. Khan et al., "Pansharpening quality assessment using the modulation transfer functions of instruments", IEEE
    TGRS 2009.

    Raises:
        ValueError: shapes do not fit each other, sides are no multiples of 32, or the sensor has another band count.
    """
    fused, ms = _expand(fused, ms, ratio)
    return 1 - q2n(mtf_filter(fused, sensor, ratio), ms)


def d_s(fused: torch.Tensor, ms: torch.Tensor, pan: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Spatial distortion of the QNR protocol: mean over bands of |UQI(fused_b, pan) - UQI(ms_b, low-pass pan)|.

    L. Alparone et al., "Multispectral and panchromatic data fusion assessment without reference", PE&RS 2008. The
    low-pass PAN is `pan` [B, 1, H, W] reduced by `imresize` and brought back by `interp23`.

    Raises:
        ValueError: shapes do not fit each other, or sides are no multiples of 32.
    """
    fused, ms = _expand(fused, ms, ratio)
    if pan.shape != (fused.shape[0], 1, *fused.shape[-2:]):
        raise ValueError(f"pan: expected {(fused.shape[0], 1, *fused.shape[-2:])}, got {tuple(pan.shape)}")
    pan = pan.double()
    low = interp23(imresize(pan, 1 / ratio), ratio)
    return (block_uqi(fused, pan) - block_uqi(ms, low)).abs().mean((1, 2))


def d_lambda(fused: torch.Tensor, ms: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Spectral distortion of the original QNR: mean over band pairs of |UQI(fused_i, fused_j) - UQI(ms_i, ms_j)|.

    L. Alparone et al., PE&RS 2008. Not the papers' D_lambda, which is `d_lambda_k`. NaN for a single band.

    Raises:
        ValueError: shapes do not fit each other, or sides are no multiples of 32.
    """
    fused, ms = _expand(fused, ms, ratio)
    first, second = torch.triu_indices(fused.shape[1], fused.shape[1], 1, device=fused.device)
    return (block_uqi(fused, fused) - block_uqi(ms, ms)).abs()[:, first, second].mean(1)


def hqnr(
    fused: torch.Tensor, ms: torch.Tensor, pan: torch.Tensor, sensor: str | Sensor, ratio: int = 4
) -> torch.Tensor:
    """Hybrid quality with no reference, (1 - D_lambda_K)(1 - D_s): the papers' column.

    B. Aiazzi et al., "Full-scale assessment of pansharpening methods and data products", SPIE 2014.

    Raises:
        ValueError: as `d_lambda_k` and `d_s`.
    """
    return (1 - d_lambda_k(fused, ms, sensor, ratio)) * (1 - d_s(fused, ms, pan, ratio))


def qnr(fused: torch.Tensor, ms: torch.Tensor, pan: torch.Tensor, ratio: int = 4) -> torch.Tensor:
    """Quality with no reference, (1 - D_lambda)(1 - D_s). L. Alparone et al., PE&RS 2008.

    Raises:
        ValueError: as `d_lambda` and `d_s`.
    """
    return (1 - d_lambda(fused, ms, ratio)) * (1 - d_s(fused, ms, pan, ratio))
