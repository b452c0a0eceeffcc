"""Sharpening by sampling: digital numbers in, digital numbers and their uncertainty out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.grid import RATIO, check_pair
from ..options import SAMPLERS, expect
from .noise import scene_noise
from .sampling import sample
from .schedule import Schedule

#: MS pixels that the 23-tap interpolation reaches.
_REACH = 17


@dataclass(frozen=True)
class Sampling:
    """How a diffusion model sharpens.

    steps: of the sampler. sampler: one of `options.SAMPLERS`. samples: results that are averaged. seed: of the noise.
    cuda_graph: see `sample`; None: on CUDA devices.

    Raises:
        ValueError: a value out of its range.
    """

    steps: int = 25
    sampler: str = "ddim"
    samples: int = 1
    seed: int = 0
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        expect("sampler", self.sampler, SAMPLERS)
        if not 1 <= self.steps <= Schedule().length:
            raise ValueError(f"steps: expected 1 to {Schedule().length} (the schedule's length), got {self.steps}")
        for name, least in (("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")


def uncertainty_kind(architecture: str, samples: int) -> str:
    """What the uncertainty of `sharpen_by_sampling` is, for who reads it in a file. None of it is calibrated."""
    if architecture == "uknow-teacher":
        return "standard deviation in DN by the teacher's variance and the samples' spread; not calibrated"
    if samples > 1:
        return "standard deviation in DN of the samples about their mean; not calibrated, far below the error"
    return "drift in DN of the estimates over the second half of the steps; ranks pixels, is no standard deviation"


@torch.no_grad()
def sharpen_by_sampling(
    model: Any, pan: Tensor, ms: Tensor, peak: float, sampling: Sampling, origin: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """Sharpen images in digital numbers with a student or a teacher.

    Args:
        model: FSAStudent, or FSATeacher with its prior network.
        pan: [B, 1, 4h, 4w], any h and w. ms: [B, bands, h, w]. Any real dtype; on the model's device.
        peak: the digital number that maps to 1, such as 2047 for 11 bits.
        sampling: steps, samples, seed. Image b of a batch uses seed + b.
        origin: row and column of the images' first pixel in their scene: the noise at a pixel of a scene depends on
            its place there, so that tiles agree with each other.

    Returns:
        Image and uncertainty, both [B, bands, 4h, 4w] float32 digital numbers, unrounded and unclipped. The uncertainty
        is a standard deviation: of the samples about their mean and, from a teacher, of what it says about each of them
        (law of total variance). A student's single sample has neither; then it is the drift of the estimates of x0 over
        the second half of the steps, which ranks pixels but is no standard deviation of the error: expect it a hundred
        times too small. None of them is calibrated; `uncertainty_kind` names what it is.

    Raises:
        ValueError: shapes that do not fit together, another ratio than 4, or a peak that is not positive.
    """
    from ..data import interp23

    check_pair(pan, ms, model.config.bands)
    if not peak > 0:
        raise ValueError(f"peak: expected a positive number, got {peak}")
    pan, ms = pan.float() / peak, ms.float() / peak
    # The interpolation's border is circular; a scene's or a tile's opposite sides have nothing to do with each other.
    cut, height, width = RATIO * _REACH, *pan.shape[2:]
    lms = interp23(F.pad(ms, (_REACH,) * 4, mode="replicate"))[..., cut : cut + height, cut : cut + width]
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    dtype = torch.promote_types(dtype, torch.float32)  # differences are finer than halves
    prepared = model.prepare(model.condition(lms.to(dtype), pan.to(dtype)))
    mean = torch.zeros_like(lms)
    squares, variance = torch.zeros_like(lms), torch.zeros_like(lms)
    for number in range(sampling.samples):
        noise = torch.stack(
            [
                scene_noise(model.config.bands, *origin, height, width, seed=sampling.seed + b, sample=number)
                for b in range(len(lms))
            ]
        )
        result = sample(
            model,
            prepared,
            steps=sampling.steps,
            sampler=sampling.sampler,
            noise=noise.to(lms.device),
            released=model.config.released_sampling,
            cuda_graph=lms.is_cuda if sampling.cuda_graph is None else sampling.cuda_graph,
        )
        # Welford's recurrence: no cancellation, whatever the number of samples.
        residual = result.residual.float()
        before = residual - mean
        mean = mean + before / (number + 1)
        squares = squares + before * (residual - mean)
        if result.variance is not None:
            variance = variance + result.variance.float() / sampling.samples
        elif sampling.samples == 1:
            variance = result.drift.float().square()
    if sampling.samples > 1:
        variance = variance + squares / (sampling.samples - 1)
    return (lms + mean) * peak, variance.sqrt() * peak
