"""How the grids of PAN and MS lie on each other.

ratio: PAN pixels per MS pixel. phase: index on PAN's grid, counted at pixel centres, of the first MS pixel's centre. MS
pixel k then lies at PAN index phase + ratio * k. Both are pairs (rows, columns) of real numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

#: The ratio of most sensors, and the only one that the networks take.
RATIO = 4
#: What can be sharpened.
MIN_RATIO, MAX_RATIO = 1.5, 16.0
#: A grid that drifts by less than this many PAN pixels from one of halves counts as that one.
SNAP = 1e-3

#: One number, or one for rows and one for columns.
Both = float | Sequence[float]


def both(value: Both) -> tuple[float, float]:
    """(rows, columns) of one number or two."""
    if isinstance(value, int | float):
        return float(value), float(value)
    rows, columns = (float(v) for v in value)
    return rows, columns


def both_ratios(ratio: Both) -> tuple[float, float]:
    """`both(ratio)`.

    Raises:
        ValueError: MS pixels of this size cannot be sharpened.
    """
    ratios = both(ratio)
    check_ratio(ratios)
    return ratios


def default_phase(phase: Both | None, ratio: Both) -> tuple[float, float]:
    """`both(phase)`; None is that of aligned pixel areas."""
    if phase is not None:
        return both(phase)
    rows, columns = both(ratio)
    return aligned_phase(rows), aligned_phase(columns)


def aligned_phase(ratio: float) -> float:
    """Phase where the areas of the first PAN and MS pixel share their corner."""
    return (ratio - 1) / 2


def snap(value: float, step: float, tolerance: float) -> float:
    """The next multiple of `step`, if `value` lies within `tolerance` of it."""
    rounded = round(value / step) * step
    return rounded if abs(value - rounded) <= tolerance else value


def check_ratio(ratio: Sequence[float]) -> None:
    """Raise ValueError unless MS pixels of this size (rows, columns) can be sharpened."""
    if not all(MIN_RATIO - 1e-6 <= value <= MAX_RATIO + 1e-6 for value in ratio):
        raise ValueError(
            f"ratio: expected MS pixels {MIN_RATIO:g} to {MAX_RATIO:g} times the size of PAN's, "
            f"got {ratio[0]:.4g} x {ratio[1]:.4g}"
        )


def fit_ratio(pan: Sequence[int], ms: Sequence[int]) -> tuple[float, float]:
    """The ratio of two images of one place by their sizes (rows, columns).

    A whole number where the sizes allow one, PAN's last pixels then covering a part of an MS pixel or lacking it: 4 if
    it is among several. Else the quotients of the sizes.

    Raises:
        ValueError: the quotients are out of range, or differ by more than 5 % of each other.
    """

    def fits(ratio: int) -> bool:
        return all(have in (-(-length // ratio), max(1, length // ratio)) for length, have in zip(pan, ms, strict=True))

    quotients = pan[0] / ms[0], pan[1] / ms[1]
    whole = [ratio for ratio in range(math.ceil(MIN_RATIO), int(MAX_RATIO) + 1) if fits(ratio)]
    if RATIO in whole:
        return float(RATIO), float(RATIO)
    if whole:
        nearest = float(min(whole, key=lambda ratio: abs(math.log(ratio * ratio / quotients[0] / quotients[1]))))
        return nearest, nearest
    if max(quotients) / min(quotients) > 1.05:
        raise ValueError(
            f"MS: expected sizes that stand to PAN's {pan[0]} x {pan[1]} in one ratio, got {ms[0]} x {ms[1]}, "
            f"{quotients[0]:.4g} and {quotients[1]:.4g} times smaller"
        )
    check_ratio(quotients)
    return quotients


def check_pair(pan: Any, ms: Any, bands: int | None = None, *, ratio: int | None = RATIO, name: str = "ms") -> None:
    """Raise ValueError unless two tensors or arrays can be PAN and MS of one batch.

    Args:
        pan: [B, 1, H, W].
        ms: [B, C, h, w], called `name` in messages.
        bands: C; None is any.
        ratio: H / h and W / w; None is any.
    """
    if len(pan.shape) != 4 or pan.shape[1] != 1:
        raise ValueError(f"pan: expected shape [B, 1, H, W], got {list(pan.shape)}")
    if len(ms.shape) != 4:
        raise ValueError(f"{name}: expected shape [B, {bands or 'C'}, h, w], got {list(ms.shape)}")
    if bands is not None and ms.shape[1] != bands:
        raise ValueError(f"{name}: expected {bands} bands, got {ms.shape[1]}")
    if pan.shape[0] != ms.shape[0]:
        raise ValueError(f"{name}: expected a batch of {pan.shape[0]} as in pan, got {ms.shape[0]}")
    if ms.shape[2] == 0 or ms.shape[3] == 0:
        raise ValueError(f"{name}: expected at least one pixel, got {ms.shape[2]}x{ms.shape[3]}")
    if ratio is not None and list(pan.shape[2:]) != [ratio * length for length in ms.shape[2:]]:
        expected = [ratio * length for length in ms.shape[2:]]
        times = "the" if ratio == 1 else f"{ratio} times the"
        only = "" if ratio == 1 else f" (ratio {ratio} is the only one supported)"
        raise ValueError(
            f"pan: expected {times} size of {name}{only}, {expected[0]}x{expected[1]}, "
            f"got {pan.shape[2]}x{pan.shape[3]}"
        )
