"""The one rule of accuracy: an error is judged by that of plain PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Of the error of plain PyTorch: what results may have, and what gradients may.
FORWARD, BACKWARD = 2.0, 3.0


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the deviation over the norm of the exact value; a maximum over few values would be noise."""
    actual, exact = actual.detach().cpu().double(), exact.detach().cpu().double()
    assert actual.shape == exact.shape
    return float((actual - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_accurate(
    actual: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    *,
    factor: float,
    floor: float = 0.25,
) -> None:
    """Every error is at most `factor` times that of `plain`, and `floor`.

    Args:
        actual: results to judge, of the dtype that gives the unit of rounding.
        plain: the same from plain PyTorch in that dtype; in float32 for float64, which nothing better than float64
            measures: float32's error stands for it, in proportion.
        exact: the same in float64.
        factor: `FORWARD`, `BACKWARD`, or more with a reason.
        floor: in units of the dtype's eps: below a few roundings plain PyTorch's own error is a matter of luck.
    """
    for index, (got, usual, want) in enumerate(zip(actual, plain, exact, strict=True)):
        eps = torch.finfo(got.dtype).eps
        ours, plain_error = error(got, want) / eps, error(usual, want) / torch.finfo(usual.dtype).eps
        limit = factor * plain_error + floor
        assert ours <= limit, f"result {index}, in eps: {ours:.2f}, limit {limit:.2f}; plain PyTorch: {plain_error:.2f}"
