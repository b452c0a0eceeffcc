# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of norms and sums in residual blocks; the equations stand in pansharp_fast/reference/norm.py.

Maps are read as [B, pixels, C] with channels side by side; other layouts are copied. The group norm of a large image is
three kernels: moments of each channel over shares of the pixels, three factors of each channel, one pass that applies
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements of a tile: 32 a thread of four warps, four loads of 16 bytes in 16 bits.
_TILE = 4096
#: Elements of a group that one program holds, 32 a thread of sixteen warps: its norm is one kernel.
_AT_ONCE = 16384
#: Programs that read an image for its moments, over all images of a batch.
_SHARES = 512


@triton.jit
def _moments_kernel(
    x, moments, channels, pixels, share, shares, image_stride, pixel_stride, BP: tl.constexpr, BC: tl.constexpr
):
    """Mean and sum of squared deviations of each channel over one share of the pixels."""
    image = (tl.program_id(0) // shares).to(tl.int64)
    number = tl.program_id(0) % shares
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < channels
    first = number * share
    last = tl.minimum(first + share, pixels)
    at = x + image * image_stride + c
    # Sums are those of deviations from the first pixel: squares of large means would cancel.
    origin = tl.load(at + first.to(tl.int64) * pixel_stride, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BP, BC), tl.float32)
    squares = tl.zeros((BP, BC), tl.float32)
    start = first
    while start < last:
        p = start + tl.arange(0, BP)
        mask = (p < last)[:, None] & inside[None, :]
        value = tl.load(at[None, :] + (p.to(tl.int64) * pixel_stride)[:, None], mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value - origin[None, :], 0.0)
        sums += value
        squares += value * value
        start += BP
    total = tl.sum(sums, 0)
    mean = total / (last - first)
    to = moments + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(to, origin + mean, mask=inside)
    tl.store(to + channels, tl.sum(squares, 0) - mean * total, mask=inside)


@triton.jit
def _factors_kernel(
    moments, weight, bias, offset, scale, shift, factors, channels, pixels, share, shares, size, eps, offset_stride,
    scale_stride, shift_stride,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, MODULATED: tl.constexpr, BS: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Centre, slope and level of each channel of one group, out of the moments of all shares."""
    image = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * size
    moments += image * shares * 2 * channels
    offset += image * offset_stride
    count = pixels * (size * 1.0)
    # Deviations from one channel's mean over the first share: they are hardly larger than those within the group.
    pivot = tl.load(moments + begin)
    if OFFSET:
        pivot += tl.load(offset + begin).to(tl.float32)
    sums = tl.zeros((BS, BC), tl.float32)
    squares = tl.zeros((BS, BC), tl.float32)
    s0 = 0
    while s0 < shares:
        s = s0 + tl.arange(0, BS)
        n = tl.minimum(share, pixels - s * share).to(tl.float32)[:, None]
        c0 = 0
        while c0 < size:
            c = c0 + tl.arange(0, BC)
            mask = (s < shares)[:, None] & (c < size)[None, :]
            at = moments + s.to(tl.int64)[:, None] * (2 * channels) + (begin + c)[None, :]
            far = tl.load(at, mask=mask, other=0.0) - pivot
            within = tl.load(at + channels, mask=mask, other=0.0)
            if OFFSET:
                far += tl.load(offset + begin + c, mask=c < size, other=0.0).to(tl.float32)[None, :]
            sums += tl.where(mask, n * far, 0.0)
            squares += tl.where(mask, within + n * far * far, 0.0)
            c0 += BC
        s0 += BS
    far = tl.sum(sums) / count
    mean = pivot + far
    spread = tl.maximum(tl.sum(squares) / count - far * far, 0.0)
    slope = 1.0 / tl.sqrt(spread + eps)
    c0 = 0
    while c0 < size:
        c = begin + c0 + tl.arange(0, BC)
        mask = c0 + tl.arange(0, BC) < size
        factor = tl.zeros((BC,), tl.float32) + slope
        if WEIGHT:
            factor *= tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
        centre = tl.zeros((BC,), tl.float32) + mean
        level = tl.zeros((BC,), tl.float32)
        if OFFSET:
            centre -= tl.load(offset + c, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            level += tl.load(bias + c, mask=mask, other=0.0).to(tl.float32)
        if MODULATED:
            more = 1.0 + tl.load(scale + image * scale_stride + c, mask=mask, other=0.0).to(tl.float32)
            factor *= more
            level = level * more + tl.load(shift + image * shift_stride + c, mask=mask, other=0.0).to(tl.float32)
        to = factors + image * 3 * channels + c
        tl.store(to, centre, mask=mask)
        tl.store(to + channels, factor, mask=mask)
        tl.store(to + 2 * channels, level, mask=mask)
        c0 += BC


@triton.jit
def _affine(
    value, weight, bias, scale, shift, c, inside, WEIGHT: tl.constexpr, BIAS: tl.constexpr, MODULATED: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """What follows a norm, for channels c of all pixels."""
    if WEIGHT:
        value *= tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if MODULATED:
        value *= 1.0 + tl.load(scale + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        value += tl.load(shift + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def _group_kernel(
    x, y, weight, bias, offset, scale, shift, channels, pixels, size, eps, image_stride, pixel_stride, offset_stride,
    scale_stride, shift_stride,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One group of a small image, at once."""
    image = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BP).to(tl.int64)
    own = tl.arange(0, BC)
    c = tl.program_id(1) * size + own
    inside = own < size
    mask = (p < pixels)[:, None] & inside[None, :]
    at = x + image * image_stride + (p * pixel_stride)[:, None] + c[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        value += tl.load(offset + image * offset_stride + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.where(mask, value, 0.0)
    count = pixels * (size * 1.0)
    value = tl.where(mask, value - tl.sum(value) / count, 0.0)
    value *= 1.0 / tl.sqrt(tl.sum(value * value) / count + eps)
    value = _affine(
        value, weight, bias, scale + image * scale_stride, shift + image * shift_stride, c, inside, WEIGHT, BIAS,
        MODULATED, SILU,
    )  # fmt: skip
    tl.store(y + (image * pixels + p)[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _apply_kernel(
    x, y, factors, channels, pixels, tiles, image_stride, pixel_stride, SILU: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < channels
    mask = (p < pixels)[:, None] & inside[None, :]
    factors += image * 3 * channels + c
    centre = tl.load(factors, mask=inside, other=0.0)
    slope = tl.load(factors + channels, mask=inside, other=0.0)
    level = tl.load(factors + 2 * channels, mask=inside, other=0.0)
    at = x + image * image_stride + (p * pixel_stride)[:, None] + c[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    value = (value - centre[None, :]) * slope[None, :] + level[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + (image * pixels + p)[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _layer_kernel(
    x, y, weight, bias, offset, scale, shift, channels, pixels, tiles, eps, image_stride, pixel_stride, offset_stride,
    scale_stride, shift_stride,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, OFFSET: tl.constexpr, MODULATED: tl.constexpr, SILU: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    c = tl.arange(0, BC)
    inside = c < channels
    mask = (p < pixels)[:, None] & inside[None, :]
    at = x + image * image_stride + (p * pixel_stride)[:, None] + c[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        value += tl.load(offset + image * offset_stride + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(value, 1) / channels
    value = tl.where(mask, value - mean[:, None], 0.0)
    slope = 1.0 / tl.sqrt(tl.sum(value * value, 1) / channels + eps)
    value = _affine(
        value * slope[:, None], weight, bias, scale + image * scale_stride, shift + image * shift_stride, c, inside,
        WEIGHT, BIAS, MODULATED, SILU,
    )  # fmt: skip
    tl.store(y + (image * pixels + p)[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _term(at, bias, gate, c, inside, mask, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr):
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        value *= tl.load(gate + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _sum_kernel(
    x, a, b, y, bias_a, bias_b, gate_a, gate_b, channels, pixels, tiles, x_image, x_pixel, a_image, a_pixel, b_image,
    b_pixel, gate_a_stride, gate_b_stride,
    SECOND: tl.constexpr, BIAS_A: tl.constexpr, BIAS_B: tl.constexpr, GATE_A: tl.constexpr, GATE_B: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < channels
    mask = (p < pixels)[:, None] & inside[None, :]
    at = x + image * x_image + (p * x_pixel)[:, None] + c[None, :]
    value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = a + image * a_image + (p * a_pixel)[:, None] + c[None, :]
    value += _term(at, bias_a, gate_a + image * gate_a_stride, c, inside, mask, BIAS_A, GATE_A)
    if SECOND:
        at = b + image * b_image + (p * b_pixel)[:, None] + c[None, :]
        value += _term(at, bias_b, gate_b + image * gate_b_stride, c, inside, mask, BIAS_B, GATE_B)
    tl.store(y + (image * pixels + p)[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _join_kernel(
    x, bias, a, b, d, impulse, y, x_channels, a_channels, b_channels, d_channels, channels, pixels, tiles, blocks,
    x_image, x_pixel, a_image, a_pixel, a_channel, b_image, b_pixel, b_channel, d_image, d_pixel, d_channel,
    BIAS: tl.constexpr, COUNT: tl.constexpr, ONE: tl.constexpr, IMPULSE: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs along axis 1: `blocks` for the channels of x, the last one for all others."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BP + tl.arange(0, BP)).to(tl.int64)
    within = (p < pixels)[:, None]
    to = y + (image * pixels + p)[:, None] * channels
    if tl.program_id(1) < blocks:
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        mask = within & (c < x_channels)[None, :]
        value = tl.load(x + image * x_image + (p * x_pixel)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + c, mask=c < x_channels, other=0.0).to(tl.float32)[None, :]
        tl.store(to + c[None, :], value.to(y.dtype.element_ty), mask=mask)
    else:
        t = tl.arange(0, BT)
        tail = tl.zeros((BP, BT), tl.float32)
        first = 0
        if COUNT > 0:
            tail += _columns(a + image * a_image, p, t, within, a_channels, a_pixel, a_channel)
            first += a_channels
        if COUNT > 1:
            tail += _columns(b + image * b_image, p, t - first, within, b_channels, b_pixel, b_channel)
            first += b_channels
        if COUNT > 2:
            tail += _columns(d + image * d_image, p, t - first, within, d_channels, d_pixel, d_channel)
            first += d_channels
        if ONE:
            tail += tl.where((t == first)[None, :] & within, 1.0, 0.0)
        if IMPULSE:
            middle = (p == pixels // 2)[:, None] & (t == first)[None, :]
            tail += tl.where(middle, tl.load(impulse + image).to(tl.float32), 0.0)
        real = within & (t < channels - x_channels)[None, :]
        tl.store(to + x_channels + t[None, :], tail.to(y.dtype.element_ty), mask=real)


@triton.jit
def _columns(x, p, c, within, channels, pixel, channel):
    mask = within & ((c >= 0) & (c < channels))[None, :]
    return tl.load(x + (p * pixel)[:, None] + c.to(tl.int64)[None, :] * channel, mask=mask, other=0.0).to(tl.float32)


def _flat(x: Tensor) -> tuple[Tensor, int, int]:
    """x with channels side by side and pixels evenly spaced, and the strides of images and pixels."""
    _, channels, height, width = x.shape
    if (channels > 1 and x.stride(1) != 1) or (height > 1 and width > 1 and x.stride(2) != width * x.stride(3)):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, x.stride(0), x.stride(3) if width > 1 else x.stride(2)


def _like(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _block(channels: int) -> int:
    """Channels of a tile: a divisor of all where there is one, so that no lanes are idle."""
    return next((size for size in (128, 64, 32) if channels % size == 0), min(128, triton.next_power_of_2(channels)))


def _rows(x: Tensor, *vectors: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Each [C] or [B, C] without gaps between channels, and its stride from image to image; x where there is none."""
    found, strides = [], []
    for vector in vectors:
        if vector is not None and vector.stride(-1) != 1 and vector.shape[-1] > 1:
            vector = vector.contiguous()
        found.append(x if vector is None else vector)
        strides.append(0 if vector is None or vector.dim() == 1 else vector.stride(0))
    return found, strides


def norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """Schema of `pansharp_fast::norm_fwd`."""
    batch, channels, height, width = x.shape
    pixels = height * width
    y = _like(x)
    if not x.numel():
        return y
    x, *strides = _flat(x)
    vectors, rows = _rows(x, weight, bias, offset, scale, shift)
    flags = {
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "OFFSET": offset is not None,
        "MODULATED": scale is not None,
    }
    if groups == 0:
        columns = triton.next_power_of_2(channels)
        height = max(1, _TILE // columns)
        tiles = triton.cdiv(pixels, height)
        _layer_kernel[(batch * tiles,)](
            x, y, *vectors, channels, pixels, tiles, eps, *strides, *rows[2:], SILU=silu, BP=height, BC=columns,
            **flags,
        )  # fmt: skip
        return y
    size = channels // groups
    held = triton.next_power_of_2(pixels), triton.next_power_of_2(size)
    if held[0] * held[1] <= _AT_ONCE:
        _group_kernel[(batch, groups)](
            x, y, *vectors, channels, pixels, size, eps, *strides, *rows[2:], SILU=silu, BP=held[0], BC=held[1],
            num_warps=4 if held[0] * held[1] <= _TILE else 16, **flags,
        )  # fmt: skip
        return y
    columns = _block(channels)
    height = _TILE // columns
    blocks, tiles = triton.cdiv(channels, columns), triton.cdiv(pixels, height)
    share = triton.cdiv(tiles, triton.cdiv(_SHARES, batch)) * height
    shares = triton.cdiv(pixels, share)
    moments = x.new_empty((batch, shares, 2, channels), dtype=torch.float32)
    factors = x.new_empty((batch, 3, channels), dtype=torch.float32)
    _moments_kernel[(batch * shares, blocks)](
        x, moments, channels, pixels, share, shares, *strides, BP=height, BC=columns
    )
    wide = min(128, triton.next_power_of_2(size))
    most = (4 if size > 8 else 1) * _TILE  # few programs, and each reads much: it has to read at once
    _factors_kernel[(batch, groups)](
        moments, *vectors, factors, channels, pixels, share, shares, size, eps, *rows[2:],
        BS=min(most // wide, triton.next_power_of_2(shares)), BC=wide, num_warps=16 if size > 8 else 4, **flags,
    )  # fmt: skip
    _apply_kernel[(batch * tiles, blocks)](
        x, y, factors, channels, pixels, tiles, *strides, SILU=silu, BP=height, BC=columns
    )
    return y


def gated_sum_fwd(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
) -> Tensor:
    """Schema of `pansharp_fast::gated_sum_fwd`."""
    batch, channels, height, width = x.shape
    pixels = height * width
    y = _like(x)
    if not x.numel():
        return y
    maps, strides = [], []
    for tensor in (x, a, x if b is None else b):
        flat, *its = _flat(tensor)
        maps.append(flat)
        strides += its
    vectors, rows = _rows(x, bias_a, bias_b, gate_a, gate_b)
    columns = _block(channels)
    height = _TILE // columns
    tiles = triton.cdiv(pixels, height)
    _sum_kernel[(batch * tiles, triton.cdiv(channels, columns))](
        *maps, y, *vectors, channels, pixels, tiles, *strides, *rows[2:], SECOND=b is not None,
        BIAS_A=bias_a is not None, BIAS_B=bias_b is not None, GATE_A=gate_a is not None, GATE_B=gate_b is not None,
        BP=height, BC=columns,
    )  # fmt: skip
    return y


def join_fwd(
    x: Tensor, others: Sequence[Tensor], bias: Tensor | None, impulse: Tensor | None, channels: int, one: bool
) -> Tensor:
    """Schema of `pansharp_fast::join_fwd`."""
    batch, x_channels, height, width = x.shape
    pixels = height * width
    y = x.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    if not y.numel():
        return y
    x, *strides = _flat(x)
    maps, counts = [], []
    for other in others:
        if height > 1 and width > 1 and other.stride(2) != width * other.stride(3):
            other = other.contiguous()
        maps.append(other)
        counts.append(other.shape[1])
        strides += other.stride(0), other.stride(3) if width > 1 else other.stride(2), other.stride(1)
    missing = 3 - len(maps)
    (bias_, impulse_), _ = _rows(x, bias, impulse)
    columns = _block(x_channels)
    tail = triton.next_power_of_2(max(channels - x_channels, 1))
    rows = max(1, _TILE // max(columns, tail))
    tiles, blocks = triton.cdiv(pixels, rows), triton.cdiv(x_channels, columns)
    _join_kernel[(batch * tiles, blocks + (channels > x_channels))](
        x, bias_, *maps, *[x] * missing, impulse_, y, x_channels, *counts, *[0] * missing, channels, pixels, tiles,
        blocks, *strides, *[0] * (3 * missing), BIAS=bias is not None, COUNT=len(maps), ONE=one,
        IMPULSE=impulse is not None, BP=rows, BC=columns, BT=tail,
    )  # fmt: skip
    return y
