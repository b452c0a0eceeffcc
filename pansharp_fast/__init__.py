"""PAN-sharpening with fused kernels: PAN-Crafter and U-Know-DiffPAN, from GeoTIFF to GeoTIFF.

Light to import: submodules other than the operators load when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Attribute of the package -> module that holds it ("" : the attribute is that module).
_LAZY = {
    "ops": "",
    "reference": "",
    "nn": "",
    "models": "",
    "compat": "",
    "data": "",
    "diffusion": "",
    "training": "",
    "inference": "",
    "metrics": "",
    "baselines": "",
    "info": "",
    "explain": "ops",
    "use_backend": "ops",
    "BackendError": "ops",
    "accelerate": "compat",
    "sharpen": "inference",
    "sharpen_scene": "inference",
    "register": "data.registration",
    "Registration": "data.registration",
    "classical": "",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name] or name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
