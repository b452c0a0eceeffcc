"""The published networks and their presets."""

from .checkpoint import CheckpointError, available_weights, load_model, save_model
from .pancrafter import PRESETS, PANCrafter, PANCrafterConfig, preset

__all__ = [
    "PRESETS",
    "CheckpointError",
    "PANCrafter",
    "PANCrafterConfig",
    "available_weights",
    "load_model",
    "preset",
    "save_model",
]
