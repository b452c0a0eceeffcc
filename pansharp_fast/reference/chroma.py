"""Colours held within those near, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hold_chroma(x: Tensor, start: Tensor, near: Tensor, reach: tuple[int, int]) -> Tensor:
    """As `pansharp_fast.ops.hold_chroma`."""
    change, before, known = (image - image.mean(1, keepdim=True) for image in (x, start, near))
    high = torch.maximum(_highest(known, reach), before)
    low = torch.minimum(-_highest(-known, reach), before)
    return x + (torch.minimum(torch.maximum(change, low), high) - change)


def _highest(image: Tensor, reach: tuple[int, int]) -> Tensor:
    """Largest value within so many rows and columns."""
    for axis, far in enumerate(reach):  # one axis after the other
        window, padding = [1, 1], [0, 0]
        window[axis], padding[axis] = 2 * far + 1, far
        image = F.max_pool2d(image, window, stride=1, padding=padding)
    return image
