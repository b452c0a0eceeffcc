"""What the metrics share: NumPy arrays, checks, float64, the Q index of non-overlapping blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch

#: Side of the blocks and windows of Q, Q2n, D_lambda and D_s in the DLPan toolbox and both papers.
BLOCK = 32

Metric = TypeVar("Metric", bound=Callable[..., Any])


def takes_arrays(metric: Metric) -> Metric:
    """`metric`, a function of tensors, for NumPy arrays too: images in, values out."""

    @functools.wraps(metric)
    def wrapped(*args: Any, **options: Any) -> Any:
        # A displacement may be either, whatever the images are.
        given = [*args, *(value for name, value in options.items() if name != "d")]
        arrays = [value for value in given if isinstance(value, np.ndarray)]
        if not arrays:
            return metric(*args, **options)
        if any(isinstance(value, torch.Tensor) for value in given):
            raise TypeError("images: expected all NumPy arrays or all tensors, got both")
        for array in arrays:
            if array.dtype.kind not in "iuf":
                raise TypeError(f"images: expected integers or real numbers, got {array.dtype}")

        def tensor(value: Any) -> Any:
            return torch.from_numpy(value.astype(np.float64)) if isinstance(value, np.ndarray) else value

        return metric(*map(tensor, args), **{name: tensor(value) for name, value in options.items()}).numpy()

    return cast(Metric, wrapped)


def displacement(d: Any) -> torch.Tensor | None:
    """`d`, anything that holds [C, 2] or [B, C, 2] numbers, as a tensor."""
    return None if d is None else torch.as_tensor(np.asarray(d, dtype=np.float64))


def prepare(fused: torch.Tensor, gt: torch.Tensor, cut: int = 0, names: str = "fused, gt") -> list[torch.Tensor]:
    """Both images in float64 without `cut` border pixels.

    As the toolbox's `dim_cut`, a `cut` of n keeps MATLAB's n:end-n: n-1 pixels go before, n after.

    Raises:
        ValueError: shapes differ or are not [B, C, H, W], or nothing is left after the cut.
    """
    if fused.ndim != 4 or fused.shape != gt.shape:
        raise ValueError(
            f"{names}: expected two equal shapes [B, C, H, W], got {tuple(fused.shape)}, {tuple(gt.shape)}"
        )
    if fused.shape[1] == 0:
        raise ValueError(f"{names}: expected at least one band, got shape {tuple(fused.shape)}")
    height, width = fused.shape[-2:]
    if cut < 0 or min(height, width) - max(0, 2 * cut - 1) <= 0:
        raise ValueError(f"cut: expected 0 or more that leaves something of {height} x {width} pixels, got {cut}")
    keep = slice(cut - 1, -cut) if cut else slice(None)
    return [image[..., keep, keep].double() for image in (fused, gt)]


def blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] with sides divisible by 32 -> [B, blocks, C, 1024]."""
    batch, bands, height, width = x.shape
    tiles = x.reshape(batch, bands, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, bands, BLOCK * BLOCK)


def block_uqi(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Universal quality index of every band of `x` with every band of `y`, mean over 32 x 32 blocks.

    Z. Wang and A. Bovik, "A universal image quality index", IEEE SPL 2002; variances with N-1.

    Args:
        x, y: [B, C, H, W] and [B, D, H, W], sides divisible by 32.

    Returns:
        [B, C, D]; NaN where a block is flat in both bands.
    """
    x, y = blocks(x), blocks(y)
    mean_x, mean_y = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    x, y = x - mean_x, y - mean_y
    mean_y = mean_y.transpose(-1, -2)
    covariance = x @ y.transpose(-1, -2)
    variances = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
    return (4 * covariance * mean_x * mean_y / variances / (mean_x**2 + mean_y**2)).mean(1)
