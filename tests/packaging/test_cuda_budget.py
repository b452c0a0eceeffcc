"""Compiled CUDA kernels keep their committed budget of registers, stack and shared memory."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("cuda_budget", ROOT / "scripts" / "cuda_budget.py")
cuda_budget = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_budget)


def test_kernels_keep_their_budget():
    if not cuda_budget.LIBRARY.is_file():
        pytest.skip("CUDA kernels were not built")
    cuobjdump = cuda_budget.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("cuobjdump comes with the CUDA toolkit or triton; neither is here")
    budget = json.loads(cuda_budget.BUDGET.read_text())
    if budget["cuda"] != cuda_budget.toolkit():
        pytest.skip(f"the budget is for CUDA {budget['cuda']}, built with {cuda_budget.toolkit()}")
    found = cuda_budget.measure(cuda_budget.LIBRARY, cuobjdump)
    assert found
    assert cuda_budget.compare(found, budget["kernels"]) == []


def test_excess_is_reported():
    number = {"registers": 32, "stack": 0, "shared": 1024}
    budget = {"kernel<float>": {"sm_90": number}}
    assert cuda_budget.compare(budget, budget) == []
    worse = {"kernel<float>": {"sm_90": {**number, "stack": 8}, "sm_80": number}}
    problems = cuda_budget.compare(worse, budget)
    assert len(problems) == 2
    assert "stack: expected at most 0, got 8" in problems[0]
    assert len(cuda_budget.compare({}, budget)) == 1
