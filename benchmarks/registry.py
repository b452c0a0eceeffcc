"""What a benchmark case is, and where the files `cases_<operator>.py` put theirs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pansharp_fast.ops._backends import Operator, candidates, reasons

Run = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One piece of work done in several ways, side by side.

    columns: name -> function that does the work once and returns all results; the first column is the baseline, the
    reference in eager mode. tolerance: largest norm of the deviation from the baseline's results, relative to their
    norm; a column beyond it gets no time. ungated: columns whose results differ by definition, with the reason.
    traffic: bytes that any implementation must read and write at least. flops: counted, a multiplication with addition
    as two.
    """

    operator: str
    size: str
    dtype: torch.dtype
    work: str  # "forward", "backward" or "forward+backward"
    columns: Mapping[str, Run]
    tolerance: float
    traffic: int
    flops: int
    ungated: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.size}, {self.work}, {str(self.dtype).removeprefix('torch.')}"


def kernels(operator: Operator, tensors: Sequence[torch.Tensor], **options: Any) -> list[str]:
    """Backends other than the reference that can run this call, best first."""
    names = candidates(tensors[0].device.type)
    return [name for name in names if name != "reference" and not reasons(operator, name, tensors, **options)]


def column(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], work: str
) -> Run:
    """`work` of function(*inputs); the results are its outputs, or gradients of all inputs, or both."""

    def outputs(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        result = function(*tensors)
        return [result] if isinstance(result, torch.Tensor) else list(result)

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return outputs(inputs)

    leaves = [x.detach().requires_grad_() for x in inputs]
    kept: list[torch.Tensor] = []

    def backward() -> Sequence[torch.Tensor]:
        if not kept:  # the first call, which is not timed
            kept.extend(outputs(leaves))
        return torch.autograd.grad(kept, leaves, gradients, retain_graph=True)

    def both() -> Sequence[torch.Tensor]:
        results = outputs(leaves)
        return [*results, *torch.autograd.grad(results, leaves, gradients)]

    return {"forward": forward, "backward": backward, "forward+backward": both}[work]


Cases = Callable[[torch.device], Iterator[Case]]
#: operator -> generator of its cases for a device; a case's tensors live until the next one is asked for.
REGISTRY: dict[str, Cases] = {}


def register(operator: str) -> Callable[[Cases], Cases]:
    """Decorator of a generator of cases."""

    def add(cases: Cases) -> Cases:
        REGISTRY[operator] = cases
        return cases

    return add


def load() -> dict[str, Cases]:
    """Import every `cases_*.py` of this folder and return the registry."""
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(f"benchmarks.{path.stem}")
    return REGISTRY
