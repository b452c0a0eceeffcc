"""Public operators. Each file holds one: argument checks, schema, fake kernel, autograd, choice of backend."""

from ._backends import BACKENDS, OPERATORS, BackendError, Operator, Support, explain, select, use_backend
from .cm3a import cm3a
from .frequency_attention import frequency_attention

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "BackendError",
    "Operator",
    "Support",
    "cm3a",
    "explain",
    "frequency_attention",
    "select",
    "use_backend",
]
