"""Modules made of the operators."""

from .cm3a import CM3A
from .convolution import Conv3x3
from .frequency_attention import FrequencyAttention
from .wavelet import DWT2d, IDWT2d, ISWT2d, SWT2d
from .wavelet_attention import WaveletAttention

__all__ = ["CM3A", "Conv3x3", "DWT2d", "FrequencyAttention", "IDWT2d", "ISWT2d", "SWT2d", "WaveletAttention"]
