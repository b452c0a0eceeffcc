"""Noise that belongs to places of a scene rather than to tiles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Side of the blocks that have a random generator of their own.
_BLOCK = 64


def scene_noise(bands: int, top: int, left: int, height: int, width: int, *, seed: int, sample: int = 0) -> Tensor:
    """Standard normal noise [bands, height, width] of a window of a scene, float32 on the CPU.

    The value at a pixel depends on its row and column in the scene (top + i, left + j), the band, the seed and the
    sample's number alone: overlapping windows agree, however a scene is cut.

    Raises:
        ValueError: a coordinate, size, seed or sample is negative.
    """
    values = {"top": top, "left": left, "height": height, "width": width, "seed": seed, "sample": sample}
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name}: expected a value >= 0, got {value}")
    rows = range(top // _BLOCK, -(-(top + height) // _BLOCK))
    columns = range(left // _BLOCK, -(-(left + width) // _BLOCK))
    out = np.empty((bands, len(rows) * _BLOCK, len(columns) * _BLOCK), np.float32)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            generator = np.random.default_rng([seed, sample, row, column])
            window = np.s_[:, i * _BLOCK : (i + 1) * _BLOCK, j * _BLOCK : (j + 1) * _BLOCK]
            # Bands come last in the draw: the first bands are the same whatever their number.
            out[window] = np.stack([generator.standard_normal((_BLOCK, _BLOCK), np.float32) for _ in range(bands)])
    offset = (top - rows.start * _BLOCK, left - columns.start * _BLOCK)
    return torch.from_numpy(out[:, offset[0] : offset[0] + height, offset[1] : offset[1] + width].copy())
