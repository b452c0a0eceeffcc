"""What the diffusion networks are conditioned on, made on the tensors' own device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Condition:
    """Everything a U-Know-DiffPAN network sees besides the noisy residual, images divided by the peak.

    lms: up-sampled multispectral image [B, C, H, W]. pan: [B, 1, H, W]. For the teacher also pre_out and
    pre_variance, the prior network's results [B, C, H, W], and wavelets [B, C + 3, H, W] from `wavelet_condition`.
    """

    lms: Tensor
    pan: Tensor
    pre_out: Tensor | None = None
    pre_variance: Tensor | None = None
    wavelets: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `function` applied to every tensor in it."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(value) for name, value in tensors.items() if value is not None})


def highpass(pan: Tensor) -> Tensor:
    """PAN [B, 1, H, W] minus its 5x5 box mean, borders mirrored without repeating the edge (the public release)."""
    return pan - F.avg_pool2d(F.pad(pan, (2, 2, 2, 2), mode="reflect"), 5, stride=1)


def wavelet_condition(lms: Tensor, pan: Tensor) -> Tensor:
    """Undecimated Haar transform, level 1: LL of lms and the H, V, D details of PAN.

    Args:
        lms: [B, C, H, W]. pan: [B, 1, H, W], not high-passed. An odd side is extended by its last row or column.

    Returns:
        [B, C + 3, H, W].
    """
    from ..ops import swt2

    height, width = lms.shape[2:]
    odd = (0, width % 2, 0, height % 2)
    if any(odd):
        lms, pan = F.pad(lms, odd, mode="replicate"), F.pad(pan, odd, mode="replicate")
    [(low, _)] = swt2(lms, "haar", 1)
    [(_, details)] = swt2(pan, "haar", 1)
    return torch.cat([low, *details], 1)[:, :, :height, :width]
