"""Separable resampling by banded matrices, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

#: First pixels [B or 1, C or 1, count] int64 and weights [B or 1, C or 1, count, taps]: row i of an image's and band's
#: matrix holds weights[i] from column first[i] on, and nothing else.
Banded = tuple[Tensor, Tensor]


def resample(x: Tensor, rows: Banded, columns: Banded) -> Tensor:
    """As `pansharp_fast.ops.resample`: rows @ x @ columnsᵀ."""
    wide = x if x.dtype == torch.float64 else x.float()
    down, across = _dense(rows, x.shape[2]).to(wide), _dense(columns, x.shape[3]).to(wide)
    return (down @ wide @ across.transpose(-1, -2)).to(x.dtype)


def _dense(banded: Banded, length: int) -> Tensor:
    """[B, C, count, length]: the matrices with their zeros; [count, length] where there is one for everything."""
    first, weight = banded
    index = first[..., None] + torch.arange(weight.shape[3], device=first.device)
    matrix = weight.new_zeros(*weight.shape[:3], length).scatter_add(3, index, weight)
    return matrix[0, 0] if matrix.shape[:2] == (1, 1) else matrix
