# mypy: allow-untyped-defs, allow-incomplete-defs
"""cm3a in Triton: forward and backward for GPUs without the built extension, and under the interpreter on the CPU.

A program works on BLOCK pixels of one head of one image. With a learned neighbourhood both contractions over channels
and over candidates are small matrix products with W as the constant factor (`tl.dot`); the J-fold expansion exists in
registers only, one offset at a time. Channels are padded to DIMS and candidates to ROWS, both powers of two. All
arithmetic is in float32; values are converted right after each load.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Of the kernels that project: with Triton's 4 they spill registers.
WARPS = 8


@triton.jit
def _near(base, channel, pixel, y, x, height, width, dim, DIMS: tl.constexpr):
    """[DIMS, BLOCK] of a map at pixels (y, x); zero outside the image and beyond the head's channels."""
    d = tl.arange(0, DIMS)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    at = y.to(tl.int64) * width + x
    offsets = d.to(tl.int64)[:, None] * channel + at[None, :] * pixel
    return tl.load(base + offsets, mask=(d < dim)[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(base, channel, pixel, y, x, height, width, dim, value, DIMS: tl.constexpr):
    d = tl.arange(0, DIMS)
    inside = (y < height) & (x < width)
    offsets = d.to(tl.int64)[:, None] * channel + (y.to(tl.int64) * width + x)[None, :] * pixel
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=(d < dim)[:, None] & inside[None, :])


@triton.jit
def _weight(factor, p, dim, COUNT: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr):
    """[DIMS, ROWS]: W[:, :, p], or the bias for p = COUNT; zero in the padding."""
    d = tl.arange(0, DIMS)[:, None]
    j = tl.arange(0, ROWS)[None, :]
    return tl.load(factor + (p * dim + d) * COUNT + j, mask=(d < dim) & (j < COUNT), other=0.0)


@triton.jit
def _project(
    left, base, factor, channel, pixel, y, x, height, width, dim,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK]: sum_d left[d] nb(map)[d,j]."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    j = tl.arange(0, ROWS)[:, None]
    result = tl.zeros([ROWS, BLOCK], tl.float32)
    for p in range(COUNT):
        shifted_y = y + (p // WINDOW - WINDOW // 2)
        shifted_x = x + (p % WINDOW - WINDOW // 2)
        product = left * _near(base, channel, pixel, shifted_y, shifted_x, height, width, dim, DIMS)
        if LEARNED:
            weight = tl.trans(_weight(factor, p, dim, COUNT, DIMS, ROWS))
            result = tl.dot(weight, product, result, input_precision=PRECISION)
        else:
            result = tl.where(j == p, tl.sum(product, 0)[None, :], result)
    if LEARNED:
        weight = tl.trans(_weight(factor, COUNT, dim, COUNT, DIMS, ROWS))
        result = tl.dot(weight, left, result, input_precision=PRECISION)
    return result


@triton.jit
def _transfer(
    c, factor, p, dim, WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[DIMS, BLOCK]: sum_j c[j] W[d,j,p]."""
    if LEARNED:
        weight = _weight(factor, p, dim, WINDOW * WINDOW, DIMS, ROWS)
        result = tl.dot(weight, c, input_precision=PRECISION)
    else:
        picked = tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == p, c, 0.0), 0)
        result = tl.zeros([DIMS, BLOCK], tl.float32) + picked[None, :]
    return result


@triton.jit
def _mix(
    c, base, factor, channel, pixel, y, x, height, width, dim,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[DIMS, BLOCK]: sum_j c[j] nb(map)[d,j]."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    result = tl.zeros([DIMS, BLOCK], tl.float32)
    for p in range(COUNT):
        shifted_y = y + (p // WINDOW - WINDOW // 2)
        shifted_x = x + (p % WINDOW - WINDOW // 2)
        near = _near(base, channel, pixel, shifted_y, shifted_x, height, width, dim, DIMS)
        result += near * _transfer(c, factor, p, dim, WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION)
    if LEARNED:
        result += _transfer(c, factor, COUNT, dim, WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION)
    return result


@triton.jit
def _softmax(logits, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Over the candidates; zero in the padding."""
    real = tl.arange(0, ROWS)[:, None] < COUNT
    logits = tl.where(real, logits, float("-inf"))
    exponentials = tl.where(real, tl.exp(logits - tl.max(logits, 0)[None, :]), 0.0)
    return exponentials / tl.sum(exponentials, 0)[None, :]


@triton.jit
def _place(heads, dim, image, channel, height, width, BLOCK: tl.constexpr):
    """(head of the batch, offset of its first channel, y and x of the program's pixels)."""
    tiles = tl.cdiv(height * width, BLOCK)
    index = tl.program_id(0) // tiles
    at = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    origin = (index // heads).to(tl.int64) * image + (index % heads).to(tl.int64) * dim * channel
    return index.to(tl.int64), origin, at // width, at % width


@triton.jit
def _forward(
    q, k_pan, v_pan, k_ms, v_ms, factor, out_pan, out_ms, scale, heads, dim, image, channel, pixel, height, width,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    _, origin, y, x = _place(heads, dim, image, channel, height, width, BLOCK)
    query = _near(q + origin, channel, pixel, y, x, height, width, dim, DIMS)
    for modality in tl.static_range(2):
        k = k_pan if modality == 0 else k_ms
        v = v_pan if modality == 0 else v_ms
        out = out_pan if modality == 0 else out_ms
        logits = _project(
            query, k + origin, factor, channel, pixel, y, x, height, width, dim,
            WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION,
        )  # fmt: skip
        attention = _softmax(logits * scale, WINDOW * WINDOW, ROWS)
        result = _mix(
            attention, v + origin, factor, channel, pixel, y, x, height, width, dim,
            WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION,
        )  # fmt: skip
        _store(out + origin, channel, pixel, y, x, height, width, dim, result, DIMS)


@triton.jit
def _backward_query(
    grad_pan, grad_ms, q, k_pan, v_pan, k_ms, v_ms, factor, grad_q, space, scale,
    heads, dim, image, channel, pixel, height, width, plane,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q; attention a and logit gradient ds of both modalities into space [2, a | ds, B * heads, J, HW]."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    index, origin, y, x = _place(heads, dim, image, channel, height, width, BLOCK)
    query = _near(q + origin, channel, pixel, y, x, height, width, dim, DIMS)
    j = tl.arange(0, ROWS)[:, None]
    area = height * width
    at = (index * COUNT + j) * area + (y.to(tl.int64) * width + x)[None, :]
    real = (j < COUNT) & (y < height)[None, :]
    result = tl.zeros([DIMS, BLOCK], tl.float32)
    for modality in tl.static_range(2):
        k = k_pan if modality == 0 else k_ms
        v = v_pan if modality == 0 else v_ms
        grad = grad_pan if modality == 0 else grad_ms
        logits = _project(
            query, k + origin, factor, channel, pixel, y, x, height, width, dim,
            WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION,
        )  # fmt: skip
        attention = _softmax(logits * scale, COUNT, ROWS)
        upper = _near(grad + origin, channel, pixel, y, x, height, width, dim, DIMS)
        slope = _project(
            upper, v + origin, factor, channel, pixel, y, x, height, width, dim,
            WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION,
        )  # fmt: skip
        slope = tl.where(j < COUNT, slope, 0.0)
        slope = scale * attention * (slope - tl.sum(attention * slope, 0)[None, :])
        tl.store(space + (2 * modality) * plane + at, attention, mask=real)
        tl.store(space + (2 * modality + 1) * plane + at, slope, mask=real)
        result += _mix(
            slope, k + origin, factor, channel, pixel, y, x, height, width, dim,
            WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION,
        )  # fmt: skip
    _store(grad_q + origin, channel, pixel, y, x, height, width, dim, result, DIMS)


@triton.jit
def _backward_neighbours(
    left, out, c, factor, heads, dim, image, channel, pixel, height, width,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[d](y) = sum_p left[d](y-p) sum_j W[d,j,p] c[j](y-p); left, c: q, ds for keys, the gradient, a for values."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    index, origin, y, x = _place(heads, dim, image, channel, height, width, BLOCK)
    j = tl.arange(0, ROWS)[:, None]
    area = height * width
    result = tl.zeros([DIMS, BLOCK], tl.float32)
    for p in range(COUNT):
        from_y = y - (p // WINDOW - WINDOW // 2)
        from_x = x - (p % WINDOW - WINDOW // 2)
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        at = (index * COUNT + j) * area + (from_y.to(tl.int64) * width + from_x)[None, :]
        weights = tl.load(c + at, mask=(j < COUNT) & inside[None, :], other=0.0)
        value = _near(left + origin, channel, pixel, from_y, from_x, height, width, dim, DIMS)
        result += value * _transfer(weights, factor, p, dim, WINDOW, DIMS, ROWS, BLOCK, LEARNED, PRECISION)
    _store(out + origin, channel, pixel, y, x, height, width, dim, result, DIMS)


@triton.jit
def _backward_factor(
    grad_pan, grad_ms, q, k_pan, v_pan, k_ms, v_ms, space, partial,
    heads, dim, image, channel, pixel, height, width, plane, blocks,
    WINDOW: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[program 0, p] [D, J]: sum over a share of all pixels of ds[j] q[d] k[d](x+p) + a[j] g[d] v[d](x+p)."""
    COUNT: tl.constexpr = WINDOW * WINDOW
    p = tl.program_id(1)
    j = tl.arange(0, ROWS)[:, None]
    area = height * width
    tiles = tl.cdiv(area, BLOCK)
    result = tl.zeros([DIMS, ROWS], tl.float32)
    block = tl.program_id(0)
    while block < blocks:
        index = block // tiles
        place = (block % tiles) * BLOCK + tl.arange(0, BLOCK)
        y = place // width
        x = place % width
        origin = (index // heads).to(tl.int64) * image + (index % heads).to(tl.int64) * dim * channel
        at = (index.to(tl.int64) * COUNT + j) * area + place[None, :]
        real = (j < COUNT) & (y < height)[None, :]
        near_y = y + (p // WINDOW - WINDOW // 2)
        near_x = x + (p % WINDOW - WINDOW // 2)
        query = _near(q + origin, channel, pixel, y, x, height, width, dim, DIMS)
        for modality in tl.static_range(2):
            k = k_pan if modality == 0 else k_ms
            v = v_pan if modality == 0 else v_ms
            grad = grad_pan if modality == 0 else grad_ms
            attention = tl.load(space + (2 * modality) * plane + at, mask=real, other=0.0)
            slope = tl.load(space + (2 * modality + 1) * plane + at, mask=real, other=0.0)
            left = query
            right = _near(grad + origin, channel, pixel, y, x, height, width, dim, DIMS)
            if p < COUNT:  # the last program is the bias's
                left = left * _near(k + origin, channel, pixel, near_y, near_x, height, width, dim, DIMS)
                right = right * _near(v + origin, channel, pixel, near_y, near_x, height, width, dim, DIMS)
            result = tl.dot(left, tl.trans(slope), result, input_precision=PRECISION)
            result = tl.dot(right, tl.trans(attention), result, input_precision=PRECISION)
        block += tl.num_programs(0)
    d = tl.arange(0, DIMS)[:, None]
    row = tl.arange(0, ROWS)[None, :]
    to = ((tl.program_id(0).to(tl.int64) * (COUNT + 1) + p) * dim + d) * COUNT + row
    tl.store(partial + to, result, mask=(d < dim) & (row < COUNT))


class _Launch:
    """What all kernels of a call share."""

    def __init__(
        self, q: Tensor, weight: Tensor | None, bias: Tensor | None, heads: int, window: int, last: bool, tf32: bool
    ):
        batch, channels, height, width = q.shape
        self.format = torch.channels_last if last else torch.contiguous_format
        self.count = window**2
        self.dim = channels // heads
        channel, pixel = (1, channels) if last else (height * width, 1)
        self.shape = (heads, self.dim, channels * height * width, channel, pixel, height, width)
        self.factor = q  # not read where nothing is learned
        if weight is not None and bias is not None:
            by_offset = weight.reshape(self.dim, self.count, self.count).permute(2, 0, 1)
            self.factor = torch.cat([by_offset, bias[None]]).contiguous()
        dims = max(16, triton.next_power_of_2(self.dim))
        block = max(16, 2048 // dims)  # [DIMS, BLOCK] stands in registers
        self.constants: dict[str, Any] = {
            "WINDOW": window,
            "DIMS": dims,
            "ROWS": max(16, triton.next_power_of_2(self.count)),
            "BLOCK": block,
            "PRECISION": _precision(q, tf32),
        }
        self.learned = weight is not None
        self.blocks = batch * heads * triton.cdiv(height * width, block)

    def dense(self, *tensors: Tensor) -> list[Tensor]:
        return [tensor.contiguous(memory_format=self.format) for tensor in tensors]

    def like(self, q: Tensor) -> Tensor:
        return torch.empty_like(q, memory_format=self.format)


def _precision(q: Tensor, tf32: bool) -> str:
    """Of matrix products: TF32 holds more than bfloat16 and float16 do; float32 takes it only where allowed."""
    if q.dtype != torch.float32 or tf32:
        return "tf32"
    return "tf32x3" if q.is_cuda and torch.version.hip is None else "ieee"


def cm3a_fwd(
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
    """Schema of `pansharp_fast::cm3a_fwd`."""
    launch = _Launch(q, weight, bias, num_heads, window, channels_last, tf32)
    inputs = launch.dense(q, k_pan, v_pan, k_ms, v_ms)
    outputs = launch.like(q), launch.like(q)
    if q.numel():
        _forward[(launch.blocks,)](
            *inputs, launch.factor, *outputs, scale, *launch.shape, LEARNED=launch.learned, **launch.constants,
            num_warps=WARPS,
        )  # fmt: skip
    return outputs


def cm3a_bwd(
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
    """Schema of `pansharp_fast::cm3a_bwd`."""
    launch = _Launch(q, weight, bias, num_heads, window, channels_last, tf32)
    tensors = launch.dense(grad_pan, grad_ms, q, k_pan, v_pan, k_ms, v_ms)
    grad_pan, grad_ms, q = tensors[:3]
    grad_q, grad_k_pan, grad_v_pan, grad_k_ms, grad_v_ms = (launch.like(q) for _ in range(5))
    images_heads, area = q.shape[0] * num_heads, q.shape[2] * q.shape[3]
    space = q.new_empty((2, 2, images_heads, launch.count, area), dtype=torch.float32)
    plane = space[0, 0].numel()
    constants = {"LEARNED": launch.learned, **launch.constants}
    partial = q.new_zeros((0, launch.count + 1, launch.dim, launch.count), dtype=torch.float32)
    if q.numel():
        _backward_query[(launch.blocks,)](
            *tensors, launch.factor, grad_q, space, scale, *launch.shape, plane, **constants, num_warps=WARPS
        )
        for left, out, c in (
            (q, grad_k_pan, space[0, 1]),
            (grad_pan, grad_v_pan, space[0, 0]),
            (q, grad_k_ms, space[1, 1]),
            (grad_ms, grad_v_ms, space[1, 0]),
        ):
            _backward_neighbours[(launch.blocks,)](left, out, c, launch.factor, *launch.shape, **constants)
        if launch.learned:
            # A fixed number of shares, summed in a fixed order.
            shares = min(launch.blocks, 64)
            partial = partial.new_empty((shares, *partial.shape[1:]))
            _backward_factor[(shares, launch.count + 1)](
                *tensors, space, partial, *launch.shape, plane, launch.blocks, **launch.constants
            )
    gradients = grad_q, grad_k_pan, grad_v_pan, grad_k_ms, grad_v_ms
    if weight is None:
        return *gradients, q.new_empty(0), q.new_empty(0)
    total = partial.sum(0)  # [J + 1, D, J]: by offset and, last, the bias
    return *gradients, total[:-1].permute(1, 2, 0).reshape(weight.shape).contiguous(), total[-1].clone()
