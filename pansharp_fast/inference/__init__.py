"""Sharpening of arrays and whole scenes."""

from typing import Any

from .arrays import sharpen, sharpen_with_uncertainty
from .sharpener import Sharpener, SharpeningModel

__all__ = ["Sharpener", "SharpeningModel", "sharpen", "sharpen_scene", "sharpen_with_uncertainty"]


def __getattr__(name: str) -> Any:
    if name == "sharpen_scene":  # needs rasterio, which arrays do not
        from .whole import sharpen_scene

        return sharpen_scene
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
