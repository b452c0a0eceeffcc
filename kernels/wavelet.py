# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of the wavelet transforms; the equations stand in pansharp_fast/reference/wavelet.py.

Analysis maps border positions to samples inside the kernel. Synthesis writes the extended image, border positions
included, and folds those back with the small matrices of the reference; inverse transforms have no border to fold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.wavelet import MODES, extension, geometry

#: Border modes whose samples outside are single samples inside: what the analysis kernel knows.
COVERED = ("zero", "constant", "symmetric", "reflect", "periodic", "antisymmetric", "periodization", "stationary")

_ZERO, _CONSTANT, _SYMMETRIC, _REFLECT = (tl.constexpr(MODES.index(name)) for name in COVERED[:4])
_ANTISYMMETRIC, _PERIODIZATION = (tl.constexpr(MODES.index(name)) for name in COVERED[5:7])
_TILE = (8, 64)


@triton.jit
def _source(j, n, MODE: tl.constexpr):
    """Sample inside [0, n) that position j takes, and its weight 0, 1 or -1."""
    index = j
    weight = tl.where(j == j, 1.0, 0.0)
    if MODE == _ZERO:
        weight = tl.where((j >= 0) & (j < n), 1.0, 0.0)
        index = tl.minimum(tl.maximum(j, 0), n - 1)
    elif MODE == _CONSTANT:
        index = tl.minimum(tl.maximum(j, 0), n - 1)
    elif MODE == _SYMMETRIC:
        m = (j % (2 * n) + 2 * n) % (2 * n)
        index = tl.where(m < n, m, 2 * n - 1 - m)
    elif MODE == _ANTISYMMETRIC:
        m = (j % (2 * n) + 2 * n) % (2 * n)
        index = tl.where(m < n, m, 2 * n - 1 - m)
        weight = tl.where(m < n, 1.0, -1.0)
    elif MODE == _REFLECT:
        m = (j % (2 * n - 2) + 2 * n - 2) % (2 * n - 2)
        index = tl.where(m < n, m, 2 * n - 2 - m)
    elif MODE == _PERIODIZATION:
        period = n + n % 2
        index = tl.minimum((j % period + period) % period, n - 1)
    else:
        index = (j % n + n) % n
    return index.to(tl.int64), weight


@triton.jit
def _analysis_kernel(
    x, y_a, y_h, y_v, y_d, taps_y, taps_x, height, width, rows, count, offset_y, offset_x, dilation, stride_plane,
    stride_row, y_plane,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, MODE_Y: tl.constexpr, MODE_X: tl.constexpr, STEP: tl.constexpr,
    ACC: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    tiles_x = tl.cdiv(count, BW)
    tiles_y = tl.cdiv(rows, BH)
    block = tl.program_id(0)
    plane = (block // (tiles_x * tiles_y)).to(tl.int64)
    i = block // tiles_x % tiles_y * BH + tl.arange(0, BH)
    j = block % tiles_x * BW + tl.arange(0, BW)
    inside = (i < rows)[:, None] & (j < count)[None, :]
    a = tl.zeros((BH, BW), ACC)
    h = tl.zeros((BH, BW), ACC)
    v = tl.zeros((BH, BW), ACC)
    d = tl.zeros((BH, BW), ACC)
    for ky in range(TAPS_Y):
        r, weight_y = _source(STEP * i + offset_y - dilation * ky, height, MODE_Y)
        low = tl.zeros((BH, BW), ACC)
        high = tl.zeros((BH, BW), ACC)
        for kx in range(TAPS_X):
            c, weight_x = _source(STEP * j + offset_x - dilation * kx, width, MODE_X)
            mask = inside & (weight_y != 0)[:, None] & (weight_x != 0)[None, :]
            value = tl.load(x + plane * stride_plane + (r * stride_row)[:, None] + c[None, :], mask=mask, other=0.0)
            value = value.to(ACC) * weight_x.to(ACC)[None, :]
            low += tl.load(taps_x + kx) * value
            high += tl.load(taps_x + TAPS_X + kx) * value
        tap_low = tl.load(taps_y + ky) * weight_y.to(ACC)[:, None]
        tap_high = tl.load(taps_y + TAPS_Y + ky) * weight_y.to(ACC)[:, None]
        a += tap_low * low
        h += tap_high * low
        v += tap_low * high
        d += tap_high * high
    at = plane * y_plane + (i.to(tl.int64) * count)[:, None] + j[None, :]
    kind = y_a.dtype.element_ty
    tl.store(y_a + at, a.to(kind), mask=inside)
    tl.store(y_h + at, h.to(kind), mask=inside)
    tl.store(y_v + at, v.to(kind), mask=inside)
    tl.store(y_d + at, d.to(kind), mask=inside)


@triton.jit
def _synthesis_kernel(
    a, h, v, d, x, taps_y, taps_x, height, width, rows, count, offset_y, offset_x, dilation,
    a_plane, a_row, h_plane, h_row, v_plane, v_row, d_plane, d_row,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, STEP: tl.constexpr, ACC: tl.constexpr, BH: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The extended image [height, width]; sample p is position p - before, and offset_* is offset + before."""
    tiles_x = tl.cdiv(width, BW)
    tiles_y = tl.cdiv(height, BH)
    block = tl.program_id(0)
    plane = (block // (tiles_x * tiles_y)).to(tl.int64)
    r = block // tiles_x % tiles_y * BH + tl.arange(0, BH)
    c = block % tiles_x * BW + tl.arange(0, BW)
    from_y = r - offset_y
    from_x = c - offset_x
    odd_y = (from_y % STEP + STEP) % STEP  # of the taps, only those of this parity meet a coefficient
    odd_x = (from_x % STEP + STEP) % STEP
    total = tl.zeros((BH, BW), ACC)
    for my in range(TAPS_Y // STEP):
        ky = STEP * my + odd_y
        twice_i = from_y + dilation * ky
        i = (twice_i // STEP).to(tl.int64)
        row_inside = (twice_i >= 0) & (i < rows) & (r < height)
        low_y = tl.load(taps_y + ky)[:, None]
        high_y = tl.load(taps_y + TAPS_Y + ky)[:, None]
        for mx in range(TAPS_X // STEP):
            kx = STEP * mx + odd_x
            twice_j = from_x + dilation * kx
            j = (twice_j // STEP).to(tl.int64)
            mask = row_inside[:, None] & ((twice_j >= 0) & (j < count) & (c < width))[None, :]
            low_x = tl.load(taps_x + kx)[None, :]
            high_x = tl.load(taps_x + TAPS_X + kx)[None, :]
            va = tl.load(a + plane * a_plane + (i * a_row)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
            vh = tl.load(h + plane * h_plane + (i * h_row)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
            vv = tl.load(v + plane * v_plane + (i * v_row)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
            vd = tl.load(d + plane * d_plane + (i * d_row)[:, None] + j[None, :], mask=mask, other=0.0).to(ACC)
            total += low_y * (low_x * va + high_x * vv) + high_y * (low_x * vh + high_x * vd)
    out = x + plane * height * width + (r.to(tl.int64) * width)[:, None] + c[None, :]
    tl.store(out, total.to(x.dtype.element_ty), mask=(r < height)[:, None] & (c < width)[None, :])


def _taps(taps: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph cannot copy from pageable memory, and what it allocates is its own: fills, and nothing is kept.
        filled = torch.empty(len(taps), dtype=dtype, device=device)
        for index, tap in enumerate(taps):
            filled[index].fill_(tap)
        return filled
    return _kept_taps(tuple(taps), dtype, device)


@functools.lru_cache(maxsize=256)
def _kept_taps(taps: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(taps, dtype=dtype, device=device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 or x.shape[2] <= 1 else x.contiguous()


def wavelet_fwd(x: torch.Tensor, *level: Any) -> torch.Tensor:
    """[N, H, W] -> [N, 4, H', W']: `pansharp_fast.reference.wavelet.analysis`."""
    rows, count = _coefficients(x, *level)
    y = x.new_empty(x.shape[0], 4, rows, count)
    _analysis(x, y.unbind(1), *level)
    return y


def wavelet_bands_fwd(x: torch.Tensor, *level: Any) -> tuple[torch.Tensor, ...]:
    """`wavelet_fwd` with four bands [N, H', W'] of memory of their own."""
    rows, count = _coefficients(x, *level)
    bands = tuple(x.new_empty(x.shape[0], rows, count) for _ in range(4))
    _analysis(x, bands, *level)
    return bands


def _coefficients(
    x: torch.Tensor, taps_y: Sequence[float], taps_x: Sequence[float], mode_y: int, mode_x: int, dilation: int
) -> tuple[int, int]:
    return (
        geometry(x.shape[1], len(taps_y) // 2, MODES[mode_y], dilation)[2],
        geometry(x.shape[2], len(taps_x) // 2, MODES[mode_x], dilation)[2],
    )


def _analysis(
    x: torch.Tensor, bands: Sequence[torch.Tensor], taps_y: Sequence[float], taps_x: Sequence[float], mode_y: int,
    mode_x: int, dilation: int,
) -> None:  # fmt: skip
    planes, height, width = x.shape
    length_y, length_x = len(taps_y) // 2, len(taps_x) // 2
    step, offset_y, rows = geometry(height, length_y, MODES[mode_y], dilation)
    _, offset_x, count = geometry(width, length_x, MODES[mode_x], dilation)
    if bands[0].numel() == 0:
        return
    x = _adjacent(x)
    wide = _wide(x.dtype)
    grid = (planes * triton.cdiv(rows, _TILE[0]) * triton.cdiv(count, _TILE[1]),)
    _analysis_kernel[grid](
        x, *bands, _taps(taps_y, wide, x.device), _taps(taps_x, wide, x.device), height, width, rows,
        count, offset_y, offset_x, dilation, x.stride(0), x.stride(1), bands[0].stride(0), TAPS_Y=length_y,
        TAPS_X=length_x, MODE_Y=mode_y, MODE_X=mode_x, STEP=step,
        ACC=tl.float64 if wide == torch.float64 else tl.float32, BH=_TILE[0], BW=_TILE[1],
    )  # fmt: skip


def _reach(n: int, taps: int, mode: int, dilation: int) -> tuple[int, int]:
    """Border positions before and behind the n samples that the filters reach; none where they count nothing."""
    if MODES[mode] == "zero":
        return 0, 0
    step, offset, count = geometry(n, taps, MODES[mode], dilation)
    return max(0, dilation * (taps - 1) - offset), max(0, step * (count - 1) + offset + 1 - n)


def _fold(e: torch.Tensor, before: int, n: int, mode: int) -> torch.Tensor:
    """[..., before + n + behind] -> [..., n]: border positions are added to the samples that they continue."""
    if e.shape[-1] == n:
        return e
    ends = ((-before, 0), (n, e.shape[-1] - before))
    positions = torch.cat([torch.arange(*end, device=e.device) for end in ends])
    outer = torch.cat([e[..., :before], e[..., before + n :]], -1)
    # In float64: torch's setting may let products of float32 use TF32.
    return e[..., before : before + n] + (outer.double() @ extension(positions, n, MODES[mode])).to(e.dtype)


def wavelet_bwd(
    a: torch.Tensor, h: torch.Tensor, v: torch.Tensor, d: torch.Tensor, taps_y: Sequence[float],
    taps_x: Sequence[float], mode_y: int, mode_x: int, dilation: int, height: int, width: int,
) -> torch.Tensor:  # fmt: skip
    """Four bands [N, H', W'] -> [N, height, width]: `pansharp_fast.reference.wavelet.synthesis`."""
    planes, rows, count = a.shape
    length_y, length_x = len(taps_y) // 2, len(taps_x) // 2
    step, offset_y, _ = geometry(height, length_y, MODES[mode_y], dilation)
    _, offset_x, _ = geometry(width, length_x, MODES[mode_x], dilation)
    top, bottom = _reach(height, length_y, mode_y, dilation)
    left, right = _reach(width, length_x, mode_x, dilation)
    wide = _wide(a.dtype)
    folds = top + bottom + left + right > 0
    e = a.new_empty(planes, top + height + bottom, left + width + right, dtype=wide if folds else a.dtype)
    if planes * height * width == 0:
        return a.new_empty(planes, height, width)
    bands = [_adjacent(band) for band in (a, h, v, d)]
    grid = (planes * triton.cdiv(e.shape[1], _TILE[0]) * triton.cdiv(e.shape[2], _TILE[1]),)
    _synthesis_kernel[grid](
        *bands, e, _taps(taps_y, wide, a.device), _taps(taps_x, wide, a.device), e.shape[1], e.shape[2],
        rows, count, offset_y + top, offset_x + left, dilation,
        *(band.stride(dim) for band in bands for dim in (0, 1)), TAPS_Y=length_y, TAPS_X=length_x, STEP=step,
        ACC=tl.float64 if wide == torch.float64 else tl.float32, BH=_TILE[0], BW=_TILE[1],
    )  # fmt: skip
    if not folds:
        return e
    rows_folded = _fold(e.mT, top, height, mode_y).mT
    return _fold(rows_folded, left, width, mode_x).to(a.dtype).contiguous()
