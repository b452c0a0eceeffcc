"""U-Know-DiffPAN `released`, 8 bands: one step of teacher and student, and a whole sampling run of the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pansharp_fast import use_backend
from pansharp_fast.diffusion import sample
from pansharp_fast.models import FSAConfig, FSAStudent, FSATeacher

from .registry import Case, Run, register

_SIDE = 256
#: The teacher's phases jump at the cut: rounding alone moves its output by about 1 %.
_TOLERANCE = {"teacher": 3e-2, "student": 1e-4}


def _on(backend: str, work: Callable[[], Sequence[torch.Tensor]]) -> Run:
    def run() -> Sequence[torch.Tensor]:
        with torch.no_grad(), use_backend(backend):
            return work()

    return run


def _unhoisted(network: Any, cond: Any, noise: torch.Tensor, steps: int) -> Sequence[torch.Tensor]:
    """The same sampling with everything computed anew at every step."""

    class Forgetful:
        config = network.config

        def prepare(self, given: Any) -> Any:
            return network.prepare(given, keep=False)

        def __call__(self, x: torch.Tensor, time: torch.Tensor, _: Any, *rest: Any, **options: Any) -> Any:
            return network(x, time, cond, *rest, **options)

    return [sample(Forgetful(), cond, steps=steps, noise=noise, released=True).residual]  # type: ignore[arg-type]


@register("uknow")
def cases(device: torch.device) -> Iterator[Case]:
    for name, cls in (("student", FSAStudent), ("teacher", FSATeacher)):
        yield from _cases_of(name, cls, device)


def _cases_of(name: str, cls: Any, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    network: Any = cls(FSAConfig.preset("released", bands=8, teacher=name == "teacher")).to(device).eval()
    torch.nn.init.normal_(network.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    lms, pan = (torch.rand(1, bands, _SIDE, _SIDE, device=device) for bands in (8, 1))
    noise, time = torch.randn_like(lms), torch.full((1,), 240, device=device)
    with torch.no_grad(), use_backend("reference"):
        cond = network.condition(lms, pan)
        prepared = network.prepare(cond)
        with FlopCounterMode(display=False) as counter:
            network(noise, time, cond)
    parameters = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    images = 4 * lms.numel() * lms.element_size()
    works: dict[tuple[str, int], dict[str, Run]] = {
        ("one step", 1): {
            "reference": _on("reference", lambda: network(noise, time, cond)[:1]),
            "ours": _on("auto", lambda: network(noise, time, cond)[:1]),
            "ours, condition prepared": _on("auto", lambda: network(noise, time, prepared)[:1]),
        },
        ("5 steps of DDIM", 5): {
            "reference": _on("reference", lambda: _unhoisted(network, cond, noise, 5)),
            "ours, nothing kept over steps": _on("auto", lambda: _unhoisted(network, cond, noise, 5)),
            "ours": _on("auto", lambda: [sample(network, cond, steps=5, noise=noise, released=True).residual]),
        },
    }
    for (work, steps), columns in works.items():
        yield Case(
            operator="uknow",
            size=f"{name} {_SIDE}²",
            dtype=torch.float32,
            work=work,
            columns=columns,
            tolerance=_TOLERANCE[name],
            traffic=steps * (parameters + images),
            flops=steps * counter.get_total_flops(),
        )
