"""Public operators. Each file holds one: argument checks, schema, fake kernel, autograd, choice of backend."""

from ._backends import BACKENDS, OPERATORS, BackendError, Operator, Support, explain, select, use_backend
from .chroma import hold_chroma
from .cm3a import cm3a
from .convolution import conv3x3, group_norm_factors
from .frequency_attention import frequency_attention
from .norm import gated_sum, group_norm, join, layer_norm
from .resample import resample
from .wavelet import dwt2, idwt2, iswt2, swt2, wavedec2, waverec2

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "BackendError",
    "Operator",
    "Support",
    "cm3a",
    "conv3x3",
    "dwt2",
    "explain",
    "frequency_attention",
    "gated_sum",
    "group_norm",
    "group_norm_factors",
    "hold_chroma",
    "idwt2",
    "iswt2",
    "join",
    "layer_norm",
    "resample",
    "select",
    "swt2",
    "use_backend",
    "wavedec2",
    "waverec2",
]
