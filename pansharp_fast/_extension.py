"""Loads the compiled libraries once and remembers why one could not be loaded."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

#: Where the libraries lie: beside this file, or in a folder with another build of them.
_FOLDER = Path(os.environ.get("PANSHARP_FAST_LIBRARIES") or Path(__file__).resolve().parent)


def build_info() -> ModuleType | None:
    """Facts recorded at build time, or None where nothing was built."""
    try:
        return importlib.import_module("pansharp_fast._build_info")
    except ImportError:
        return None


@functools.cache
def load_error(name: str) -> str | None:
    """Load library `name` (`_C` or `_C_cuda`) on the first call; return why that failed, or None."""
    info = build_info()
    if name == "_C_cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    path = _FOLDER / f"{name}.so"
    if not path.is_file():
        if name == "_C_cuda" and info is not None and info.cuda_reason:
            return f"CUDA kernels were not built: {info.cuda_reason}"
        return f"{path.name} was not built (run `pip install .` in the project's folder)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = info.torch if info is not None else "unknown"
        return f"{path.name} was built for torch {built} and does not load with torch {torch.__version__}: {error}"
    return None
