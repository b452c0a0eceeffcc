"""`python -m pansharp_fast.info`: versions, facts of the build, and each operator on each backend."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, ops
from ._extension import build_info, load_error


def report() -> str:
    """The whole report as text."""
    lines = [
        f"pansharp_fast {__version__}",
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads",
    ]
    for package in ("triton", "rasterio", "diffusers", "numpy", "h5py", "PyWavelets", "safetensors"):
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package} not installed")
    info = build_info()
    if info is None:
        lines.append("build: nothing was compiled")
    else:
        cuda = f"CUDA {info.cuda} for {info.cuda_archs}" if info.cuda else f"no CUDA ({info.cuda_reason})"
        lines.append(f"build: torch {info.torch}, {info.compiler}, C++{info.cxx_standard}, {cuda}")
        lines.append(f"build: CPU kernels for {info.cpu_capabilities}")
    for library in ("_C", "_C_cuda"):
        lines.append(f"library {library}: {load_error(library) or 'loaded'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"device {index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    for operator in sorted(ops.OPERATORS):
        lines.extend(ops.explain(operator).splitlines())
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
