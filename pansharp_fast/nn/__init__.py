"""Modules made of the operators."""

from .frequency_attention import FrequencyAttention
from .wavelet_attention import WaveletAttention

__all__ = ["FrequencyAttention", "WaveletAttention"]
