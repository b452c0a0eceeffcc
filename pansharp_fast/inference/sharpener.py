"""A network on its device, ready to be given tiles."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from .. import options as allowed
from ..options import device as choose_device
from .recorded import Recorded

if TYPE_CHECKING:
    from ..diffusion import Sampling


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
        precision: one of `pansharp_fast.options.PRECISIONS`. On a GPU bfloat16 is a copy of PAN-Crafter's
            or a student's weights.
        architecture: name that the weights' architecture must have, such as "uknow-student"; None takes any.
        sampling: how a diffusion model samples; None is `Sampling()` for such a model.
        uncertainty: results hold as many channels more, the uncertainty of each band.

    Attributes:
        bands: MS bands. channels: of a result, `bands` or twice that. Both 0 where the model takes any number.
        takes_registered: the model has `sharpen_registered`, see `registered`.

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
        from ..models import FSAStudent, PANCrafter

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
        elif not (hasattr(self.model, "sharpen") or hasattr(self.model, "sharpen_registered")):
            raise ValueError(f"weights: expected those of a model that sharpens by itself, got {name}")
        elif sampling is not None or uncertainty:
            raise ValueError(
                f"steps, samples and uncertainty: expected weights of uknow-student or uknow-teacher, got {name}"
            )
        else:
            self.sampling = None
        self.uncertainty = uncertainty
        self.uncertainty_kind = ""
        if uncertainty and self.sampling is not None:
            from ..diffusion import uncertainty_kind

            self.uncertainty_kind = uncertainty_kind(name, self.sampling.samples)
        self.takes_registered = hasattr(self.model, "sharpen_registered")
        self.bands: int = self.model.config.bands or 0
        self.channels = 2 * self.bands if uncertainty else self.bands
        self.peak = float(peak)
        self.precision = allowed.precision(precision)
        self._autocast, self._options = self.precision, dict[str, Any]()
        if self.device.type == "cuda":
            if type(self.model) in (PANCrafter, FSAStudent) and allowed.in_bfloat16(self.precision, self.device):
                # Autocast would cast the weights at every call, and features to float32 for every norm.
                self.model, self._autocast = copy.deepcopy(self.model).to(torch.bfloat16), "float32"
            if type(self.model) is PANCrafter:
                self._options["forward"] = Recorded(self.model)

    @torch.no_grad()
    def __call__(self, pan: Tensor, ms: Tensor, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Float32 pan [B,1,4h,4w] and ms [B,C,h,w], on any device, to float32 [B,channels,4h,4w] on the model's device.

        origin: row and column of pan's first pixel in its scene.
        """
        with allowed.autocast(self._autocast, self.device):
            pan, ms = pan.to(self.device), ms.to(self.device)
            if self.sampling is None:
                return self.model.sharpen(pan, ms, self.peak, **self._options).float()
            from ..diffusion import sharpen_by_sampling

            image, uncertainty = sharpen_by_sampling(self.model, pan, ms, self.peak, self.sampling, origin)
            return torch.cat([image, uncertainty], 1) if self.uncertainty else image

    @torch.no_grad()
    def registered(self, pan: Tensor, ms: Tensor, **options: Any) -> Tensor:
        """Digital numbers pan [B,1,H,W] and ms [B,C,h,w], on any device, to [B,C,H,W] by `model.sharpen_registered`."""
        with allowed.autocast(self.precision, self.device):
            return self.model.sharpen_registered(pan.to(self.device), ms.to(self.device), **options)
