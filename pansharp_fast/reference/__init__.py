"""Plain PyTorch, readable next to the equations: the oracle of every kernel and the last fallback."""

from .frequency_attention import frequency_attention

__all__ = ["frequency_attention"]
