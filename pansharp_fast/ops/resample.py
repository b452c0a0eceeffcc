"""Resampling of images by a banded matrix along each axis: interpolation, blur, displacement, sampling in one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from ..reference.resample import Banded
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, no_gradient, plainly, register, select


def resample(x: Tensor, rows: Banded, columns: Banded, *, backend: str | None = None) -> Tensor:
    """rows · x · columnsᵀ for banded matrices, one for everything or one for each image or band.

    A matrix is its first pixels [B or 1, C or 1, count], int64, and its weights [B or 1, C or 1, count, taps]: result
    i is the sum over t of weights[i, t] · x[first[i] + t].

    The CPU kernel is for inference: where a gradient is wanted the reference runs.

    Args:
        x: [B, C, H, W], floating point; 16 bits are summed up in float32.
        rows: first pixels and weights along H.
        columns: the same along W.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, C, rows' count, columns' count] of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run the call.
    """
    if x.dim() != 4 or x.dtype not in FLOATING:
        raise ValueError(f"x: expected [B, C, H, W], floating point, got {tuple(x.shape)} {x.dtype}")
    _check("rows", rows, x, 2)
    _check("columns", columns, x, 3)
    if select(OPERATOR, [x, rows[1], columns[1]], backend) == "reference":
        with plainly(x):
            return reference.resample(x, rows, columns)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.ops.pansharp_fast.resample_fwd(x, rows[0], rows[1].to(wide), columns[0], columns[1].to(wide))


def _check(name: str, banded: Banded, x: Tensor, axis: int) -> None:
    """Raise ValueError for matrices that do not fit; that first pixels lie within the image the kernel checks."""
    first, weight = banded
    batch, bands = x.shape[:2]
    if first.dtype != torch.int64 or first.dim() != 3 or weight.dim() != 4 or first.shape != weight.shape[:3]:
        raise ValueError(
            f"{name}: expected first pixels [B, C, count] int64 and weights [B, C, count, taps], got "
            f"{tuple(first.shape)} {first.dtype} and {tuple(weight.shape)}"
        )
    if first.shape[0] not in (1, batch) or first.shape[1] not in (1, bands):
        raise ValueError(f"{name}: expected matrices for 1 or {batch} images and 1 or {bands} bands, got {first.shape}")
    if not 1 <= weight.shape[3] <= x.shape[axis]:
        raise ValueError(f"{name}: expected 1 to {x.shape[axis]} taps, got {weight.shape[3]}")


def _fake(x: Tensor, row_first: Tensor, row_weight: Tensor, column_first: Tensor, column_weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], row_first.shape[2], column_first.shape[2]))


_library.define(
    "resample_fwd",
    "(Tensor x, Tensor row_first, Tensor row_weight, Tensor column_first, Tensor column_weight) -> Tensor",
    fake=_fake,
)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """More and fewer samples than pixels, one matrix and many, one row, few taps and all."""
    generator = torch.Generator().manual_seed(0)

    def banded(images: int, bands: int, count: int, length: int, taps: int) -> Banded:
        first = torch.randint(0, length - taps + 1, (images, bands, count), generator=generator)
        weight = torch.randn(images, bands, count, taps, generator=generator, dtype=torch.float64)
        return first.to(device), weight.to(device)

    for size, (down, down_taps, down_for), (across, across_taps, across_for) in (
        ((2, 3, 9, 7), (5, 4, (1, 3)), (11, 3, (1, 1))),
        ((2, 2, 20, 33), (70, 6, (1, 1)), (130, 22, (1, 2))),
        ((3, 2, 150, 90), (37, 18, (3, 2)), (23, 18, (3, 1))),
        ((1, 1, 1, 5), (1, 1, (1, 1)), (3, 5, (1, 1))),
        ((1, 2, 40, 64), (129, 22, (1, 2)), (64, 18, (1, 1))),
    ):
        x = torch.randn(size, generator=generator).to(device, dtype)
        rows = banded(*down_for, down, size[2], down_taps)
        columns = banded(*across_for, across, size[3], across_taps)
        yield Sample(
            f"{size} to {down}x{across}",
            lambda x, backend, rows=rows, columns=columns: (resample(x, rows, columns, backend=backend),),
            (x,),
        )


OPERATOR = register(
    Operator(
        name="resample",
        support={
            "cpu": Support(devices=("cpu",), dtypes=FLOATING, check=no_gradient, kernel="resample_fwd"),
            "reference": Support(devices=("cpu", "cuda", "xpu", "mps", "meta"), dtypes=FLOATING),
        },
        samples=_samples,
    )
)
