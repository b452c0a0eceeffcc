"""Drives CMake. Sources, flags and architectures are listed in CMakeLists.txt alone."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
MINIMUM_CMAKE = (3, 25)  # as in CMakeLists.txt


def find_torch() -> Path | None:
    """The torch package folder to build against, found without importing it.

    The environment's own site-packages come first: inside pip's isolated build `purelib` still points there, and that
    torch is the one the package will run with.
    """
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    for folder in folders:
        candidate = Path(folder or ".") / "torch"
        if (candidate / "version.py").is_file() and (candidate / "include").is_dir():
            return candidate
    return None


def torch_version(torch_dir: Path) -> str:
    """Version string of the torch in `torch_dir`; exits where it is too old for the stable ABI used here."""
    match = re.search(r"__version__ = '([^']+)'", (torch_dir / "version.py").read_text())
    version = match.group(1) if match else "0.0"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        sys.exit(f"pansharp_fast: torch: expected >= {'.'.join(map(str, MINIMUM_TORCH))}, got {version} in {torch_dir}")
    return version


def find_program(name: str, folder: str) -> str | None:
    """Path of a build program: from the Python package of that name (its attribute `folder`) if there is one, as a
    system's may be too old for the CUDA at hand; from PATH otherwise.
    """
    try:
        packaged = Path(getattr(importlib.import_module(name), folder)) / name
    except (ImportError, AttributeError):
        return shutil.which(name)
    return str(packaged) if packaged.is_file() else shutil.which(name)


def find_cmake() -> str:
    """Path of a CMake that is new enough; exits where there is none."""
    program = find_program("cmake", "CMAKE_BIN_DIR")
    wanted = f"cmake >= {'.'.join(map(str, MINIMUM_CMAKE))}"
    if program is None:
        sys.exit(f"pansharp_fast: expected {wanted} as a Python package or on PATH, got none (pip install cmake)")
    text = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match is None or tuple(map(int, match.groups())) < MINIMUM_CMAKE:
        sys.exit(f"pansharp_fast: expected {wanted}, got {text.splitlines()[0]} in {program} (pip install cmake)")
    return program


class CMakeBuild(build_ext):
    """Builds every extension with one CMake run into the package folder."""

    def _package_dir(self) -> Path:
        if self.inplace or getattr(self, "editable_mode", False):
            return ROOT / "pansharp_fast"
        return Path(self.build_lib).resolve() / "pansharp_fast"

    def run(self) -> None:
        torch_dir = find_torch()
        if torch_dir is None:
            sys.exit(
                "pansharp_fast: no torch found to build against. Install one first, for example\n"
                "    pip install torch\n    pip install ."
            )
        out = self._package_dir()
        out.mkdir(parents=True, exist_ok=True)
        build_dir = Path(os.environ.get("PANSHARP_FAST_BUILD_DIR", ROOT / "build" / "cmake")).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        import pybind11

        cmake, ninja = find_cmake(), find_program("ninja", "BIN_DIR")
        generator = (
            ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja and "CMAKE_GENERATOR" not in os.environ else []
        )
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir),
            f"-DTORCH_DIR={torch_dir}",
            f"-DTORCH_BUILD_VERSION={torch_version(torch_dir)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            "-DCMAKE_BUILD_TYPE=Release",
            *generator,
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build_dir), "-j", jobs], check=True)
        subprocess.run([cmake, "-E", "cat", str(build_dir / "summary.txt")], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._package_dir().glob("_*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def copy_extensions_to_source(self) -> None:
        """CMake has already written them there."""


setup(
    ext_modules=[Extension("pansharp_fast._build_info", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Read by pip as an extra build requirement; empty wherever the environment has a torch of its own.
    setup_requires=[] if find_torch() else [f"torch>={'.'.join(map(str, MINIMUM_TORCH))}"],
)
