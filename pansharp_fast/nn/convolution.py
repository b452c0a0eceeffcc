"""3x3 convolutions, alone and in the residual blocks of the networks, which spend most of their arithmetic in them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops._backends import interpreting, requested, transformed, unavailable
from .plain import is_plain, is_plain_conv, pads_with_zeros, traced
from .recompute import recomputed

#: From these sizes on Winograd's fewer multiplications outweigh its transforms; with norm, activation and residual in
#: the same pass fewer outputs suffice.
_CHANNELS, _FUSED_OUTPUTS, _PIXELS = 24, 8, 32 * 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Bytes of an MLP's hidden values that are worked on at a time.
_STRIP_BYTES = 4 << 20


class Conv3x3(nn.Conv2d):
    """3x3 convolution with a border of zeros and stride 1.

    At inference on the CPU large maps go through `ops.conv3x3`, which the backend "reference" avoids.
    """

    def __init__(self, channels: int, out: int, bias: bool = True) -> None:
        super().__init__(channels, out, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if pads_with_zeros(self, 3) and _pays(self, x, _CHANNELS):
            return ops.conv3x3(x, self.weight, self.bias)
        return super().forward(x)


class LayerNorm(nn.Module):
    """Layer norm over the channels of each pixel of [B, C, H, W]; free of copies in channels_last."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if gpu_inference(x):
            return ops.layer_norm(x, self.weight, self.bias)
        return self.normalise(x, self.weight, self.bias)

    def normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of x with other factors."""
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps=1e-6).permute(0, 3, 1, 2)


def norm_silu_conv(
    layers: nn.Sequential,
    x: Tensor,
    *,
    modulation: tuple[Tensor, Tensor] | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """conv(dropout(silu(norm(x)·(1 + scale) + offset))) + shift + residual, in as few passes as pays.

    Args:
        layers: norm (`nn.GroupNorm` or `LayerNorm`), SiLU, possibly dropout, 3x3 convolution with a border of zeros.
        x: [B, C, H, W].
        modulation: scale and offset, each [B, C]; None: norm(x) as it is.
        shift: [B, O], added to the result.
        residual: [B, O, H, W], added to the result.
    """
    if modulation is None and not is_plain(layers, nn.Sequential):
        x = layers(x)
    elif _joins(layers) and _pays(layers[-1], x, _FUSED_OUTPUTS):
        norm: Any = layers[0]
        conv: Any = layers[-1]
        bias = conv.bias
        if shift is not None:
            bias = shift.float() if bias is None else shift.float() + bias.float()
        if not isinstance(norm, nn.GroupNorm):
            x = _modulated(norm, x, modulation)
            return ops.conv3x3(x, conv.weight, bias, silu=True, residual=residual)
        scale, offset = ops.group_norm_factors(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps)
        if modulation is not None:
            factor = 1 + modulation[0].float()
            scale, offset = scale * factor, offset * factor + modulation[1].float()
        return ops.conv3x3(x, conv.weight, bias, scale=scale, shift=offset, silu=True, residual=residual)
    elif _joins(layers) and gpu_inference(x):
        return _finished(layers[-1], normalised(layers[0], x, modulation=modulation), shift, residual)
    else:
        x = recomputed(_in_turn, layers, x, modulation, random=any(isinstance(each, nn.Dropout) for each in layers))
    if shift is not None:
        x = x + shift[:, :, None, None]
    return x if residual is None else x + residual


def two_convolutions(
    first: nn.Sequential,
    second: nn.Sequential,
    shortcut: nn.Module,
    x: Tensor,
    *,
    shift: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A residual block: `second` of `first` of x, each as in `norm_silu_conv`, plus the shortcut of x.

    Args:
        first, second: layers as for `norm_silu_conv`.
        shortcut: what is added to the result.
        x: [B, C, H, W].
        shift: [B, O], added to the result of `first`.
        modulation: of the norm in `second`.
    """
    plain = is_plain(first, nn.Sequential) and is_plain(second, nn.Sequential) and _joins(first) and _joins(second)
    if not (plain and gpu_inference(x)):
        between = norm_silu_conv(first, x, shift=shift)
        return norm_silu_conv(second, between, modulation=modulation, residual=shortcut(x))
    conv: Any = first[-1]
    between = F.conv2d(normalised(first[0], x), conv.weight, padding=1)
    # The bias of the first convolution is added where the second norm reads its result.
    offset = shift if conv.bias is None else conv.bias if shift is None else conv.bias + shift
    hidden = normalised(second[0], between, offset=offset, modulation=modulation)
    return _finished(second[-1], hidden, None, shortcut(x))


def group_normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x) of an `nn.GroupNorm` or what stands in its place."""
    return normalised(norm, x, silu=False) if is_plain(norm, nn.GroupNorm) and gpu_inference(x) else norm(x)


def normalised(
    norm: Any,
    x: Tensor,
    *,
    offset: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(norm(x + offset)·(1 + scale) + shift) by the operators; norm: a plain `nn.GroupNorm` or `LayerNorm`."""
    scale, shift = modulation or (None, None)
    options: Any = {"offset": offset, "scale": scale, "shift": shift, "silu": silu}
    if isinstance(norm, nn.GroupNorm):
        return ops.group_norm(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, **options)
    return ops.layer_norm(x, norm.weight, norm.bias, **options)


def _in_turn(layers: nn.Sequential, x: Tensor, modulation: tuple[Tensor, Tensor] | None) -> Tensor:
    norm, *rest = layers
    x = _modulated(norm, x, modulation)
    for layer in rest:
        x = layer(x)
    return x


def _finished(conv: Any, x: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    """conv(x) + shift + residual; PyTorch adds a bias on GPUs in a pass of its own, here it goes with the residual."""
    if residual is not None and shift is None:
        y = F.conv2d(x, conv.weight, padding=1)
        if y.dtype == residual.dtype:
            return ops.gated_sum(residual, y, bias_a=conv.bias)
        x = y if conv.bias is None else y + conv.bias[:, None, None]
    else:
        x = conv(x)
    if shift is not None:
        x = x + shift[:, :, None, None]
    return x if residual is None else x + residual


def _joins(layers: nn.Sequential) -> bool:
    """Whether the layers are those that `norm_silu_conv` may compute in one pass."""
    if len(layers) < 3:
        return False
    norm, silu, *between, conv = layers
    return (
        is_plain(norm, nn.GroupNorm, LayerNorm)
        and is_plain(silu, nn.SiLU)
        and all(is_plain(layer, nn.Dropout, nn.Identity) for layer in between)
        and is_plain_conv(conv, 3)
    )


def _modulated(norm: Any, x: Tensor, modulation: tuple[Tensor, Tensor] | None) -> Tensor:
    """norm(x)·(1 + scale) + offset."""
    if modulation is None:
        return norm(x)
    scale, offset = modulation
    if len(x) > 1 or not is_plain(norm, nn.GroupNorm, LayerNorm):
        return norm(x) * (1 + scale[:, :, None, None]) + offset[:, :, None, None]
    # One image: the modulation is folded into the norm's own affine map, which saves a pass over the features.
    factor = 1 + scale[0]
    weight = factor if norm.weight is None else norm.weight * factor
    bias = offset[0] if norm.bias is None else norm.bias * factor + offset[0]
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    return norm.normalise(x, weight, bias)


def joined(x: Tensor, *others: Tensor) -> Tensor:
    """`torch.cat` of [B, C, H, W] tensors along channels, in channels_last where x is, whatever the others are."""
    if transformed() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.cat([x, *others], 1)
    return torch.cat([tensor.permute(0, 2, 3, 1) for tensor in (x, *others)], 3).permute(0, 3, 1, 2)


def joined_conv(conv: nn.Conv2d, x: Tensor, *others: Tensor) -> Tensor:
    """conv of `joined(x, *others)`, the others cast to x's dtype.

    Args:
        conv: stride 1, a border of zeros that keeps the size.
        x: [B, C, H, W]. others: up to three [B, _, H, W].
    """
    (result,) = joined_convs(conv, 1, x, *others)
    return result


def joined_convs(conv: nn.Conv2d, parts: int, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The result of `joined_conv` as so many equal parts of its channels."""
    size = int(conv.kernel_size[0]) if isinstance(conv, nn.Conv2d) else 0
    plain = size > 0 and is_plain_conv(conv, size)
    if plain and x.is_cuda and conv.weight.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    if not (plain and gpu_inference(x)):
        return conv(joined(x, *(other.to(x.dtype) for other in others))).chunk(parts, 1)
    # Zeros fill the channels up to a multiple of 8, what tensor cores want. PyTorch would add the bias in a pass of its
    # own: in 16 bits it is the weight of a channel of ones (float32 would round it to TF32).
    fold = conv.bias is not None and x.dtype != torch.float32
    channels = -(-(conv.in_channels + fold) // 8) * 8
    inputs = ops.join(x, *others, one=fold, channels=channels)
    weight = conv.weight
    if channels > conv.in_channels:
        weight = ops.join(weight, impulse=conv.bias if fold else None, channels=channels)
    biases = [None] * parts if fold or conv.bias is None else conv.bias.chunk(parts)
    return tuple(F.conv2d(inputs, w, b, padding=size // 2) for w, b in zip(weight.chunk(parts), biases, strict=True))


def mlp(first: nn.Linear, second: nn.Linear, x: Tensor) -> Tensor:
    """second(gelu(first(x))) of [..., C], the tanh form of GELU.

    At inference on the CPU oneDNN computes it, a strip of pixels at a time: what stands between stays in the cache.
    """
    plain = all(is_plain(layer, nn.Linear) and layer.weight.dtype == x.dtype for layer in (first, second))
    if plain and first.bias is not None and x.is_cuda and not torch.is_grad_enabled() and not traced():
        pixels = x.reshape(-1, first.in_features)  # cuBLASLt: bias and activation come with the product
        hidden = torch._addmm_activation(first.bias, pixels, first.weight.t(), use_gelu=True)
        return second(hidden).view(*x.shape[:-1], -1)
    if not (plain and inference(x) and not traced() and _onednn_multiplies(x.dtype)):
        return second(F.gelu(first(x), approximate="tanh"))
    linear: Any = torch.ops.mkldnn._linear_pointwise
    pixels = x.reshape(-1, first.in_features)
    out = x.new_empty(len(pixels), second.out_features)
    size = max(1, _STRIP_BYTES // (first.out_features * x.itemsize))
    for strip, result in zip(*(t.split(size) for t in (pixels, out)), strict=True):
        hidden = linear(strip, first.weight, first.bias, "gelu", [], "tanh")
        result.copy_(linear(hidden, second.weight, second.bias, "none", [], ""))
    return out.view(*x.shape[:-1], -1)


@functools.cache
def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has linear layers of this dtype on this CPU."""
    operators: Any = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(operators, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return operators._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or operators._is_mkldnn_fp16_supported()


def inference(x: Tensor) -> bool:
    """Whether faster forms of the same computation may run: on the CPU, for a result alone."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not transformed()
        and requested()[0] in ("auto", "cpu")
        and unavailable("cpu") is None
    )


def gpu_inference(x: Tensor) -> bool:
    """Whether norms and sums of x [B, C, H, W] may run by the Triton kernels: in channels_last, for a result alone.

    On the CPU only where that backend is named and the interpreter on.
    """
    name = requested()[0]
    return (
        ((x.is_cuda and name in ("auto", "triton")) or (name == "triton" and interpreting()))
        and x.dtype in _DTYPES
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_grad_enabled()
        and not transformed()
        and not traced()
        and unavailable("triton") is None
    )


def _pays(conv: Any, x: Tensor, outputs: int) -> bool:
    """Whether a 3x3 convolution of x with at least so many outputs goes through `ops.conv3x3`."""
    return (
        inference(x)
        and not torch.jit.is_tracing()
        and type(conv.weight) in (nn.Parameter, Tensor)
        and x.dtype == conv.weight.dtype
        and conv.in_channels >= _CHANNELS
        and conv.out_channels >= outputs
        and x.shape[-2] * x.shape[-1] >= _PIXELS
    )
