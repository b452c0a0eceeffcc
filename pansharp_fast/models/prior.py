"""Prior network of U-Know-DiffPAN (CVPR 2025, arXiv 2412.06243): a first sharpened image and its variance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.grid import check_pair
from ..options import check_fields


@dataclass(frozen=True)
class PriorConfig:
    """Configuration of `PriorNet`.

    bands: of the multispectral image. hidden: width. blocks: residual units. highpass_pan: PAN goes through
    `highpass` first, as in the public release.
    """

    bands: int = 8
    hidden: int = 64
    blocks: int = 4
    highpass_pan: bool = False

    def __post_init__(self) -> None:
        check_fields(self, bands=(1, 1024), hidden=(1, 16384), blocks=(0, 64))

    @classmethod
    def preset(cls, name: str, *, bands: int) -> PriorConfig:
        """Configuration called `name`: released, paper or tiny.

        Raises:
            ValueError: no preset of that name.
        """
        if name == "released":
            return cls(bands=bands, highpass_pan=True)
        if name == "paper":
            return cls(bands=bands)
        if name == "tiny":
            return cls(bands=bands, hidden=16, blocks=2)
        raise ValueError(f"preset: expected one of ['paper', 'released', 'tiny'], got {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)


class PriorOutput(NamedTuple):
    """out: sharpened image [B, C, H, W], in the unit of `lms`. variance: of the same shape, positive."""

    out: Tensor
    variance: Tensor


class _ResidualUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv20 = nn.Conv2d(width, width, 3, padding=1)
        self.conv21 = nn.Conv2d(width, width, 3, padding=1)
        self.conv22 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv20(x), inplace=True)
        h = F.relu(self.conv21(h), inplace=True)
        return x + F.relu(self.conv22(h), inplace=True)


def _drop_duplicates(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The public release holds each residual unit twice: backbone.0 is res1, and so on."""
    for key in [key for key in state_dict if key.startswith(prefix + "backbone.")]:
        number, name = key[len(prefix + "backbone.") :].split(".", 1)
        twin = f"{prefix}res{int(number) + 1}.{name}"
        if twin in state_dict and torch.equal(state_dict[twin], state_dict[key]):
            del state_dict[key]


class PriorNet(nn.Module):
    """PanNet-like network with a variance head.

    Args:
        config: see `PriorConfig`.
    """

    architecture: ClassVar[str] = "uknow-prior"
    config_class: ClassVar[type] = PriorConfig

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(config.bands + 1, config.hidden, 3, padding=1)
        for number in range(config.blocks):
            self.add_module(f"res{number + 1}", _ResidualUnit(config.hidden))
        self.conv3 = nn.Conv2d(config.hidden, 2 * config.bands, 3, padding=1)
        for parameter in self.conv3.parameters():
            nn.init.zeros_(parameter)  # a fresh network gives lms
        self.register_load_state_dict_pre_hook(_drop_duplicates)

    def forward(self, lms: Tensor, pan: Tensor) -> PriorOutput:
        """Sharpen.

        Args:
            lms: up-sampled multispectral image [B, C, H, W], divided by the peak.
            pan: PAN [B, 1, H, W], already high-passed where `config.highpass_pan`.

        Raises:
            ValueError: band counts or sizes disagree.
        """
        check_pair(pan, lms, self.config.bands, ratio=1, name="lms")
        h = F.relu(self.conv1(torch.cat([lms, pan], 1)), inplace=True)
        for number in range(self.config.blocks):
            h = self.get_submodule(f"res{number + 1}")(h)
        mean, raw = self.conv3(h).chunk(2, 1)
        return PriorOutput(mean + lms, F.softplus(raw))
