"""Colours of a changed image held within those that MS shows near: what keeps back-projection from making new ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from . import _library
from ._backends import FLOATING, Operator, Sample, Support, no_gradient, plainly, register, select


def hold_chroma(
    x: Tensor, start: Tensor, near: Tensor, reach: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """`x` with each band's distance from the mean of bands held within what `near` has around, or `start` has there.

    The CPU kernel is for inference: where a gradient is wanted the reference runs, and in 16 bits.

    Args:
        x: [B, C, H, W], floating point, no NaN; so are the others.
        start: [B, C, H, W], the image before it was changed.
        near: [B, C, H, W], the image whose colours are allowed.
        reach: rows and columns to each side that count as around.
        backend: name of a backend, "auto" or None (see `pansharp_fast.ops.select`).

    Returns:
        [B, C, H, W] of x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a negative reach.
        BackendError: the backend asked for cannot run the call.
    """
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f"x: expected [B, C, H, W] with at least one band and pixel, got {tuple(x.shape)}")
    for name, image in (("start", start), ("near", near)):
        if image.shape != x.shape or image.dtype != x.dtype:
            raise ValueError(
                f"{name}: expected {tuple(x.shape)} {x.dtype} as x, got {tuple(image.shape)} {image.dtype}"
            )
    if min(reach) < 0:
        raise ValueError(f"reach: expected 0 or more rows and columns, got {reach}")
    if select(OPERATOR, [x, start, near], backend) == "reference":
        with plainly(x):
            return reference.hold_chroma(x, start, near, reach)
    return torch.ops.pansharp_fast.hold_chroma_fwd(x, start, near, *reach)


def _fake(x: Tensor, start: Tensor, near: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(x.shape)


_library.define("hold_chroma_fwd", "(Tensor x, Tensor start, Tensor near, int rows, int columns) -> Tensor", fake=_fake)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    """Windows beyond the image, rows with and without a whole vector, several blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    for size, reach in (
        ((2, 3, 9, 7), (2, 1)),
        ((2, 2, 5, 40), (1, 2)),
        ((1, 4, 70, 133), (4, 4)),
        ((3, 1, 4, 5), (6, 9)),
        ((1, 5, 33, 17), (0, 3)),
    ):
        images = tuple(torch.randn(size, generator=generator).to(device, dtype) for _ in range(3))
        yield Sample(
            f"{size} within {reach}",
            lambda x, start, near, backend, reach=reach: (hold_chroma(x, start, near, reach, backend=backend),),
            (2 * images[0], *images[1:]),
        )


OPERATOR = register(
    Operator(
        name="hold_chroma",
        support={
            "cpu": Support(
                devices=("cpu",), dtypes=(torch.float32, torch.float64), check=no_gradient, kernel="hold_chroma_fwd"
            ),
            "reference": Support(devices=("cpu", "cuda", "xpu", "mps", "meta"), dtypes=FLOATING),
        },
        samples=_samples,
    )
)
