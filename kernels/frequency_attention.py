"""Triton kernels of the frequency attention: its passes between the FFTs (pansharp_fast/ops/frequency_attention.py).

A program holds [D, BLOCK] amplitudes and phases of one head; D is padded to a power of two of at least 16, as the
matrix unit asks. Spectra are contiguous float32 [B, C, H, W // 2 + 1, 2]. Sums over frequencies are cut into a fixed
number of runs, whose results torch adds up in float64: the same bits every time. Grids have one axis, because others
end at 65535 programs.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl

# Frequencies that one program of a Gram pass adds up, at most.
RUN = 2048
SMALLEST_NORM = 1e-12


@triton.jit
def _polar(re, im, real):
    """Amplitude and phase in (-π, π]; the formulas are csrc/math/frequency_attention.h's."""
    im = tl.where(real, 0.0, im)
    x, y = tl.abs(re), tl.abs(im)
    steep = y > x
    high, low = tl.where(steep, y, x), tl.where(steep, x, y)
    zero = high < 1.0842021724855044e-19
    t = tl.where(zero, 0.0, low / tl.where(zero, 1.0, high))
    s = t * t
    p = 0.001488691939 * s - 0.009144629761
    p = p * s + 0.02630500111
    p = p * s - 0.04896051403
    p = p * s + 0.0703191425
    p = p * s - 0.08931826777
    p = p * s + 0.1108826163
    p = p * s - 0.1428400379
    p = p * s + 0.1999994932
    p = p * s - 0.3333333308
    angle = t + t * s * p
    left = re < 0
    start = tl.where(steep, 1.5707963267948966, tl.where(left, 3.141592653589793, 0.0))
    phase = start + tl.where(steep != left, -angle, angle)
    phase = tl.where(zero, 0.0, tl.where(im < 0, -phase, phase))
    return tl.where(zero, 0.0, high * tl.sqrt(1.0 + s)), phase


@triton.jit
def _polar_gradient(re, im, real, amplitude, grad_amplitude, grad_phase):
    zero = amplitude == 0
    inverse = tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, amplitude))
    cosine, sine, turn = re * inverse, tl.where(real, 0.0, im * inverse), grad_phase * inverse
    grad_im = tl.where(real, 0.0, grad_amplitude * sine + turn * cosine)
    return grad_amplitude * cosine - turn * sine, grad_im


@triton.jit
def _frequencies(n, height, width, columns):
    """For flat indices n: is the spectrum of a real map real there, and how often the column stands in the full one."""
    row, column = n // columns, n % columns
    real = ((2 * row) % height == 0) & ((2 * column) % width == 0)
    return real, tl.where((column == 0) | (2 * column == width), 1.0, 2.0)


@triton.jit
def _offsets(first, n, total, depth, DEPTH: tl.constexpr):
    """Offsets [DEPTH, BLOCK] of the real parts below the head's first channel, and which of them exist."""
    d = tl.arange(0, DEPTH).to(tl.int64)
    return first + (d[:, None] * total + n[None, :]) * 2, (d[:, None] < depth) & (n[None, :] < total)


@triton.jit
def _load_matrix(matrix, part, depth, DEPTH: tl.constexpr):
    d = tl.arange(0, DEPTH)
    mask = (d[:, None] < depth) & (d[None, :] < depth)
    return tl.load(matrix + part * depth * depth + d[:, None] * depth + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_matrix(matrix, part, value, depth, DEPTH: tl.constexpr):
    d = tl.arange(0, DEPTH)
    mask = (d[:, None] < depth) & (d[None, :] < depth)
    tl.store(matrix + part * depth * depth + d[:, None] * depth + d[None, :], value, mask=mask)


@triton.jit
def _gram_kernel(
    q, k, out, height, width, columns, depth, runs,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    run, head = tl.program_id(0) % runs, (tl.program_id(0) // runs).to(tl.int64)
    total = height * columns
    amplitudes = tl.zeros((DEPTH, DEPTH), tl.float32)
    phases = tl.zeros((DEPTH, DEPTH), tl.float32)
    for start in range(0, RUN, BLOCK):
        n = run * RUN + start + tl.arange(0, BLOCK)
        offsets, mask = _offsets(head * depth * total * 2, n, total, depth, DEPTH)
        real, _ = _frequencies(n[None, :], height, width, columns)
        q_re, q_im = tl.load(q + offsets, mask=mask, other=0.0), tl.load(q + offsets + 1, mask=mask, other=0.0)
        k_re, k_im = tl.load(k + offsets, mask=mask, other=0.0), tl.load(k + offsets + 1, mask=mask, other=0.0)
        q_amplitude, q_phase = _polar(q_re, q_im, real)
        k_amplitude, k_phase = _polar(k_re, k_im, real)
        amplitudes += tl.dot(q_amplitude, tl.trans(k_amplitude), input_precision="ieee")
        phases += tl.dot(q_phase, tl.trans(k_phase), input_precision="ieee")
    part = (head * runs + run) * 2
    _store_matrix(out, part, amplitudes, depth, DEPTH)
    _store_matrix(out, part + 1, phases, depth, DEPTH)


@triton.jit
def _apply_kernel(
    v, attention, height, width, columns, depth, DEPTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = height * columns
    blocks = tl.cdiv(total, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    offsets, mask = _offsets(head * depth * total * 2, n, total, depth, DEPTH)
    real, _ = _frequencies(n[None, :], height, width, columns)
    re, im = tl.load(v + offsets, mask=mask, other=0.0), tl.load(v + offsets + 1, mask=mask, other=0.0)
    amplitude, phase = _polar(re, im, real)
    amplitude = tl.dot(_load_matrix(attention, head * 2, depth, DEPTH), amplitude, input_precision="ieee")
    phase = tl.dot(_load_matrix(attention, head * 2 + 1, depth, DEPTH), phase, input_precision="ieee")
    tl.store(v + offsets, amplitude * tl.cos(phase), mask=mask)
    tl.store(v + offsets + 1, amplitude * tl.sin(phase), mask=mask)


@triton.jit
def _apply_backward_kernel(
    v, grad, attention, out, height, width, columns, depth, runs,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    run, head = tl.program_id(0) % runs, (tl.program_id(0) // runs).to(tl.int64)
    total = height * columns
    for_amplitudes = _load_matrix(attention, head * 2, depth, DEPTH)
    for_phases = _load_matrix(attention, head * 2 + 1, depth, DEPTH)
    grad_amplitudes = tl.zeros((DEPTH, DEPTH), tl.float32)
    grad_phases = tl.zeros((DEPTH, DEPTH), tl.float32)
    for start in range(0, RUN, BLOCK):
        n = run * RUN + start + tl.arange(0, BLOCK)
        offsets, mask = _offsets(head * depth * total * 2, n, total, depth, DEPTH)
        real, weight = _frequencies(n[None, :], height, width, columns)
        re, im = tl.load(v + offsets, mask=mask, other=0.0), tl.load(v + offsets + 1, mask=mask, other=0.0)
        amplitude, phase = _polar(re, im, real)
        mixed = tl.dot(for_amplitudes, amplitude, input_precision="ieee")
        turned = tl.dot(for_phases, phase, input_precision="ieee")
        cosine, sine = tl.cos(turned), tl.sin(turned)
        grad_re = tl.load(grad + offsets, mask=mask, other=0.0) * weight
        grad_im = tl.load(grad + offsets + 1, mask=mask, other=0.0) * weight
        grad_mixed = grad_re * cosine + grad_im * sine
        grad_turned = mixed * (grad_im * cosine - grad_re * sine)
        grad_amplitudes += tl.dot(grad_mixed, tl.trans(amplitude), input_precision="ieee")
        grad_phases += tl.dot(grad_turned, tl.trans(phase), input_precision="ieee")
        grad_re, grad_im = _polar_gradient(
            re, im, real, amplitude,
            tl.dot(tl.trans(for_amplitudes), grad_mixed, input_precision="ieee"),
            tl.dot(tl.trans(for_phases), grad_turned, input_precision="ieee"),
        )  # fmt: skip
        tl.store(v + offsets, grad_re / weight, mask=mask)
        tl.store(v + offsets + 1, grad_im / weight, mask=mask)
    part = (head * runs + run) * 2
    _store_matrix(out, part, grad_amplitudes, depth, DEPTH)
    _store_matrix(out, part + 1, grad_phases, depth, DEPTH)


@triton.jit
def _gram_backward_kernel(
    q, k, grad, height, width, columns, depth, DEPTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = height * columns
    blocks = tl.cdiv(total, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    offsets, mask = _offsets(head * depth * total * 2, n, total, depth, DEPTH)
    real, weight = _frequencies(n[None, :], height, width, columns)
    q_re, q_im = tl.load(q + offsets, mask=mask, other=0.0), tl.load(q + offsets + 1, mask=mask, other=0.0)
    k_re, k_im = tl.load(k + offsets, mask=mask, other=0.0), tl.load(k + offsets + 1, mask=mask, other=0.0)
    q_amplitude, q_phase = _polar(q_re, q_im, real)
    k_amplitude, k_phase = _polar(k_re, k_im, real)
    for_amplitudes = _load_matrix(grad, head * 2, depth, DEPTH)
    for_phases = _load_matrix(grad, head * 2 + 1, depth, DEPTH)
    grad_re, grad_im = _polar_gradient(
        q_re, q_im, real, q_amplitude,
        tl.dot(for_amplitudes, k_amplitude, input_precision="ieee"),
        tl.dot(for_phases, k_phase, input_precision="ieee"),
    )  # fmt: skip
    tl.store(q + offsets, grad_re / weight, mask=mask)
    tl.store(q + offsets + 1, grad_im / weight, mask=mask)
    grad_re, grad_im = _polar_gradient(
        k_re, k_im, real, k_amplitude,
        tl.dot(tl.trans(for_amplitudes), q_amplitude, input_precision="ieee"),
        tl.dot(tl.trans(for_phases), q_phase, input_precision="ieee"),
    )  # fmt: skip
    tl.store(k + offsets, grad_re / weight, mask=mask)
    tl.store(k + offsets + 1, grad_im / weight, mask=mask)


@triton.jit
def _inverse_norm_kernel(
    x, out, pixels, image_stride, channel_stride, pixel_stride, smallest, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    mask = n < pixels
    pointer = x + image * image_stride + n.to(tl.int64) * pixel_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(CHANNELS):
        value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        total += value * value
        pointer += channel_stride
    tl.store(out + image * pixels + n, 1.0 / tl.maximum(tl.sqrt(total), smallest), mask=mask)


@triton.jit
def _normalize_backward_kernel(
    x, inverse, grad, pixels, image_stride, channel_stride, pixel_stride, clamped,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(pixels, BLOCK)
    n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    mask = n < pixels
    pointer = x + image * image_stride + n.to(tl.int64) * pixel_stride
    target = grad + image * CHANNELS * pixels + n
    along = tl.zeros((BLOCK,), tl.float32)
    value_pointer, grad_pointer = pointer, target
    for _ in range(CHANNELS):
        value = tl.load(value_pointer, mask=mask, other=0.0).to(tl.float32)
        along += value * tl.load(grad_pointer, mask=mask, other=0.0)
        value_pointer += channel_stride
        grad_pointer += pixels
    factor = tl.load(inverse + image * pixels + n, mask=mask, other=0.0)
    # Where the norm is clamped the result is x times a constant.
    along = tl.where(factor >= clamped, 0.0, along * factor * factor)
    for _ in range(CHANNELS):
        value = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(target, mask=mask, other=0.0)
        tl.store(target, (g - value * along) * factor, mask=mask)
        pointer += channel_stride
        target += pixels


def _shape(x, num_heads, width):
    """Arguments that the spectral kernels share, the number of heads of the batch, frequencies, and constants."""
    height, columns = x.shape[2], x.shape[3]
    depth = x.shape[1] // num_heads
    padded = max(16, triton.next_power_of_2(depth))
    # 1024 numbers [DEPTH, BLOCK] over 8 warps: with more a thread registers spill, and shared memory does not suffice.
    constants = {"DEPTH": padded, "BLOCK": max(16, 1024 // padded), "num_warps": 8}
    return (height, width, columns, depth), x.shape[0] * num_heads, height * columns, constants


def _run(total, block):
    """Frequencies of a run of a Gram pass."""
    return min(RUN, triton.cdiv(total, block) * block)


def _reduce(partial, x, num_heads):
    return partial.double().sum(1).reshape(x.shape[0], num_heads, *partial.shape[2:])


def frequency_attention_gram(q, k, num_heads, width):
    shape, heads, total, constants = _shape(q, num_heads, width)
    run = _run(total, constants["BLOCK"])
    runs = triton.cdiv(total, run)
    partial = q.new_empty((heads, runs, 2, shape[3], shape[3]))
    _gram_kernel[(runs * heads,)](q, k, partial, *shape, runs, RUN=run, **constants)
    return _reduce(partial, q, num_heads)


def frequency_attention_apply(v, attention, num_heads, width):
    shape, heads, total, constants = _shape(v, num_heads, width)
    _apply_kernel[(triton.cdiv(total, constants["BLOCK"]) * heads,)](v, attention, *shape, **constants)


def frequency_attention_apply_bwd(v, grad, attention, num_heads, width):
    shape, heads, total, constants = _shape(v, num_heads, width)
    run = _run(total, constants["BLOCK"])
    runs = triton.cdiv(total, run)
    partial = v.new_empty((heads, runs, 2, shape[3], shape[3]))
    _apply_backward_kernel[(runs * heads,)](v, grad, attention, partial, *shape, runs, RUN=run, **constants)
    return _reduce(partial, v, num_heads)


def frequency_attention_gram_bwd(q, k, grad, num_heads, width):
    shape, heads, total, constants = _shape(q, num_heads, width)
    _gram_backward_kernel[(triton.cdiv(total, constants["BLOCK"]) * heads,)](q, k, grad, *shape, **constants)


def frequency_attention_inverse_norm(x):
    batch, channels, height, width = x.shape
    out = torch.empty((batch, 1, height, width), dtype=torch.float32, device=x.device)
    strides = (x.stride(0), x.stride(1), x.stride(3))
    grid = (triton.cdiv(height * width, 256) * batch,)
    _inverse_norm_kernel[grid](x, out, height * width, *strides, SMALLEST_NORM, CHANNELS=channels, BLOCK=256)
    return out


def frequency_attention_normalize_bwd(x, inverse, grad):
    batch, channels, height, width = x.shape
    strides = (x.stride(0), x.stride(1), x.stride(3))
    grid = (triton.cdiv(height * width, 256) * batch,)
    _normalize_backward_kernel[grid](
        x, inverse, grad, height * width, *strides, 0.999 / SMALLEST_NORM, CHANNELS=channels, BLOCK=256
    )
