"""3x3 convolutions of residual blocks, with the normalisation and activation before and the sum behind them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, cast, no_gradient, plainly, register, select


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """conv(act(scale·x + shift)) + bias + residual: stride 1, a border of one zero around what is convolved.

    The CPU kernel is Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016), a quarter of the multiplications, with a
    rounding error of some 1e-6 of the largest value; large images in 16 bits take F(6x6, 3x3). It computes in float32
    whatever the dtype. It is for inference: where a gradient is wanted the reference runs.

    Args:
        x: [B, C, H, W], float32, bfloat16, float16 or (reference only) float64; the kernel wants channels_last and
            copies other layouts.
        weight: [O, C, 3, 3].
        bias: [O], or [B, O] where it differs from image to image.
        scale, shift: [B, C], both or neither; `group_norm_factors` gives those of a group norm.
        silu: whether act is SiLU; otherwise it is nothing.
        residual: [B, O, H, W] of x's dtype; under autocast, where the two differ, both are cast to that of autocast.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, O, H, W] of x's dtype; the cpu backend gives channels_last.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    if residual is not None:
        x, residual = cast((x, residual))
    optional = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    tensors = [x, weight, *(tensor for tensor in optional.values() if tensor is not None)]
    _check(x, weight, bias, scale, shift, residual)
    if select(OPERATOR, tensors, backend) == "reference":
        with plainly(x):
            return reference.conv3x3(x, weight, bias, scale=scale, shift=shift, silu=silu, residual=residual)
    bias, scale, shift = (None if t is None else t.float().contiguous() for t in (bias, scale, shift))
    return torch.ops.pansharp_fast.conv3x3_fwd(x, weight, bias, scale, shift, residual, silu)


def group_norm_factors(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and shift [B, C] with which scale·x + shift is the group norm of x (Wu and He, ECCV 2018).

    Args:
        x: [B, C, H, W], floating.
        groups: a divisor of C.
        weight, bias: [C], the norm's own.
        eps: added to the variance.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        scale, shift: [B, C] in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _check_image(x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels, got {groups}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (channels,):
            raise ValueError(f"{name}: expected shape {(channels,)}, got {tuple(tensor.shape)}")
    tensors = [x, *(tensor for tensor in (weight, bias) if tensor is not None)]
    if select(OPERATOR, tensors, backend) == "reference":
        with plainly(x):
            return reference.group_norm_factors(x, groups, weight, bias, eps=eps)
    weight, bias = (None if t is None else t.float().contiguous() for t in (weight, bias))
    return torch.ops.pansharp_fast.group_norm_factors(x, weight, bias, groups, eps)


def _check_image(x: Tensor) -> None:
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [B, C, H, W] with at least one channel and pixel, got {tuple(x.shape)}")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None
) -> None:
    """Raise ValueError for arguments that do not fit."""
    _check_image(x)
    batch, channels, height, width = x.shape
    if weight.dim() != 4 or weight.shape[0] < 1 or tuple(weight.shape[1:]) != (channels, 3, 3):
        raise ValueError(f"weight: expected [O, {channels}, 3, 3], got {tuple(weight.shape)}")
    outputs = weight.shape[0]
    if bias is not None and tuple(bias.shape) not in ((outputs,), (batch, outputs)):
        raise ValueError(f"bias: expected shape {(outputs,)} or {(batch, outputs)}, got {tuple(bias.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("shift: expected together with scale, got one of them")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and tuple(tensor.shape) != (batch, channels):
            raise ValueError(f"{name}: expected shape {(batch, channels)}, got {tuple(tensor.shape)}")
    if residual is not None:
        if tuple(residual.shape) != (batch, outputs, height, width):
            raise ValueError(f"residual: expected shape {(batch, outputs, height, width)}, got {tuple(residual.shape)}")
        if residual.dtype != x.dtype:
            raise ValueError(f"residual: expected the dtype of x {x.dtype}, got {residual.dtype}")


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], weight.shape[0])).permute(0, 3, 1, 2)


def _factors_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)


_library.define(
    "conv3x3_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, bool silu) -> Tensor",
    fake=_forward_fake,
)
_library.define(
    "group_norm_factors",
    "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps) -> (Tensor, Tensor)",
    fake=_factors_fake,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Both operators of this file."""
    generator = torch.Generator().manual_seed(0)

    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, wide)

    for batch, channels, outputs, height, width, silu in (
        (2, 4, 3, 5, 6, True),
        (1, 32, 32, 16, 16, False),
        (2, 17, 40, 37, 21, True),
        (3, 1, 1, 1, 1, True),
        (1, 48, 129, 4, 70, True),
    ):
        x = random(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
        weight = (random(outputs, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
        vectors = (random(batch, outputs), random(batch, channels) + 1, random(batch, channels))
        residual = random(batch, outputs, height, width)
        size = f"{batch}x{channels}x{height}x{width} {outputs}"

        def convolve(*tensors: Tensor, backend: str | None, silu: bool = silu) -> tuple[Tensor, ...]:
            x, weight, bias, scale, shift, residual = tensors
            options: Any = {"bias": bias, "scale": scale, "shift": shift, "residual": residual, "silu": silu}
            return (conv3x3(x, weight, **options, backend=backend),)

        yield Sample(f"conv3x3 {size}", convolve, (x, weight, *vectors, residual.to(dtype)))
        # Means away from zero: shifts are proportional to them.
        yield Sample(f"factors {size}", functools.partial(group_norm_factors, groups=1), (x + 2,))


_KERNEL: Any = (torch.float32, torch.bfloat16, torch.float16)
OPERATOR = register(
    Operator(
        name="conv3x3",
        support={
            "cpu": Support(devices=("cpu",), dtypes=_KERNEL, check=no_gradient),
            "reference": Support(devices=("cpu", "cuda", "xpu", "mps", "meta"), dtypes=FLOATING),
        },
        samples=_samples,
    )
)
