"""Sharpening of arrays in memory, and the part of it that whole scenes share."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..models.pancrafter import RATIO, check_pair
from .tiles import Span, blend, plan

Array = TypeVar("Array", np.ndarray, Tensor)

PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


class SharpeningModel(Protocol):
    """What this package asks of a model; every class of `pansharp_fast.models` offers it. `config.bands`: MS bands."""

    config: Any

    def sharpen(self, pan: Tensor, ms: Tensor, peak: float) -> Tensor:
        """Digital numbers pan [B,1,4h,4w] and ms [B,C,h,w] to [B,C,4h,4w], unrounded."""


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device called `device`; None is the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}") from None
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} visible CUDA devices, got {device!r}")
    return chosen


class Sharpener:
    """A model on its device, ready to be given tiles.

    Args:
        weights: name or file for `pansharp_fast.models.load_model`, or a model.
        peak: largest digital number the sensor can give (2047 for 11 bits).
        device: see `choose_device`.
        precision: "float32", or "bf16" for autocast to bfloat16.

    Raises:
        ValueError: an argument is out of its range, or the weights cannot be read.
    """

    def __init__(
        self,
        weights: str | Path | SharpeningModel = "tiny",
        *,
        peak: float = 2047,
        device: str | torch.device | None = None,
        precision: str = "float32",
    ) -> None:
        if not peak > 0:
            raise ValueError(f"peak: expected a positive number, got {peak}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.device = choose_device(device)
        if isinstance(weights, str | Path):
            from ..models import load_model

            model = load_model(weights)
        else:
            model = cast(torch.nn.Module, weights)
        self.model: Any = model.to(self.device).eval()
        self.bands: int = self.model.config.bands
        self.peak = float(peak)
        self.precision = precision

    @torch.no_grad()
    def __call__(self, pan: Tensor, ms: Tensor) -> Tensor:
        """Float32 pan [B,1,4h,4w] and ms [B,C,h,w], on any device, to float32 [B,C,4h,4w] on the model's device."""
        dtype = PRECISIONS[self.precision]
        context = contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        with context:
            return self.model.sharpen(pan.to(self.device), ms.to(self.device), self.peak).float()


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`: rounded and held inside its range where that is an integer type."""
    if dtype.is_floating_point:
        return values.to(dtype)
    limits = torch.iinfo(dtype)
    return values.round().clamp(limits.min, limits.max).to(dtype)


def sharpen(
    pan: Array,
    ms: Array,
    *,
    weights: str | Path | SharpeningModel = "tiny",
    peak: float = 2047,
    tile: int | None = 512,
    overlap: int = 64,
    device: str | torch.device | None = None,
    precision: str = "float32",
) -> Array:
    """Sharpen multispectral images with their panchromatic ones, in memory.

    Args:
        pan: [B,1,4h,4w] NumPy array or tensor of digital numbers, real and finite.
        ms: [B,C,h,w], likewise. Pixel (i, j) of ms covers pixels 4i..4i+3, 4j..4j+3 of pan.
        weights: name of shipped weights, a checkpoint file, or a model of `pansharp_fast.models`.
        peak: largest digital number the sensor can give: 2047 for 11 bits, 1023 for 10.
        tile: larger images are cut into tiles of this many PAN pixels, a multiple of 16; None never cuts.
        overlap: PAN pixels that a tile reaches beyond its core on each side, a multiple of 16.
        device: where the network runs; None takes the tensors' own, and for NumPy arrays CUDA if there is any.
        precision: "float32" or "bf16".

    Returns:
        [B,C,4h,4w], of the kind, the dtype and (tensors) the device of ms; integers are rounded and clipped.

    Raises:
        TypeError: pan and ms are not both NumPy arrays or both tensors, or are complex or boolean.
        ValueError: shapes disagree, the ratio is not 4, the bands are not those of the weights, a value is NaN or
            infinite, or an option is out of its range.
    """
    if isinstance(pan, np.ndarray) and isinstance(ms, np.ndarray):
        pan_tensor, ms_tensor = (_as_tensor(name, array) for name, array in (("pan", pan), ("ms", ms)))
    elif isinstance(pan, Tensor) and isinstance(ms, Tensor):
        pan_tensor, ms_tensor = pan, ms
        if device is None:
            device = ms.device
    else:
        kinds = f"{type(pan).__name__} and {type(ms).__name__}"
        raise TypeError(f"pan and ms: expected two NumPy arrays or two tensors, got {kinds}")
    for name, tensor in (("pan", pan_tensor), ("ms", ms_tensor)):
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers or real numbers, got {tensor.dtype}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    sharpener = Sharpener(weights, peak=peak, device=device, precision=precision)
    check_pair(pan_tensor, ms_tensor, sharpener.bands)
    result = to_dtype(_run(sharpener, pan_tensor, ms_tensor, tile, overlap), ms_tensor.dtype)
    if isinstance(ms, np.ndarray):
        return cast(Array, result.cpu().numpy())
    return cast(Array, result.to(ms.device))


def _as_tensor(name: str, array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected integers or real numbers, got {array.dtype}")
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _run(sharpener: Sharpener, pan: Tensor, ms: Tensor, tile: int | None, overlap: int) -> Tensor:
    height, width = pan.shape[-2:]
    if tile is None:
        return sharpener(pan.float(), ms.float())
    rows, columns = plan(height, tile, overlap), plan(width, tile, overlap)

    def compute(row: Span, column: Span) -> Tensor:
        result = sharpener(
            pan[..., row.read_start : row.read_stop, column.read_start : column.read_stop].float(),
            ms[
                ...,
                row.read_start // RATIO : row.read_stop // RATIO,
                column.read_start // RATIO : column.read_stop // RATIO,
            ].float(),
        )
        return result[..., row.written, column.written]

    out = torch.empty(len(ms), sharpener.bands, height, width, device=sharpener.device)
    for top, left, piece in blend(rows, columns, compute):
        out[..., top : top + piece.shape[-2], left : left + piece.shape[-1]] = piece
    return out
