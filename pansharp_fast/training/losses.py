"""Losses of U-Know-DiffPAN (CVPR 2025, arXiv 2412.06243), each reduced to its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Weights of the hard, soft and feature terms of the distillation (public release).
HARD, SOFT, FEATURE = 1.0, 0.1, 0.001
_CHARBONNIER = 1e-6


def _check_same(**tensors: Tensor) -> None:
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(f"{name}: expected the shape of {first} {list(reference.shape)}, got {list(tensor.shape)}")


def beta_nll_loss(mean: Tensor, variance: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """Gaussian negative log-likelihood, each term weighted by variance**beta without gradient (Seitzer et al. 2022).

    Args:
        mean, variance, target: of one shape; variance positive.
        beta: 0 is the plain likelihood, 1 trains the mean as the squared error does. The public release uses 0.5.

    Raises:
        ValueError: shapes differ, or beta is negative.
    """
    _check_same(target=target, mean=mean, variance=variance)
    if beta < 0:
        raise ValueError(f"beta: expected a value >= 0, got {beta}")
    loss = 0.5 * ((target - mean).square() / variance + variance.log())
    if beta > 0:
        loss = loss * variance.detach() ** beta
    return loss.mean()


def laplace_nll_loss(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """Teacher's loss of the paper, Eq. 4: |x0 - mean| / (2 theta) + log(theta) / 2 with theta = variance.

    The norm around the sum is read as its mean: the absolute value of a negative log-likelihood would pull theta
    towards 1 wherever the error is small.

    Raises:
        ValueError: shapes differ.
    """
    _check_same(target=target, mean=mean, variance=variance)
    return (0.5 * ((target - mean).abs() / variance + variance.log())).mean()


def distillation_loss(
    target: Tensor,
    teacher: Tensor,
    pred: Tensor,
    teacher_features: Sequence[Tensor],
    student_features: Sequence[Tensor],
    variance: Tensor,
    released: bool = False,
) -> Tensor:
    """Uncertainty-aware distillation, Eqs. 17 and 18 with tau = 1, plus Charbonnier distances of feature maps.

    Args:
        target, teacher, pred: residuals [B, C, H, W]: the truth, the teacher's and the student's prediction.
        teacher_features, student_features: maps of equal shapes, pair by pair.
        variance: theta, the teacher's uncertainty [B, C, H, W].
        released: let 1 - theta go negative, as the public release does, instead of clamping it at 0.

    Raises:
        ValueError: shapes or the numbers of maps differ.
    """
    _check_same(target=target, teacher=teacher, pred=pred, variance=variance)
    if len(teacher_features) != len(student_features):
        raise ValueError(f"student_features: expected {len(teacher_features)} maps, got {len(student_features)}")
    trust = 1 - variance if released else (1 - variance).clamp_min(0)
    loss = HARD * ((1 + variance) * (target - pred).abs()).mean() + SOFT * (trust * (teacher - pred).abs()).mean()
    for number, (ours, theirs) in enumerate(zip(student_features, teacher_features, strict=True)):
        _check_same(**{f"teacher_features[{number}]": theirs, f"student_features[{number}]": ours})
        loss = loss + FEATURE * torch.sqrt((theirs - ours).square() + _CHARBONNIER**2).mean()
    return loss
