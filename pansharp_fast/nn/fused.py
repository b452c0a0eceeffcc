"""How the diffusion networks compute at inference on a CPU: features in channels_last, and operators joined.

What stands here gives what the plain modules give, up to rounding; those remain the definition, and the way of
training, of other devices, of layers that users changed (`plain`) and of the backend "reference".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops import conv3x3, group_norm_factors
from .convolution import inference
from .plain import traced

#: What a strip of rows may hold of the largest thing in it: memory freed below 32 MiB is used again by the next strip.
_STRIP_BYTES = 16 << 20


def fused(module: nn.Module, x: Tensor) -> bool:
    """Whether a module whose layers are plain may compute this way for x."""
    return inference(x) and x.dtype == torch.float32 and not module.training and not traced()


def conv_silu_conv(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """x + conv(silu(conv(x))), strip by strip, so that what stands between is never there as a whole."""
    out, height = torch.empty_like(x), x.shape[2]
    for image, rows in strips(x, first.shape[0]):
        # A strip's result needs one row more of what stands between, and that one row more of x.
        inner, outer = (slice(max(rows.start - n, 0), min(rows.stop + n, height)) for n in (1, 2))
        hidden = conv3x3(x[image, :, outer], first)[:, :, inner.start - outer.start :][:, :, : inner.stop - inner.start]
        y = conv3x3(hidden, second, bias, silu=True, residual=x[image, :, inner])
        if y.shape == x.shape:
            return y
        out[image, :, rows] = y[:, :, rows.start - inner.start :][:, :, : rows.stop - rows.start]
    return out


def strips(x: Tensor, channels: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the rows of x [B, C, H, W], one image each, with `channels` values a pixel at work."""
    height, width = x.shape[2:]
    count = -(-height * width * channels * x.itemsize // _STRIP_BYTES)
    rows = -(-height // (4 * count)) * 4  # the convolutions' tiles have four
    for image in range(len(x)):
        for first in range(0, height, rows):
            yield slice(image, image + 1), slice(first, min(first + rows, height))


def channels_at_once(x: Tensor) -> int:
    """Channels of maps of x's size [B, _, H, W] that may be worked on together."""
    return max(1, _STRIP_BYTES // (x.shape[0] * x.shape[2] * x.shape[3] * x.itemsize))


def normalized(x: Tensor, norm: nn.GroupNorm, overwrite: bool) -> Tensor:
    """norm(x) in channels_last; `overwrite`: in x's own memory where that is its layout."""
    x = x.contiguous(memory_format=torch.channels_last)
    factors = group_norm_factors(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
    scale, shift = (factor[:, :, None, None] for factor in factors)
    return torch.addcmul(shift, x, scale, out=x) if overwrite else torch.addcmul(shift, x, scale)


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels_last as [B, H W, C], the same memory."""
    return x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1])


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution of an image in channels_last, weight [O, C, 1, 1], into contiguous maps [B, O, H, W]."""
    matrix = weight.flatten(1).expand(x.shape[0], -1, -1)
    return torch.baddbmm(bias[:, None], matrix, pixels(x).transpose(1, 2)).unflatten(2, x.shape[2:])
