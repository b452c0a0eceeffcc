"""Runs the cases of a device and writes tables.

    python -m benchmarks.run --device cpu [--only cm3a] [--case TEXT] [--out benchmarks/results/cpu]

Per operator it writes `<operator>.json`, `<operator>.md` and `<operator>.png`. Cases that are not run this time keep
their results in these files. Each case is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch

from . import measure
from .registry import Case, load


def device_name(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def deviation(results: Any, expected: Any) -> float:
    """Largest relative norm of the difference over all results; infinity where shapes differ."""
    worst = 0.0
    for got, want in zip(results, expected, strict=True):
        if got.shape != want.shape:
            return float("inf")
        got, want = got.detach().double(), want.double()
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-30)))
    return worst


def run_case(case: Case, device: torch.device, rates: dict[str, float]) -> dict[str, Any]:
    """All columns of one case: error, seconds, peak bytes, shares of the measured rates."""
    first = next(iter(case.columns))
    expected = [each.detach().clone() for each in case.columns[first]()]
    columns: dict[str, Any] = {}
    for name, run in case.columns.items():
        try:
            error = None if name in case.ungated else 0.0 if name == first else deviation(run(), expected)
        except RuntimeError as problem:  # of memory, or of a kernel: the other columns have their times all the same
            columns[name] = {"error": None, "failed": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
            continue
        if error is not None and not error <= case.tolerance:
            columns[name] = {"error": error, "failed": f"deviates by {error:.1e}, allowed {case.tolerance:.1e}"}
            continue
        columns[name] = {"error": error, "peak_bytes": measure.peak_bytes(run, device)}
    timed = [name for name, column in columns.items() if "failed" not in column]
    times = measure.side_by_side([case.columns[name] for name in timed], device)
    for name, measured in zip(timed, times, strict=True):
        columns[name] |= {
            "seconds": measured.seconds,
            "share_of_copy_rate": case.traffic / rates["copy"] / measured.seconds,
            "share_of_matrix_rate": case.flops / rates[str(case.dtype)] / measured.seconds,
        }
        if measured.host is not None:
            columns[name]["host_seconds"] = measured.host
        if name in case.ungated:
            columns[name]["note"] = case.ungated[name]
    return {
        "size": case.size,
        "work": case.work,
        "dtype": str(case.dtype).removeprefix("torch."),
        "traffic_bytes": case.traffic,
        "flops": case.flops,
        "copy_rate": rates["copy"],
        "matrix_rate": rates[str(case.dtype)],
        "columns": columns,
    }


def markdown(operator: str, report: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"# {operator} on {report['device']}",
        "",
        f"torch {report['torch']}. Times are medians in ms, the columns of a case measured in turn; the factor is "
        "against the first column; MB is the peak of memory beyond the inputs; copy and matrix are shares of the rates "
        "that a plain copy and a plain matrix product reached in the same run (bytes and operations are counted, not "
        "measured). Every column agreed with the first one before it was timed.",
        "",
    ]
    gpu = any("host_seconds" in value for case in report["cases"].values() for value in case["columns"].values())
    if gpu:
        lines += ["ms are the GPU's own; host is what a call takes the CPU to ask for the work, in ms beside them.", ""]
    lines += [
        f"| case | column | ms | factor | MB | copy | matrix |{' host |' * gpu}",
        f"|---|---|---|---|---|---|---|{'---|' * gpu}",
    ]
    digits = 4 if gpu else 2
    notes: dict[str, None] = {}
    for name, case in report["cases"].items():
        baseline = next(iter(case["columns"].values()))["seconds"]
        for column, value in case["columns"].items():
            if "failed" in value:
                lines.append(f"| {name} | {column} | {value['failed']} | | | | |{' |' * gpu}")
                continue
            peak = "" if value["peak_bytes"] is None else f"{value['peak_bytes'] / 1e6:.0f}"
            lines.append(
                f"| {name} | {column} | {value['seconds'] * 1e3:.{digits}f} | "
                f"{baseline / value['seconds']:.1f} | {peak} "
                f"| {value['share_of_copy_rate']:.0%} | {value['share_of_matrix_rate']:.0%} |"
                + (f" {value['host_seconds'] * 1e3:.4f} |" if gpu else "")
            )
            if "note" in value:
                notes[f"{column}: {value['note']}"] = None
    lines += ["", *notes]
    rates = {(case["dtype"], case["copy_rate"], case["matrix_rate"]) for case in report["cases"].values()}
    for dtype, copy, matrix in sorted(rates):
        lines.append(f"Measured: copy {copy / 1e9:.0f} GB/s, matrix product in {dtype} {matrix / 1e9:.0f} GFLOP/s.  ")
    return "\n".join(lines).rstrip() + "\n"


def plot(operator: str, report: dict[str, Any], path: Path) -> None:
    """Factor against the baseline of every column, a group a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"]
    columns = list(dict.fromkeys(name for case in cases.values() for name in case["columns"]))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(cases) * len(columns)), layout="constrained")
    height = 0.8 / len(columns)
    for index, column in enumerate(columns):
        at, factors = [], []
        for row, case in enumerate(cases.values()):
            value = case["columns"].get(column, {})
            if "seconds" in value:
                at.append(row + index * height)
                factors.append(next(iter(case["columns"].values()))["seconds"] / value["seconds"])
        bars = axes.barh(at, factors, height, label=column)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(cases))], list(cases), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the first column")
    axes.set_title(f"{operator} on {report['device']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="one operator")
    parser.add_argument("--case", default="", help="only cases whose name contains this text")
    parser.add_argument("--out", type=Path, help="folder, by default benchmarks/results/DEVICE")
    options = parser.parse_args()
    device = torch.device(options.device)
    out = options.out or Path(__file__).parent / "results" / device.type
    out.mkdir(parents=True, exist_ok=True)
    registry = load()
    if options.only is not None and options.only not in registry:
        parser.error(f"--only: expected one of {', '.join(registry)}, got {options.only}")
    torch.backends.cudnn.allow_tf32 = False  # as torch's matrix products: float32 columns compute in float32
    functorch.donated_buffer = False  # a compiled backward may then run more than once
    rates = {"copy": measure.copy_rate(device)}
    torch.manual_seed(0)
    for operator in [options.only] if options.only else list(registry):
        path = out / f"{operator}.json"
        report: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__, "cases": {}}
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier["device"] == report["device"] and earlier["torch"] == report["torch"]:
                report["cases"] = earlier["cases"]
        for case in registry[operator](device):
            if options.case not in case.name:
                continue
            if str(case.dtype) not in rates:
                rates[str(case.dtype)] = measure.matrix_rate(device, case.dtype)
            report["cases"][case.name] = run_case(case, device, rates)
            for column, value in report["cases"][case.name]["columns"].items():
                shown = value.get("failed") or f"{value['seconds'] * 1e3:.4f} ms"
                print(f"{operator}: {case.name}: {column}: {shown}", flush=True)
            path.write_text(json.dumps(report, indent=1) + "\n")  # after each case: a long run may be cut off
            path.with_suffix(".md").write_text(markdown(operator, report))
        if report["cases"]:
            plot(operator, report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
