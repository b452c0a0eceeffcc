"""Cross-modality-consistent local attention: PAN and MS neighbourhoods attended by one query."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, cast, plainly, register, select, tf32_allowed

WINDOWS = (3, 5)
#: What GPU kernels take: they accumulate in float32.
REDUCED = (torch.float32, torch.bfloat16, torch.float16)


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Local attention of one query over its window in two modalities (PAN-Crafter, ICCV 2025, equations 9-12).

    Per pixel x, head and modality, with J = window**2 candidates j and offsets p of the window:

        nb(k)[d,j](x) = sum_p weight[d,j,p] * k[d](x+p) + bias[d,j]
        out(x) = sum_j softmax_j(scale * sum_d q[d](x) * nb(k)[d,j](x)) * nb(v)[d,j](x)

    Outside the image k and v are zero and take part in the softmax. The J-fold expansion never exists in memory.
    On GPUs float32 uses TF32 products only where torch's own setting allows them
    (`torch.backends.cuda.matmul.fp32_precision`, `torch.set_float32_matmul_precision`).

    Args:
        q, k_pan, v_pan, k_ms, v_ms: [B, C, H, W] of one shape, dtype and device, any strides; C = num_heads * D, head h
            holds channels h*D to (h+1)*D-1. float32, float64, bfloat16 or float16 (the last two accumulate in float32).
            Under autocast they may differ in dtype and are cast to that of autocast.
        weight: [D, J, window, window], shared by heads, keys, values and modalities, any floating dtype. None:
            candidate j is the pixel at offset (j // window - window // 2, j % window - window // 2).
        bias: [D, J], only together with weight.
        num_heads: number of heads.
        window: 3 or 5.
        scale: factor of the logits, D ** -0.5 if None.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`); its backward runs there too.

    Returns:
        out_pan, out_ms: [B, C, H, W] of q's dtype, channels_last where q is, contiguous otherwise.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    q, k_pan, v_pan, k_ms, v_ms = tensors = cast((q, k_pan, v_pan, k_ms, v_ms))
    scale = _check(tensors, weight, bias, num_heads, window, scale)
    chosen = select(OPERATOR, tensors, backend)
    if chosen == "reference":
        with plainly(q):
            return reference.cm3a(
                q, k_pan, v_pan, k_ms, v_ms, weight, bias, num_heads=num_heads, window=window, scale=scale
            )
    if weight is not None:
        # Kernels read the small factor in the type they accumulate in.
        accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
        weight = weight.to(accumulate).contiguous()
        bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias.to(accumulate).contiguous()
    channels_last = q.is_contiguous(memory_format=torch.channels_last) and not q.is_contiguous()
    options = (num_heads, window, scale, channels_last, tf32_allowed())
    return _library.call("cm3a_fwd", chosen, *tensors, weight, bias, *options)


def _check(
    tensors: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    window: int,
    scale: float | None,
) -> float:
    """Raise ValueError for arguments that do not fit; return the scale."""
    q = tensors[0]
    if q.dim() != 4:
        raise ValueError(f"q: expected 4 dimensions [B, C, H, W], got {q.dim()}")
    for name, tensor in zip(("k_pan", "v_pan", "k_ms", "v_ms"), tensors[1:], strict=True):
        if tensor.shape != q.shape:
            raise ValueError(f"{name}: expected the shape of q {tuple(q.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected the device of q {q.device}, got {tensor.device}")
    if q.dtype not in FLOATING:
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    channels, height, width = q.shape[1:]
    if height < 1 or width < 1:
        raise ValueError(f"q: expected at least one pixel, got {height} x {width}")
    if num_heads < 1 or channels < 1 or channels % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the {channels} channels, got {num_heads}")
    if window not in WINDOWS:
        raise ValueError(f"window: expected one of {WINDOWS}, got {window}")
    dim, count = channels // num_heads, window**2
    if weight is None and bias is not None:
        raise ValueError("bias: expected None where weight is None, got a tensor")
    for name, factor, shape in (("weight", weight, (dim, count, window, window)), ("bias", bias, (dim, count))):
        if factor is None:
            continue
        if tuple(factor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(factor.shape)}")
        if not factor.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {factor.dtype}")
        if factor.device != q.device:
            raise ValueError(f"{name}: expected the device of q {q.device}, got {factor.device}")
    return float(dim**-0.5 if scale is None else scale)


def _like_q(q: Tensor, channels_last: bool) -> Tensor:
    """An output: q's shape and dtype, in one of the two dense layouts."""
    return torch.empty_like(q, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _forward_fake(
    q: Tensor,
    k_pan: Tensor,
    v_pan: Tensor,
    k_ms: Tensor,
    v_ms: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    window: int,
    scale: float,
    channels_last: bool,
    tf32: bool,
) -> tuple[Tensor, Tensor]:
    return _like_q(q, channels_last), _like_q(q, channels_last)


def _backward_fake(
    grad_pan: Tensor,
    grad_ms: Tensor,
    q: Tensor,
    k_pan: Tensor,
    v_pan: Tensor,
    k_ms: Tensor,
    v_ms: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    window: int,
    scale: float,
    channels_last: bool,
    tf32: bool,
) -> tuple[Tensor, ...]:
    gradients = tuple(_like_q(q, channels_last) for _ in range(5))
    if weight is None:
        return (*gradients, q.new_empty(0), q.new_empty(0))
    count = window * window
    return (*gradients, weight.new_empty(weight.shape), weight.new_empty((weight.shape[0], count)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad_pan: Tensor, grad_ms: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = _library.call("cm3a_bwd", ctx.backend, grad_pan, grad_ms, *tensors, *ctx.options)
    if tensors[5] is None:
        gradients = (*gradients[:5], None, None)
    return (*gradients, None, None, None, None, None)


_TENSORS = "Tensor q, Tensor k_pan, Tensor v_pan, Tensor k_ms, Tensor v_ms, Tensor? weight, Tensor? bias"
_OPTIONS = "int num_heads, int window, float scale, bool channels_last, bool tf32"
_library.define(
    "cm3a_fwd",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_forward_fake,
    triton_module="cm3a",
    setup_context=_setup_context,
    backward=_backward,
)
_library.define(
    "cm3a_bwd",
    f"(Tensor grad_pan, Tensor grad_ms, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    triton_module="cm3a",
)


def _selfcheck(backend: str, device: torch.device) -> None:
    """Raise where `backend` disagrees with the reference on a tiny call, forward or backward."""
    generator = torch.Generator().manual_seed(0)
    tolerance = 1e-2 if tf32_allowed() else 1e-3  # logits are rounded to TF32's 11 bits then
    for learned in (True, False):
        shapes = [(1, 16, 5, 7)] * 5 + [(8, 9, 3, 3), (8, 9)] * learned
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        exact = [value.requires_grad_() for value in values]
        leaves = [value.detach().to(device, torch.float32).requires_grad_() for value in values]
        expected = torch.stack(reference.cm3a(*exact, num_heads=2))
        actual = torch.stack(cm3a(*leaves, num_heads=2, backend=backend))
        torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=tolerance)
        gradients = torch.autograd.grad(actual.square().sum(), leaves)
        for got, want in zip(gradients, torch.autograd.grad(expected.square().sum(), exact), strict=True):
            torch.testing.assert_close(got.double().cpu(), want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (2, 2, 4, 5, 6),
        (2, 2, 16, 9, 11),
        (1, 3, 5, 1, 1),
        (1, 1, 8, 21, 67),
        (1, 2, 4, 1, 40),
        (1, 2, 32, 13, 3),
    )
    for shape, learned, channels_last, window in itertools.product(shapes, (True, False), (False, True), WINDOWS):
        batch, heads, dim, height, width = shape
        layout = torch.channels_last if channels_last else torch.contiguous_format
        maps = [torch.randn(batch, heads * dim, height, width, generator=generator) for _ in range(5)]
        factor = []
        if learned:
            factor.append(torch.randn(dim, window**2, window, window, generator=generator) / window)
            factor.append(torch.randn(dim, window**2, generator=generator))
        yield Sample(
            f"{batch}x{heads}x{dim}x{height}x{width} {window} learned={learned} channels_last={channels_last}",
            functools.partial(cm3a, num_heads=heads, window=window),
            (
                *(each.to(device, dtype).contiguous(memory_format=layout) for each in maps),
                *(each.to(device, dtype) for each in factor),
            ),
        )


OPERATOR = register(
    Operator(
        name="cm3a",
        support={
            "cuda": Support(devices=("cuda",), dtypes=REDUCED),
            "triton": Support(devices=("cuda", "xpu"), dtypes=REDUCED),
            "cpu": Support(devices=("cpu",), dtypes=FLOATING),
            "reference": Support(devices=("cpu", "cuda", "xpu", "mps", "meta"), dtypes=FLOATING),
        },
        selfcheck=_selfcheck,
        samples=_samples,
    )
)
