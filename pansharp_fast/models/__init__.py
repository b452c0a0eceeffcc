"""The published networks and their presets."""

from .checkpoint import CheckpointError, available_weights, load_model, save_model
from .condition import Condition
from .fsa import FSAConfig, FSAStudent, FSATeacher, Prediction
from .pancrafter import PRESETS, PANCrafter, PANCrafterConfig, preset
from .prior import PriorConfig, PriorNet
from .universal import Universal, UniversalConfig

__all__ = [
    "PRESETS",
    "CheckpointError",
    "Condition",
    "FSAConfig",
    "FSAStudent",
    "FSATeacher",
    "PANCrafter",
    "PANCrafterConfig",
    "Prediction",
    "PriorConfig",
    "PriorNet",
    "Universal",
    "UniversalConfig",
    "available_weights",
    "load_model",
    "preset",
    "save_model",
]
