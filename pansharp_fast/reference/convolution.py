"""3x3 convolution with what surrounds it in residual blocks, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """As `pansharp_fast.ops.conv3x3`."""
    if scale is not None and shift is not None:
        x = (x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype)
    if silu:
        x = F.silu(x)
    per_image = bias is not None and bias.dim() == 2
    shared = None if bias is None or per_image else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), shared, padding=1)
    if bias is not None and per_image:
        y = y + bias[:, :, None, None].to(y.dtype)
    return y if residual is None else y + residual


def group_norm_factors(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """As `pansharp_fast.ops.group_norm_factors`."""
    batch, channels, height, width = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    grouped = x.reshape(batch, groups, channels // groups * height * width).to(wide)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    slope = (variance + eps).rsqrt().repeat_interleave(channels // groups, 1)
    if weight is not None:
        slope = slope * weight.to(wide)
    shift = -mean.repeat_interleave(channels // groups, 1) * slope
    return slope, shift if bias is None else shift + bias.to(wide)
