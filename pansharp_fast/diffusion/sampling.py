"""Sampling of residuals with the samplers of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..models.condition import Condition
from ..models.fsa import Prepared
from .schedule import Schedule

if TYPE_CHECKING:
    from ..models import FSAStudent, FSATeacher

SAMPLERS = ("ddim", "dpm++")


class Sample(NamedTuple):
    """Result of `sample`, each [B, C, H, W].

    residual: x0, to be added to lms. variance: the teacher's uncertainty at the last step, else None. drift: standard
    deviation of the x0 estimates over the second half of the steps, a weaker sign of uncertainty that a student gives
    too. features: on request those of the last step (see `Prediction`).
    """

    residual: Tensor
    variance: Tensor | None
    drift: Tensor
    features: tuple[Tensor, ...] | None = None


def _scheduler(sampler: str, schedule: Schedule, steps: int) -> Any:
    """diffusers' scheduler, set to `steps` of the schedule's steps."""
    try:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    except ImportError as error:
        raise ImportError("diffusers is not installed; run: pip install 'pansharp_fast[diffusion]'") from error
    options: dict[str, Any] = {
        "num_train_timesteps": schedule.length,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": "sample",  # what a network says is turned into x0 first: self-conditioning needs it anyway
    }
    scheduler: Any
    if sampler == "ddim":  # the release's steps 0, T / steps, 2 T / steps, ...
        scheduler = DDIMScheduler(**options, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True)
    else:  # few steps must begin at the last time step, where x_t is noise
        scheduler = DPMSolverMultistepScheduler(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def sample(
    model: FSAStudent | FSATeacher,
    cond: Condition | Prepared,
    *,
    steps: int = 25,
    sampler: str = "ddim",
    noise: Tensor | None = None,
    seed: int | None = None,
    released: bool = False,
    schedule: Schedule | None = None,
    return_features: bool = False,
) -> Sample:
    """Draw a residual; deterministic given the noise (or the seed and the device).

    Args:
        model: student or teacher; should be in evaluation mode.
        cond: its condition, see `model.condition`, or the result of `model.prepare` for it.
        steps: of the sampler.
        sampler: "ddim" (eta 0) or "dpm++" (DPM-Solver++, second order: good with few steps).
        noise: start [B, C, H, W]; drawn on the condition's device where None.
        seed: of that draw; None uses torch's own generator.
        released: what the public release does: the network is told the sampler's step (steps - 1, ..., 0) instead of
            the diffusion time and gets x_t instead of its last estimate as self-condition.
        schedule: noise levels; the released one of 500 steps unless told otherwise.
        return_features: fill `Sample.features`.

    Raises:
        ValueError: unknown sampler, steps outside 1..T, noise of another shape, a condition that does not fit.
        ImportError: diffusers is not installed.
    """
    schedule = Schedule() if schedule is None else schedule
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {SAMPLERS}, got {sampler!r}")
    if not 1 <= steps <= schedule.length:
        raise ValueError(f"steps: expected 1 to {schedule.length} (the schedule's length), got {steps}")
    prepared = cond if isinstance(cond, Prepared) else model.prepare(cond)
    if noise is None:
        device = prepared.images.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        noise = torch.randn(prepared.shape, generator=generator, device=device)
    elif tuple(noise.shape) != prepared.shape:
        raise ValueError(f"noise: expected {list(prepared.shape)}, got {list(noise.shape)}")
    scheduler = _scheduler(sampler, schedule, steps)
    x, x0, variance = noise, None, None
    mean = squares = torch.zeros_like(noise)
    for number, time in enumerate(scheduler.timesteps.tolist()):
        told = torch.full((x.shape[0],), steps - 1 - number if released else time, device=x.device)
        wanted = return_features and number == steps - 1
        output = model(x, told, prepared, None if released else x0, return_features=wanted)
        times = torch.full_like(told, time)
        x0, variance = schedule.to_x0(output.out, x, times, model.config.prediction), output.variance
        x = scheduler.step(x0, time, x).prev_sample
        if number >= steps // 2:  # Welford's recurrence
            before = x0 - mean
            mean = mean + before / (number - steps // 2 + 1)
            squares = squares + before * (x0 - mean)
    return Sample(x, variance, (squares / (steps - steps // 2)).sqrt(), output.features)
