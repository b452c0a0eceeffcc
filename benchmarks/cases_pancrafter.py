"""The whole PAN-Crafter at 256x256 PAN, 8 bands, preset `released`: forward on one image.

    python -m benchmarks.cases_pancrafter [--out benchmarks/results/cpu]

writes where the time goes, before and after, to pancrafter_profile.md; the times come from `benchmarks.run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pansharp_fast import use_backend
from pansharp_fast.models import PANCrafter, preset

from .registry import Case, Run, register

SIZE, BANDS = 256, 8


class Nothing(nn.Module):
    """Takes the place of an attention block, to see what the rest costs."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


def network(device: torch.device, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last) -> PANCrafter:
    """The network with every tensor away from zero."""
    torch.manual_seed(0)
    model = PANCrafter(preset("released", bands=BANDS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device, dtype).to(memory_format=layout)


def forward(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> Run:
    """A call of the model on one image of SIZE."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 1, SIZE, SIZE), (1, 1, SIZE // 4, SIZE // 4), (1, BANDS, SIZE // 4, SIZE // 4))
    images = [torch.rand(shape, generator=generator).to(device, dtype) for shape in shapes]
    mode = torch.ones(1, device=device)

    def run() -> list[Tensor]:
        with use_backend(backend), torch.no_grad():
            return [model(*images, mode)]

    return run


def plain(device: torch.device) -> Run:
    """The baseline: PyTorch's own operators, float32, NCHW, eager."""
    return forward(network(device, torch.float32, torch.contiguous_format), "reference", device, torch.float32)


@register("pancrafter")
def cases(device: torch.device) -> Iterator[Case]:
    baseline = plain(device)
    with FlopCounterMode(display=False) as counter:
        outputs = baseline()
    values = sum(p.numel() for p in network(device, torch.float32).parameters())
    values += outputs[0].numel() + SIZE * SIZE * (1 + (BANDS + 1) / 16)
    without = network(device, torch.float32)
    for name, _ in list(without.named_children()):
        if name.startswith("cond"):
            setattr(without, name, Nothing())
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        ours = network(device, dtype)
        columns = {
            "reference, NCHW, float32": baseline,
            "reference, channels last": forward(network(device, dtype), "reference", device, dtype),
            "ours": forward(ours, "auto", device, dtype),
        }
        if dtype == torch.float32:
            columns["no attention blocks"] = forward(without, "auto", device, dtype)
        yield Case(
            operator="pancrafter",
            size=f"released, {BANDS} bands, {SIZE}² PAN",
            dtype=dtype,
            work="forward",
            columns=columns,
            tolerance=tolerance,
            traffic=int(values * ours.s_token.element_size()),
            flops=counter.get_total_flops(),
            ungated={
                "no attention blocks": "no attention blocks: the network without them, a lower bound for their cost"
            },
        )
        torch.compiler.reset()
        compiled = {
            "reference, NCHW, float32": baseline,
            "torch.compile of the reference": forward(
                torch.compile(network(device, dtype, torch.contiguous_format)), "reference", device, dtype
            ),
            "torch.compile of ours": forward(torch.compile(network(device, dtype)), "auto", device, dtype),
        }
        yield Case(
            operator="pancrafter",
            size=f"released, {BANDS} bands, {SIZE}² PAN, compiled",
            dtype=dtype,
            work="forward",
            columns=compiled,
            tolerance=tolerance,
            traffic=int(values * ours.s_token.element_size()),
            flops=counter.get_total_flops(),
        )


def profile(run: Run, rows: int = 12) -> list[str]:
    """Table of the operators that take the most time of their own."""
    run()
    with torch.profiler.profile() as trace:
        run()
    events = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"{total / 1e6:.2f} s in all.", "", "| operator | calls | ms | share |", "|---|---|---|---|"]
    for event in events[:rows]:
        own = event.self_cpu_time_total
        lines.append(f"| {event.key} | {event.count} | {own / 1e3:.1f} | {own / total:.1%} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    options = parser.parse_args()
    device = torch.device("cpu")
    lines = [
        f"# Where the time goes: PAN-Crafter `released`, {BANDS} bands, one {SIZE}x{SIZE} PAN image",
        "",
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; one "
        "profiled call each.",
    ]
    for title, run in (
        ("Before: reference backend, NCHW, float32", plain(device)),
        ("After: float32", forward(network(device, torch.float32), "auto", device, torch.float32)),
        ("After: bfloat16", forward(network(device, torch.bfloat16), "auto", device, torch.bfloat16)),
    ):
        lines += ["", f"## {title}", "", *profile(run)]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pancrafter_profile.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
