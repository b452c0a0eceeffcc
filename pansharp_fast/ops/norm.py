"""Normalisations and sums of residual blocks on GPUs, each in as few passes over the features as it needs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, plainly, register, select

#: Channels that a layer norm's kernel holds at once.
_WIDEST = 8192


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
    backend: str | None = None,
) -> Tensor:
    """act(norm(x + offset)·(1 + scale) + shift), where norm is a group norm (Wu and He, ECCV 2018).

    The kernels are for inference: where a gradient is wanted the reference runs. They compute in float32.

    Args:
        x: [B, C, H, W], float32, bfloat16, float16 or (reference only) float64; kernels want channels_last and copy
            other layouts.
        groups: a divisor of C.
        weight, bias: [C], the norm's own.
        eps: added to the variance.
        offset: [C] or [B, C], such as the bias of the convolution that x comes from without it.
        scale, shift: [B, C], both or neither.
        silu: whether act is SiLU; otherwise it is nothing.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, C, H, W] of x's dtype; kernels give channels_last.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _check_image(x)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels, got {groups}")
    given = _given(x, {"weight": weight, "bias": bias}, offset, scale, shift)
    if select(OPERATOR, (x, *given), backend) == "reference":
        with plainly(x):
            return reference.group_norm(
                x, groups, weight, bias, eps=eps, offset=offset, scale=scale, shift=shift, silu=silu
            )
    return torch.ops.pansharp_fast.norm_fwd_triton(x, weight, bias, offset, scale, shift, groups, eps, silu)


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
    backend: str | None = None,
) -> Tensor:
    """act(norm(x + offset)·(1 + scale) + shift), where norm is over the channels of each pixel (arXiv 1607.06450).

    Args:
        x: [B, C, H, W] as for `group_norm`.
        weight, bias, eps, offset, scale, shift, silu, backend: as for `group_norm`.

    Returns:
        [B, C, H, W] of x's dtype; kernels give channels_last.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _check_image(x)
    given = _given(x, {"weight": weight, "bias": bias}, offset, scale, shift)
    if select(OPERATOR, (x, *given), backend, channels=x.shape[1]) == "reference":
        with plainly(x):
            return reference.layer_norm(x, weight, bias, eps=eps, offset=offset, scale=scale, shift=shift, silu=silu)
    return torch.ops.pansharp_fast.norm_fwd_triton(x, weight, bias, offset, scale, shift, 0, eps, silu)


def gated_sum(
    x: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    *,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    gate_a: Tensor | None = None,
    gate_b: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x + gate_a·(a + bias_a) + gate_b·(b + bias_b).

    Args:
        x, a, b: [B, C, H, W] of one shape and dtype, as for `group_norm`.
        bias_a, bias_b: [C]; None: 0.
        gate_a, gate_b: [B, C]; None: 1.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, C, H, W] of x's dtype; kernels give channels_last.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _check_image(x)
    for name, term in (("a", a), ("b", b)):
        if term is not None and term.shape != x.shape:
            raise ValueError(f"{name}: expected the shape of x {tuple(x.shape)}, got {tuple(term.shape)}")
        if term is not None and term.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x {x.dtype}, got {term.dtype}")
    if b is None and (bias_b is not None or gate_b is not None):
        raise ValueError("b: expected together with bias_b or gate_b, got none")
    given = _fitting(x, {"bias_a": bias_a, "bias_b": bias_b}, {"gate_a": gate_a, "gate_b": gate_b})
    maps = (x, a) if b is None else (x, a, b)
    if select(OPERATOR, (*maps, *given), backend) == "reference":
        with plainly(x):
            return reference.gated_sum(x, a, b, bias_a=bias_a, bias_b=bias_b, gate_a=gate_a, gate_b=gate_b)
    return torch.ops.pansharp_fast.gated_sum_fwd_triton(x, a, b, bias_a, bias_b, gate_a, gate_b)


def join(
    x: Tensor,
    *others: Tensor,
    bias: Tensor | None = None,
    one: bool = False,
    impulse: Tensor | None = None,
    channels: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Channels of maps side by side: x + bias, others, then a channel of ones or an impulse, then zeros.

    A convolution of maps with ones by weights with an impulse of the bias, both of the same odd kernel size, adds the
    bias without a pass of its own.

    Args:
        x: [B, C, H, W] as for `group_norm`.
        others: up to three [B, _, H, W] of any floating dtype, cast to that of x.
        bias: [C].
        one: whether a channel of ones follows.
        impulse: [B], the value at the middle pixel of a channel that is 0 elsewhere; not together with one.
        channels: of the result, zeros at the end; None: no zeros.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, channels, H, W] of x's dtype; kernels give channels_last.

    Raises:
        ValueError: shapes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    _check_image(x)
    for other in others:
        if other.dim() != 4 or other.shape[:1] + other.shape[2:] != x.shape[:1] + x.shape[2:]:
            raise ValueError(f"others: expected [B, _, H, W] as x {tuple(x.shape)}, got {tuple(other.shape)}")
    if one and impulse is not None:
        raise ValueError("impulse: expected none together with one")
    if impulse is not None and impulse.shape != x.shape[:1]:
        raise ValueError(f"impulse: expected shape {tuple(x.shape[:1])}, got {tuple(impulse.shape)}")
    least = x.shape[1] + sum(other.shape[1] for other in others) + (one or impulse is not None)
    if channels is not None and channels < least:
        raise ValueError(f"channels: expected at least {least}, got {channels}")
    given = [x, *others, *_fitting(x, {"bias": bias}, {}), *([] if impulse is None else [impulse])]
    if select(OPERATOR, given, backend, maps=len(others)) == "reference":
        with plainly(x):
            return reference.join(x, *others, bias=bias, one=one, impulse=impulse, channels=channels)
    return torch.ops.pansharp_fast.join_fwd_triton(x, others, bias, impulse, channels or least, one)


def _check_image(x: Tensor) -> None:
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [B, C, H, W] with at least one channel and pixel, got {tuple(x.shape)}")


def _given(
    x: Tensor, vectors: dict[str, Tensor | None], offset: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor]:
    if (scale is None) != (shift is None):
        raise ValueError("shift: expected together with scale, got one of them")
    rows = {"scale": scale, "shift": shift}
    one = offset is not None and offset.dim() == 1  # for all images
    (vectors if one else rows)["offset"] = offset
    return _fitting(x, vectors, rows)


def _fitting(x: Tensor, vectors: dict[str, Tensor | None], rows: dict[str, Tensor | None]) -> list[Tensor]:
    """Those of `vectors` [C] and `rows` [B, C] that are given; ValueError where a shape does not fit."""
    for tensors, shape in ((vectors, x.shape[1:2]), (rows, x.shape[:2])):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return [tensor for tensor in (*vectors.values(), *rows.values()) if tensor is not None]


def _against(*tensors: Tensor, channels: int = 0, maps: int = 0) -> list[str]:
    found = []
    if maps > 3:
        found.append(f"others: expected at most 3, got {maps}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        found.append("gradients: expected none to be wanted, got a tensor that requires one")
    if channels > _WIDEST:
        found.append(f"channels: expected at most {_WIDEST} in a layer norm, got {channels}")
    return found


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).permute(0, 3, 1, 2)


_library.define(
    "norm_fwd",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? offset, Tensor? scale, Tensor? shift, int groups, float eps,"
    " bool silu) -> Tensor",
    fake=_fake,
    triton_module="norm",
)
_library.define(
    "gated_sum_fwd",
    "(Tensor x, Tensor a, Tensor? b, Tensor? bias_a, Tensor? bias_b, Tensor? gate_a, Tensor? gate_b) -> Tensor",
    fake=_fake,
    triton_module="norm",
)


def _join_fake(
    x: Tensor, others: Sequence[Tensor], bias: Tensor | None, impulse: Tensor | None, channels: int, one: bool
) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:], channels)).permute(0, 3, 1, 2)


_library.define(
    "join_fwd",
    "(Tensor x, Tensor[] others, Tensor? bias, Tensor? impulse, int channels, bool one) -> Tensor",
    fake=_join_fake,
    triton_module="norm",
)


def _selfcheck(backend: str, device: torch.device) -> None:
    """Raise where `backend` disagrees with the reference on small calls."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        for sample in _samples(device, dtype):
            exact = [tensor.detach().cpu().double() for tensor in sample.tensors]
            (actual,), (expected,) = (
                sample.run(*sample.tensors, backend=backend),
                sample.run(*exact, backend="reference"),
            )
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def run(function: Any, names: Sequence[str], silu: bool | None, **options: Any) -> Any:
        def call(x: Tensor, *tensors: Tensor, backend: str | None) -> tuple[Tensor, ...]:
            more = options if silu is None else {**options, "silu": silu}
            return (function(x, **dict(zip(names, tensors, strict=True)), **more, backend=backend),)

        return call

    affine, modulation = ("weight", "bias"), ("scale", "shift")
    for batch, channels, groups, height, width in (
        (2, 6, 3, 5, 7),
        (1, 32, 32, 12, 9),
        (3, 1, 1, 1, 1),
        (1, 96, 2, 20, 23),
        (2, 136, 1, 9, 33),
    ):
        # Means away from zero: squares that cancel would show.
        x = (random(batch, channels, height, width) + 3).contiguous(memory_format=torch.channels_last)
        vector, row = functools.partial(random, channels), functools.partial(random, batch, channels)
        size = f"{batch}x{channels}x{height}x{width}"
        every = (*affine, "offset", *modulation)
        yield Sample(
            f"group {groups} {size}",
            run(group_norm, every, True, groups=groups),
            (x, vector() + 1, vector(), vector(), row(), row()),
        )
        yield Sample(f"group {groups} {size} alone", run(group_norm, (), False, groups=groups), (x,))
        if channels > 1:  # of one channel nothing is left
            layered = {"channels": channels}
            tensors = (x, vector() + 1, vector(), row(), row(), row())
            yield Sample(f"layer {size}", run(layer_norm, every, True), tensors, layered)
            yield Sample(f"layer {size} alone", run(layer_norm, (), False), (x,), layered)
        names = ("a", "b", "bias_a", "bias_b", "gate_a", "gate_b")
        a, b = (random(*x.shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
        yield Sample(f"sum {size}", run(gated_sum, names, None), (x, a, b, vector(), vector(), row(), row()))
        yield Sample(f"sum of two {size}", run(gated_sum, ("a", "bias_a"), None), (x, a, vector()))
        others = random(batch, 3, height, width), random(batch, height, width, 2).permute(0, 3, 1, 2)
        ones = functools.partial(_joined, one=True, channels=channels + 8)
        yield Sample(f"join {size}", ones, (x, *others, vector()))
        yield Sample(f"join of two {size}", _joined, (x, a, vector()))
        impulse = functools.partial(_joined, impulse=random(batch), channels=channels + 12)
        yield Sample(f"join with an impulse {size}", impulse, (x, *others, vector()))


def _joined(*tensors: Tensor, backend: str | None, **options: Any) -> tuple[Tensor, ...]:
    *maps, bias = tensors
    impulse = options.pop("impulse", None)
    if impulse is not None:
        options["impulse"] = impulse.to(maps[0])
    return (join(*maps, bias=bias, **options, backend=backend),)


OPERATOR = register(
    Operator(
        name="norm",
        support={
            "triton": Support(
                devices=("cuda", "xpu"), dtypes=(torch.float32, torch.bfloat16, torch.float16), check=_against
            ),
            "reference": Support(devices=("cpu", "cuda", "xpu", "mps", "meta"), dtypes=FLOATING),
        },
        selfcheck=_selfcheck,
        samples=_samples,
    )
)
