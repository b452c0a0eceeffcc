"""Cuts a scene into overlapping tiles and blends their results, holding one tile and thin bands of its neighbours.

Along each axis, tile k writes from `k * core` on, where `core = tile - 2 * overlap`, and shares the first `ramp`
pixels of that range with tile k - 1. Its own input reaches `margin = overlap - ramp / 2` pixels further on both sides,
so that no blended pixel lies closer than `margin` to an edge that the scene does not have.

    tile k - 1 reads  ------------------------------------|
               writes ---------------------|\\
    tile k     writes                     \\|------------------------- ...
               reads          |-------------------------------------- ...
                              |  margin   |ramp|  core - ramp
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Tile and overlap are multiples of this many PAN pixels; tiles then start at multiples of 8, the coarsest stride of
#: the networks (and of 4, the MS pixel), and output blocks fit GeoTIFF's rule.
MULTIPLE = 16


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in PAN pixels: half-open ranges of what it reads and what it writes.

    The first `ramp_in` and last `ramp_out` pixels of what it writes are shared with its neighbours.
    """

    read_start: int
    read_stop: int
    start: int
    stop: int
    ramp_in: int
    ramp_out: int

    @property
    def written(self) -> slice:
        """What is written, counted from the first pixel read."""
        return slice(self.start - self.read_start, self.stop - self.read_start)

    def weights(self) -> Tensor:
        """[stop - start] float32: 1, falling to 0 over the shared pixels; neighbours' weights add up to 1."""
        weights = torch.ones(self.stop - self.start)
        if self.ramp_in:
            weights[: self.ramp_in] = _ramp(self.ramp_in)
        if self.ramp_out:
            weights[-self.ramp_out :] = 1 - _ramp(self.ramp_out)
        return weights


def _ramp(length: int) -> Tensor:
    return torch.sin((torch.arange(length) + 0.5) * (torch.pi / 2 / length)) ** 2


def check(tile: int, overlap: int) -> None:
    """Raise ValueError where `plan` cannot use these numbers."""
    if tile <= 0 or tile % MULTIPLE:
        raise ValueError(f"tile: expected a positive multiple of {MULTIPLE}, got {tile}")
    if overlap < 0 or overlap % MULTIPLE:
        raise ValueError(f"overlap: expected 0 or a positive multiple of {MULTIPLE}, got {overlap}")
    if tile <= 2 * overlap:
        raise ValueError(f"tile: expected more than twice the overlap of {overlap}, got {tile}")


def plan(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles along an axis of `length` PAN pixels.

    Args:
        length: pixels along the axis, at least 1.
        tile: pixels that a tile reads at most, a multiple of 16.
        overlap: pixels that a tile reaches beyond its core on each inner side, a multiple of 16.

    Raises:
        ValueError: tile or overlap is no such number, or a tile would have no core.
    """
    check(tile, overlap)
    if length <= tile:
        return [Span(0, length, 0, length, 0, 0)]
    core = tile - 2 * overlap
    half = min(overlap // 32, core // 16) * 8  # no pixel belongs to three tiles along an axis
    ramp, margin = 2 * half, overlap - half
    count = 1 + -(-(length + margin - tile) // core)
    spans = []
    for k in range(count):
        last = k == count - 1
        stop = length if last else (k + 1) * core + ramp
        spans.append(
            Span(
                read_start=max(0, k * core - margin),
                read_stop=min(length, stop + margin),
                start=k * core,
                stop=stop,
                ramp_in=ramp if k else 0,
                ramp_out=0 if last else ramp,
            )
        )
    return spans


def blend(
    rows: Sequence[Span], columns: Sequence[Span], compute: Callable[[Span, Span], Tensor]
) -> Iterator[tuple[int, int, Tensor]]:
    """Run `compute` on every tile, row by row, and yield finished pieces that cover the scene once, without gaps.

    Args:
        rows, columns: results of `plan` for the two axes.
        compute: takes the two spans of a tile; returns [..., row.stop - row.start, column.stop - column.start].

    Yields:
        (top, left, values): first row and column of a piece in the scene, and the piece.
    """
    below: dict[int, Tensor] = {}  # column index -> rows shared with the next row of tiles
    for row in rows:
        right: Tensor | None = None  # columns shared with the next tile of this row
        for index, column in enumerate(columns):
            values = compute(row, column)
            if right is not None or below or row.ramp_out or column.ramp_out:
                weights = row.weights()[:, None] * column.weights()
                values = values * weights.to(values)
            if right is not None:
                values[..., : column.ramp_in] += right
            if column.ramp_out:
                right = values[..., -column.ramp_out :].clone()
                values = values[..., : -column.ramp_out]
            if row.ramp_in:
                values[..., : row.ramp_in, :] += below[index]
            if row.ramp_out:
                below[index] = values[..., -row.ramp_out :, :].clone()
                values = values[..., : -row.ramp_out, :]
            yield row.start, column.start, values
