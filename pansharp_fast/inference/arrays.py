"""Sharpening of arrays in memory, and the part of it that whole scenes share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from .. import options as allowed
from ..data.grid import RATIO, check_pair
from ..options import device as choose_device
from .tiles import Span, blend, plan

if TYPE_CHECKING:
    from ..diffusion import Sampling

Array = TypeVar("Array", np.ndarray, Tensor)


class SharpeningModel(Protocol):
    """What this package asks of a model that does not sample. `config.bands`: MS bands."""

    config: Any

    def sharpen(self, pan: Tensor, ms: Tensor, peak: float) -> Tensor:
        """Digital numbers pan [B,1,4h,4w] and ms [B,C,h,w] to [B,C,4h,4w], unrounded."""


class Sharpener:
    """A model on its device, ready to be given tiles.

    Args:
        weights: name or file for `pansharp_fast.models.load_model`, or a model.
        peak: largest digital number the sensor can give (2047 for 11 bits).
        device: see `pansharp_fast.options.device`.
        precision: one of `pansharp_fast.options.PRECISIONS`.
        architecture: name that the weights' architecture must have, such as "uknow-student"; None takes any.
        sampling: how a diffusion model samples; None is `Sampling()` for such a model.
        uncertainty: results hold as many channels more, the uncertainty of each band.

    Attributes:
        bands: MS bands. channels: of a result, `bands` or twice that.

    Raises:
        ValueError: an argument is out of its range, the weights cannot be read or are of another architecture, or
            sampling or uncertainty is asked of a model that does not sample.
    """

    def __init__(
        self,
        weights: str | Path | SharpeningModel = "tiny",
        *,
        peak: float = 2047,
        device: str | torch.device | None = None,
        precision: str = "float32",
        architecture: str | None = None,
        sampling: Sampling | None = None,
        uncertainty: bool = False,
    ) -> None:
        if not peak > 0:
            raise ValueError(f"peak: expected a positive number, got {peak}")
        self.device = choose_device(device)
        if isinstance(weights, str | Path):
            from ..models import load_model

            model = load_model(weights)
        else:
            model = cast(torch.nn.Module, weights)
        self.model: Any = model.to(self.device).eval()
        name = getattr(self.model, "architecture", type(self.model).__name__)
        if architecture is not None and name != architecture:
            raise ValueError(f"weights: expected those of {architecture}, got {name} (choose a file with weights)")
        if name in ("uknow-student", "uknow-teacher"):
            from ..diffusion import Sampling

            self.sampling: Sampling | None = sampling or Sampling()
        elif not hasattr(self.model, "sharpen"):
            raise ValueError(f"weights: expected those of a model that sharpens by itself, got {name}")
        elif sampling is not None or uncertainty:
            raise ValueError(
                f"steps, samples and uncertainty: expected weights of uknow-student or uknow-teacher, got {name}"
            )
        else:
            self.sampling = None
        self.uncertainty = uncertainty
        self.bands: int = self.model.config.bands
        self.channels = 2 * self.bands if uncertainty else self.bands
        self.peak = float(peak)
        self.precision = allowed.precision(precision)

    @torch.no_grad()
    def __call__(self, pan: Tensor, ms: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Float32 pan [B,1,4h,4w] and ms [B,C,h,w], on any device, to float32 [B,channels,4h,4w] on the model's device.

        origin: row and column of pan's first pixel in its scene.
        """
        with allowed.autocast(self.precision, self.device):
            pan, ms = pan.to(self.device), ms.to(self.device)
            if self.sampling is None:
                return self.model.sharpen(pan, ms, self.peak).float()
            from ..diffusion import sharpen_by_sampling

            image, uncertainty = sharpen_by_sampling(self.model, pan, ms, self.peak, self.sampling, origin)
            return torch.cat([image, uncertainty], 1) if self.uncertainty else image


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
    sampling: Sampling | None = None,
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
        precision: one of `pansharp_fast.options.PRECISIONS`; "auto" is bfloat16 where the device has units for it.
        sampling: how a diffusion model samples.

    Returns:
        [B,C,4h,4w], of the kind, the dtype and (tensors) the device of ms; integers are rounded and clipped.

    Raises:
        TypeError: pan and ms are not both NumPy arrays or both tensors, or are complex or boolean.
        ValueError: shapes disagree, the ratio is not 4, the bands are not those of the weights, a value is NaN or
            infinite, or an option is out of its range.
    """
    options = {"weights": weights, "peak": peak, "device": device, "precision": precision, "sampling": sampling}
    return _sharpen(pan, ms, tile, overlap, **options)[0]


def sharpen_with_uncertainty(
    pan: Array,
    ms: Array,
    *,
    weights: str | Path | SharpeningModel,
    peak: float = 2047,
    tile: int | None = 512,
    overlap: int = 64,
    device: str | torch.device | None = None,
    precision: str = "float32",
    sampling: Sampling | None = None,
) -> tuple[Array, Array]:
    """As `sharpen`, with a diffusion model's uncertainty: a standard deviation [B,C,4h,4w] in digital numbers, float32.

    What it is made of depends on model and number of samples, see `pansharp_fast.diffusion.sharpen_by_sampling`.

    Raises:
        TypeError, ValueError: as `sharpen`; also where the weights are those of a model that does not sample.
    """
    options = {"weights": weights, "peak": peak, "device": device, "precision": precision, "sampling": sampling}
    image, uncertainty = _sharpen(pan, ms, tile, overlap, **options, uncertainty=True)
    return image, uncertainty


def _sharpen(pan: Array, ms: Array, tile: int | None, overlap: int, device: Any, **options: Any) -> list[Array]:
    """Image of the dtype of ms and, where asked for, its uncertainty."""
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
    sharpener = Sharpener(device=device, **options)
    check_pair(pan_tensor, ms_tensor, sharpener.bands)
    image, *rest = _run(sharpener, pan_tensor, ms_tensor, tile, overlap).split(sharpener.bands, 1)
    results = [to_dtype(image, ms_tensor.dtype), *rest]
    if isinstance(ms, np.ndarray):
        return [cast(Array, result.cpu().numpy()) for result in results]
    return [cast(Array, result.to(ms.device)) for result in results]


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
            (row.read_start, column.read_start),
        )
        return result[..., row.written, column.written]

    out = torch.empty(len(ms), sharpener.channels, height, width, device=sharpener.device)
    for top, left, piece in blend(rows, columns, compute):
        out[..., top : top + piece.shape[-2], left : left + piece.shape[-1]] = piece
    return out
