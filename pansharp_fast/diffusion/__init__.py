"""Noise schedule and sampling of residuals. The samplers themselves are those of diffusers."""

from .noise import scene_noise
from .sampling import SAMPLERS, Sample, sample
from .schedule import Schedule

__all__ = ["SAMPLERS", "Sample", "Schedule", "sample", "scene_noise"]
