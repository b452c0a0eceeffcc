"""Noise schedule and sampling of residuals. The samplers themselves are those of diffusers."""

from ..options import SAMPLERS
from .noise import scene_noise
from .sampling import Sample, sample
from .schedule import Schedule
from .sharpening import Sampling, sharpen_by_sampling, uncertainty_kind

__all__ = [
    "SAMPLERS",
    "Sample",
    "Sampling",
    "Schedule",
    "sample",
    "scene_noise",
    "sharpen_by_sampling",
    "uncertainty_kind",
]
