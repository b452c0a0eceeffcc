"""Plain PyTorch, readable next to the equations: the oracle of every kernel and the last fallback."""

from .cm3a import cm3a
from .frequency_attention import frequency_attention

__all__ = ["cm3a", "frequency_attention"]
