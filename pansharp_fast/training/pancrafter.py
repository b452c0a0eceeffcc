"""How PAN-Crafter is trained: both reconstruction modes in each batch, L1 (ICCV 2025, arXiv 2505.23367, eq. 1-4)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.hdf5 import PanCollection
from ..models.checkpoint import load_model, save_model
from ..models.pancrafter import MS_MODE, PAN_MODE, PANCrafter, preset, resize
from .config import TrainConfig, key
from .loop import Batch


def spectral_angle(fused: Tensor, gt: Tensor) -> Tensor:
    """Mean angle in radians between the spectra of two images [B, C, H, W], as the chord of the unit vectors.

    The chord differs from the angle by 1e-4 of it at 3 degrees, and its gradient is bounded where spectra agree.
    """
    chord = F.normalize(fused, dim=1) - F.normalize(gt, dim=1)
    return (chord.square().sum(1) + 1e-8).sqrt().mean()


@dataclass(kw_only=True)
class PANCrafterTrainConfig(TrainConfig):
    """Keys of `TrainConfig` and these."""

    preset: str = key("network: paper, released or tiny", "paper")
    init: str | None = key("weights to start from, a file or a shipped name, over preset", None)
    pan_weight: float = key("weight of the PAN mode's loss (lambda of eq. 4)", 1.0)
    pan_share: float = key("share of the batch that is reconstructed in PAN mode too, above 0", 1.0)
    sam_weight: float = key("weight of the mean spectral angle (radians) beside L1; the paper has none", 0.0)
    sam_start: int = key("step from which the spectral angle counts", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.pan_share <= 1:
            raise ValueError(f"pan_share: expected a number above 0 and up to 1, got {self.pan_share}")


class PANCrafterRecipe:
    """`training.Recipe` of PAN-Crafter."""

    name: ClassVar[str] = "pancrafter"
    config_class: ClassVar[type[TrainConfig]] = PANCrafterTrainConfig
    needs_lms: ClassVar[bool] = False

    def __init__(self, config: PANCrafterTrainConfig) -> None:
        self.config = config

    def build(self, bands: int, device: torch.device) -> nn.Module:
        if self.config.init is not None:
            return load_model(self.config.init, bands=bands)
        return PANCrafter(preset(self.config.preset, bands=bands))

    def training_data(self, data: PanCollection) -> PanCollection:
        return data

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        pan, lpan, ms, gt = (batch[name] * 2 - 1 for name in ("pan", "lpan", "ms", "gt"))
        count, bands = ms.shape[:2]
        extra = max(1, round(self.config.pan_share * count))
        mode = torch.tensor([MS_MODE] * count + [PAN_MODE] * extra, device=ms.device)
        residual = model(*(torch.cat([image, image[:extra]]) for image in (pan, lpan, ms)), mode)
        fused = residual[:count] + resize(ms, 4)
        ms_loss = F.l1_loss(fused, gt)
        pan_target = (pan - resize(lpan, 4))[:extra].expand(-1, bands, -1, -1)
        pan_loss = F.l1_loss(residual[count:].float(), pan_target)
        scalars = {"loss": ms_loss + self.config.pan_weight * pan_loss, "ms": ms_loss, "pan": pan_loss}
        if self.config.sam_weight > 0:
            scalars["sam"] = spectral_angle(fused.float() + 1, gt + 1)
            if step >= self.config.sam_start:
                scalars["loss"] = scalars["loss"] + self.config.sam_weight * scalars["sam"]
        return scalars

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        pan, lpan, ms = (batch[name] * 2 - 1 for name in ("pan", "lpan", "ms"))
        mode = torch.full((len(ms),), MS_MODE, device=ms.device)
        return (model(pan, lpan, ms, mode) + resize(ms, 4) + 1) / 2

    def save(self, path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        save_model(path, model, metadata)
