"""Normalisations and sums of residual blocks, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .convolution import group_norm_factors


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """As `pansharp_fast.ops.group_norm`."""
    x = _moved(x, offset)
    slope, level = group_norm_factors(x, groups, weight, bias, eps=eps)
    y = (x * slope[:, :, None, None] + level[:, :, None, None]).to(x.dtype)
    return _activated(y, scale, shift, silu)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """As `pansharp_fast.ops.layer_norm`."""
    x = _moved(x, offset)
    weight, bias = (None if each is None else each.to(x.dtype) for each in (weight, bias))
    y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)
    return _activated(y, scale, shift, silu)


def gated_sum(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    gate_a: Tensor | None = None,
    gate_b: Tensor | None = None,
) -> Tensor:
    """As `pansharp_fast.ops.gated_sum`."""
    for term, bias, gate in ((a, bias_a, gate_a), (b, bias_b, gate_b)):
        if term is None:
            continue
        if bias is not None:
            term = term + bias[:, None, None].to(x.dtype)
        x = x + (term if gate is None else term * gate[:, :, None, None].to(x.dtype))
    return x


def join(
    x: Tensor,
    *others: Tensor,
    bias: Tensor | None = None,
    one: bool = False,
    impulse: Tensor | None = None,
    channels: int | None = None,
) -> Tensor:
    """As `pansharp_fast.ops.join`."""
    batch, _, height, width = x.shape
    parts = [_moved(x, bias), *(other.to(x.dtype) for other in others)]
    if one:
        parts.append(x.new_ones(batch, 1, height, width))
    if impulse is not None:
        index = torch.arange(height * width, device=x.device).view(1, 1, height, width)
        parts.append(torch.where(index == height * width // 2, impulse.to(x.dtype)[:, None, None, None], 0))
    missing = 0 if channels is None else channels - sum(part.shape[1] for part in parts)
    parts.append(x.new_zeros(batch, missing, height, width))
    return torch.cat(parts, 1)


def _moved(x: Tensor, offset: Tensor | None) -> Tensor:
    return x if offset is None else x + offset[..., None, None].to(x.dtype)


def _activated(y: Tensor, scale: Tensor | None, shift: Tensor | None, silu: bool) -> Tensor:
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None].to(y.dtype)) + shift[:, :, None, None].to(y.dtype)
    return F.silu(y) if silu else y
