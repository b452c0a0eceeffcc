"""U-Know-DiffPAN `released`, 8 bands, 256x256: one step of teacher and student, and sampling with the student.

    python -m benchmarks.cases_uknow [--out benchmarks/results/cpu]

writes where time and memory go, before and after, to uknow_profile.md; times to be compared come from `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import time as clock
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pansharp_fast import use_backend
from pansharp_fast.diffusion import sample
from pansharp_fast.models import FSAConfig, FSAStudent, FSATeacher

from . import measure
from .cases_pancrafter import profile
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


def _network(name: str, cls: Any, device: torch.device) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Network, condition, noise and time."""
    torch.manual_seed(0)
    network: Any = cls(FSAConfig.preset("released", bands=8, teacher=name == "teacher")).to(device).eval()
    torch.nn.init.normal_(network.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    lms, pan = (torch.rand(1, bands, _SIDE, _SIDE, device=device) for bands in (8, 1))
    with torch.no_grad(), use_backend("reference"):
        cond = network.condition(lms, pan)
    return network, cond, torch.randn_like(lms), torch.full((1,), 240, device=device)


def _cases_of(name: str, cls: Any, device: torch.device) -> Iterator[Case]:
    network, cond, noise, time = _network(name, cls, device)
    with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
        network(noise, time, cond)
    with torch.no_grad():
        prepared = network.prepare(cond)
    parameters = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    images = 4 * noise.numel() * noise.element_size()
    works: dict[tuple[str, int], dict[str, Run]] = {
        ("one step", 1): {
            "reference": _on("reference", lambda: network(noise, time, cond)[:1]),
            "ours": _on("auto", lambda: network(noise, time, cond)[:1]),
            "ours, condition prepared": _on("auto", lambda: network(noise, time, prepared)[:1]),
        }
    }
    if name == "student":
        works["5 steps of DDIM", 5] = {
            "reference": _on("reference", lambda: _unhoisted(network, cond, noise, 5)),
            "ours, nothing kept over steps": _on("auto", lambda: _unhoisted(network, cond, noise, 5)),
            "ours": _on("auto", lambda: [sample(network, cond, steps=5, noise=noise, released=True).residual]),
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


_PREDICTION = """\
Predicted for the teacher from the profile before, with what was cut to get there: 3x3 convolutions, four fifths of
the time, to a third by Winograd's algorithm; norm, SiLU, time and residual in the same pass, 0.3 s to nothing but
the sums of the norms; features in channels_last, which brings 1x1 and depth-wise convolutions from 0.9 s to 0.2 s;
the last two convolutions of the 36 feed-forward branches in one; no queries in the wavelet attention, its context
and the projection behind it in one matrix; amplitudes, phases and norms in the frequency attention's passes, 1.2 s
to 0.3 s. Together 2.0 to 2.7 s instead of 5.5 s. Memory: 64 + 32 channels at full size are 25 MB; block input,
normalised features, q, k, v and result are six of those and three skips of 8 MB remain, so about 200 MB instead of
420 MB, once what is wider (twice the channels between the feed-forward convolutions, keys and values) is there a
strip at a time. For the student half the time, by the first two points alone. What is constant over steps is a
tenth of the teacher's work (prior vector, keys, values) and 1 % of the student's."""


def _profiles(device: torch.device) -> Iterator[str]:
    """Lines of the report."""
    for name, cls in (("teacher", FSATeacher), ("student", FSAStudent)):
        network, cond, noise, time = _network(name, cls, device)
        for title, backend in (("before: reference backend", "reference"), ("after", "auto")):
            run = _on(
                backend, lambda network=network, noise=noise, time=time, cond=cond: network(noise, time, cond)[:1]
            )
            yield from ("", f"## One step of the {name}, {title}", "", *profile(run))
            peak = measure.peak_bytes(run, device)
            yield from (
                "",
                f"Peak of memory beyond the inputs: {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'}.",
            )
    yield from ("", "## 25 steps of DDIM with the student, one call each", "", "| | s | factor |", "|---|---|---|")
    runs = {
        "reference backend, everything anew at every step": _on(
            "reference", lambda: _unhoisted(network, cond, noise, 25)
        ),
        "ours, everything anew at every step": _on("auto", lambda: _unhoisted(network, cond, noise, 25)),
        "ours": _on("auto", lambda: [sample(network, cond, steps=25, noise=noise, released=True).residual]),
    }
    first = None
    for title, run in runs.items():
        start = clock.perf_counter()
        run()
        seconds = clock.perf_counter() - start
        first = first or seconds
        yield f"| {title} | {seconds:.1f} | {first / seconds:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    options = parser.parse_args()
    lines = [
        f"# Where time and memory go: U-Know-DiffPAN `released`, 8 bands, {_SIDE}x{_SIDE}",
        "",
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; one "
        "profiled call each.",
        "",
        *_PREDICTION.splitlines(),
    ]
    for line in _profiles(torch.device("cpu")):
        lines.append(line)
        print(line, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "uknow_profile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
