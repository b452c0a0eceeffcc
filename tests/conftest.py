"""Shared fixtures: where the reference material lies, and reproducible randomness."""

import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker; before NumPy and torch start their threads
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")

import pytest
import torch
from hypothesis import settings

# The same examples at every run; a busy machine is no failure.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: last, one of them would run alone while other workers have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of imagery and golden values beside the checkout; tests that need it skip where it is absent."""
    path = Path(os.environ.get("PSF_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden files that stand in the repository."""
    return GOLDEN


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
