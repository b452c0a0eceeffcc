"""Which backends a test runs on here: those that run on this machine, each on its own device."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from pansharp_fast.ops import Operator
from pansharp_fast.ops._backends import interpreting, unavailable

needs_interpreter = pytest.mark.skipif(
    not interpreting() or importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter"
)


def device_of(backend: str) -> str:
    """Type of the device that tensors for `backend` lie on."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not interpreting()) else "cpu"


def parameter(backend: str) -> Any:
    """`backend` as a parameter of a test, marked `gpu` where it needs one and skipped where there is none.

    It is not skipped for another reason on a machine with a GPU: what was built and does not run there is a failure.
    """
    reason = unavailable(backend)
    marks = []
    if device_of(backend) == "cuda":
        marks.append(pytest.mark.gpu)
        if reason is not None and not torch.cuda.is_available():
            marks.append(pytest.mark.skip(reason=reason))
    elif reason is not None:
        marks.append(pytest.mark.skip(reason=reason))
    return pytest.param(backend, marks=marks)


def parameters(operator: Operator, *dtypes: torch.dtype, interpreted: bool = False) -> list[Any]:
    """The backends of `operator` that take `dtypes`.

    Triton's interpreter takes a second for what others do at once: it is left out unless `interpreted`.
    """
    return [
        parameter(name)
        for name, support in operator.support.items()
        if set(dtypes) <= set(support.dtypes) and (name != "triton" or interpreted or not interpreting())
    ]


#: Parameters of a test that runs here on the CPU and on a GPU where there is one.
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
