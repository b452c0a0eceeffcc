"""Two-dimensional wavelet transforms in plain PyTorch: the oracle of every other backend.

Along one axis of n samples, with filters f (low and high, L taps each), a level of analysis is

    y[i] = sum_k f[k] * e[step * i + offset - dilation * k],    0 <= i < count,

where e continues x beyond both ends by the border mode. Three kinds of transform differ in `geometry`:

    kind            step  offset          count              e
    DWT             2     1               (n + L - 1) // 2   as the mode says
    periodization   2     L / 2           (n + 1) // 2       periodic; an odd length repeats its last sample first
    stationary      1     dilation L / 2  n                  periodic

A level in two dimensions applies this to columns and rows. Because e depends linearly on x, so does y, and `synthesis`
below is the exact transpose of `analysis`. The inverse transforms are that transpose too, with the time-reversed
reconstruction filters: Mallat, "A Wavelet Tour of Signal Processing", sections 7.3 and 5.2; names, offsets and border
modes are those of PyWavelets (Lee et al., JOSS 4(36), 1237, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Border modes of PyWavelets; "stationary" is the periodic border of the undecimated transform. Kernels take the index.
MODES = (
    "zero",
    "constant",
    "symmetric",
    "reflect",
    "periodic",
    "antisymmetric",
    "periodization",
    "smooth",
    "antireflect",
    "stationary",
)


def geometry(n: int, taps: int, mode: str, dilation: int = 1) -> tuple[int, int, int]:
    """(step, offset, count) of one analysis level along an axis of `n` samples with filters of `taps` taps."""
    if mode == "stationary":
        return 1, dilation * (taps // 2), n
    if mode == "periodization":
        return 2, taps // 2, (n + 1) // 2
    return 2, 1, (n + taps - 1) // 2


def extension(positions: torch.Tensor, n: int, mode: str) -> torch.Tensor:
    """Matrix [P, n] whose row p gives e[positions[p]] as weights of the n samples of x.

    Args:
        positions: int64 [P], any integers.
        n: length of x, at least 1; at least 2 for reflect and antireflect.
        mode: one of `MODES`.

    Returns:
        float64 [P, n].
    """
    j = positions
    rows = torch.arange(len(j), device=j.device)
    matrix = torch.zeros(len(j), n, dtype=torch.float64, device=j.device)

    def add(index: torch.Tensor, weight: torch.Tensor) -> None:
        matrix.index_put_((rows, index), weight.to(torch.float64), accumulate=True)

    one = torch.ones_like(j)
    if mode == "zero":
        add(j.clamp(0, n - 1), (j >= 0) & (j < n))
    elif mode == "constant" or (mode == "smooth" and n == 1):
        add(j.clamp(0, n - 1), one)
    elif mode in ("symmetric", "antisymmetric"):
        m = j % (2 * n)
        add(torch.where(m < n, m, 2 * n - 1 - m), torch.where(m < n, 1, -1 if mode == "antisymmetric" else 1))
    elif mode == "reflect":
        m = j % (2 * n - 2)
        add(torch.where(m < n, m, 2 * n - 2 - m), one)
    elif mode in ("periodic", "stationary"):
        add(j % n, one)
    elif mode == "periodization":
        add((j % (n + n % 2)).clamp(max=n - 1), one)
    elif mode == "smooth":  # straight on with the slope of the outermost two samples
        edge = j.clamp(0, n - 1)
        inner = edge + torch.where(j < 0, 1, torch.where(j > n - 1, -1, 0))
        distance = (j - edge).abs()
        add(edge, 1 + distance)
        add(inner, -distance)
    elif mode == "antireflect":  # odd about both end samples: one period adds 2 (x[n-1] - x[0])
        period = 2 * (n - 1)
        turns, m = torch.div(j, period, rounding_mode="floor"), j % period
        inside = m < n
        add(torch.where(inside, m, period - m), torch.where(inside, 1, -1))
        add(torch.full_like(j, n - 1), 2 * turns + torch.where(inside, 0, 2))
        add(torch.zeros_like(j), -2 * turns)
    else:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    return matrix


def _borders(
    n: int, taps: int, mode: str, dilation: int, count: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Extension matrices of the positions that the filters reach left of x and right of it."""
    step, offset, _ = geometry(n, taps, mode, dilation)
    first = min(0, offset - dilation * (taps - 1))
    last = max(n - 1, step * (count - 1) + offset)
    left = extension(torch.arange(first, 0, device=like.device), n, mode)
    right = extension(torch.arange(n, last + 1, device=like.device), n, mode)
    return left.to(like.dtype), right.to(like.dtype)


def analysis_axis(x: torch.Tensor, taps: torch.Tensor, mode: str, dilation: int) -> list[torch.Tensor]:
    """Low and high part [..., count] of x [..., n] with taps [2, L], along the last axis."""
    n, length = x.shape[-1], taps.shape[1]
    step, offset, count = geometry(n, length, mode, dilation)
    left, right = _borders(n, length, mode, dilation, count, x)
    e = torch.cat([x @ left.T, x, x @ right.T], dim=-1)
    start = len(left) + offset
    parts = []
    for f in taps:
        y = torch.zeros_like(e[..., :count])
        for k in range(length):
            begin = start - dilation * k
            y = y + f[k] * e[..., begin : begin + step * (count - 1) + 1 : step]
        parts.append(y)
    return parts


def synthesis_axis(parts: Sequence[torch.Tensor], taps: torch.Tensor, mode: str, dilation: int, n: int) -> torch.Tensor:
    """Transpose of `analysis_axis`: [..., n] from the low and high part [..., count] each."""
    count, length = parts[0].shape[-1], taps.shape[1]
    step, offset, _ = geometry(n, length, mode, dilation)
    left, right = _borders(n, length, mode, dilation, count, parts[0])
    e = parts[0].new_zeros(*parts[0].shape[:-1], len(left) + n + len(right))
    start = len(left) + offset
    for f, y in zip(taps, parts, strict=True):
        for k in range(length):
            begin = start - dilation * k
            e[..., begin : begin + step * (count - 1) + 1 : step] += f[k] * y
    e_left, x, e_right = e.split([len(left), n, len(right)], dim=-1)
    return e_left @ left + x + e_right @ right


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _taps(flat: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(flat, dtype=like.dtype, device=like.device).reshape(2, -1)


def analysis(
    x: torch.Tensor,
    taps_y: Sequence[float],
    taps_x: Sequence[float],
    mode_y: str,
    mode_x: str,
    dilation: int,
) -> torch.Tensor:
    """One level of analysis over the last two axes.

    Args:
        x: [..., H, W].
        taps_y, taps_x: low-pass taps followed by the high-pass taps, for the H axis and the W axis.
        mode_y, mode_x: entries of `MODES`.
        dilation: spacing of the taps; 1 unless the modes are "stationary".

    Returns:
        [..., 4, H', W']: approximation, horizontal (high-pass along H), vertical (high-pass along W), diagonal.
    """
    wide = x.to(_compute_dtype(x.dtype))
    bands = []
    for part in analysis_axis(wide, _taps(taps_x, wide), mode_x, dilation):
        bands += [y.mT for y in analysis_axis(part.mT, _taps(taps_y, wide), mode_y, dilation)]
    return torch.stack(bands, dim=-3).to(x.dtype)


def synthesis(
    bands: Sequence[torch.Tensor],
    taps_y: Sequence[float],
    taps_x: Sequence[float],
    mode_y: str,
    mode_x: str,
    dilation: int,
    height: int,
    width: int,
) -> torch.Tensor:
    """Transpose of `analysis`: [..., height, width] from four bands [..., H', W'] in the order of its result."""
    dtype = bands[0].dtype
    a, h, v, d = (band.to(_compute_dtype(dtype)) for band in bands)
    fy, fx = _taps(taps_y, a), _taps(taps_x, a)
    low = synthesis_axis([a.mT, h.mT], fy, mode_y, dilation, height).mT
    high = synthesis_axis([v.mT, d.mT], fy, mode_y, dilation, height).mT
    return synthesis_axis([low, high], fx, mode_x, dilation, width).to(dtype)
