"""Cross-modality-consistent local attention (PAN-Crafter, ICCV 2025, equations 9-12) in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbours(x: Tensor, weight: Tensor | None, bias: Tensor | None, num_heads: int, window: int) -> Tensor:
    """nb(x)[d,j](y) = sum_p W[d,j,p] x[d](y+p) + b[d,j], zero outside the image; W=None: the pixel at offset j.

    Args:
        x: [B, heads*D, H, W]. weight: [D, J, window, window] or None. bias: [D, J] or None. J = window**2.

    Returns:
        [B, heads, D, J, H, W].
    """
    batch, channels, height, width = x.shape
    dim = channels // num_heads
    if weight is None:
        radius = window // 2
        padded = F.pad(x, (radius, radius, radius, radius))
        shifted = [padded[..., i : i + height, j : j + width] for i in range(window) for j in range(window)]
        return torch.stack(shifted, 2).view(batch, num_heads, dim, window**2, height, width)
    filters = weight.to(x.dtype).reshape(dim * window**2, 1, window, window)
    offsets = None if bias is None else bias.to(x.dtype).reshape(-1)
    heads = x.reshape(batch * num_heads, dim, height, width)
    mixed = F.conv2d(heads, filters, offsets, padding=window // 2, groups=dim)
    return mixed.view(batch, num_heads, dim, window**2, height, width)


def cm3a(
    q: Tensor,
    k_pan: Tensor,
    v_pan: Tensor,
    k_ms: Tensor,
    v_ms: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_heads: int,
    window: int = 3,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `pansharp_fast.ops.cm3a`, with every neighbour expanded in memory."""
    batch, channels, height, width = q.shape
    dim = channels // num_heads
    scale = dim**-0.5 if scale is None else scale
    query = q.reshape(batch, num_heads, dim, 1, height, width)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        logits = (query * neighbours(k, weight, bias, num_heads, window)).sum(2, keepdim=True) * scale
        attention = logits.softmax(3)  # over the J neighbours; outside pixels take part with key and value 0
        return (attention * neighbours(v, weight, bias, num_heads, window)).sum(3).reshape(q.shape)

    return attend(k_pan, v_pan), attend(k_ms, v_ms)
