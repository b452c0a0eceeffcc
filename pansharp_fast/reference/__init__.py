"""Plain PyTorch, readable next to the equations: the oracle of every kernel and the last fallback."""

from .chroma import hold_chroma
from .cm3a import cm3a
from .convolution import conv3x3, group_norm_factors
from .frequency_attention import frequency_attention
from .norm import gated_sum, group_norm, join, layer_norm
from .resample import resample

__all__ = [
    "cm3a",
    "conv3x3",
    "frequency_attention",
    "gated_sum",
    "group_norm",
    "group_norm_factors",
    "hold_chroma",
    "join",
    "layer_norm",
    "resample",
]
