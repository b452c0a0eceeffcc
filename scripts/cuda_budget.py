"""Registers, stack and shared memory of every compiled CUDA kernel, compared with a committed budget.

    python scripts/cuda_budget.py           compare pansharp_fast/_C_cuda.so with scripts/cuda_budget.json
    python scripts/cuda_budget.py --write   set the budget to what was built

Needs no GPU: cuobjdump reads the library. It comes with the CUDA toolkit or with triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
LIBRARY = ROOT / "pansharp_fast" / "_C_cuda.so"
BUDGET = Path(__file__).with_suffix(".json")


def find_cuobjdump() -> str | None:
    """Path of cuobjdump, from PATH or from the triton package."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if bundled.is_file():
            return str(bundled)
    return shutil.which("cuobjdump")


def toolkit() -> str:
    """Version of the nvcc that built the library: another one allocates registers differently."""
    from pansharp_fast._extension import build_info

    info = build_info()
    return info.cuda if info is not None else ""


def measure(library: Path, cuobjdump: str) -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {arch: {registers, stack, shared}}} of `library`; stack bytes are local memory, spills included."""
    listing = subprocess.run([cuobjdump, "-res-usage", str(library)], check=True, capture_output=True, text=True).stdout
    # The file's name stands in the mangled name of its anonymous namespace: kernels of two files may share a name.
    listing = re.sub(r"(Function )(\w*GLOBAL__N__\w+?_\d+_(\w+?)_cu_\w+):", r"\1\2\n file \3", listing)
    names = subprocess.run(["c++filt"], input=listing, check=True, capture_output=True, text=True).stdout
    names = names.replace("(anonymous namespace)::", "")
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in names.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (?:void )?([^(]*)", line):
            kernel = match.group(1)
        elif match := re.match(r" file (\w+)", line):
            kernel = f"{match.group(1)}: {kernel}"
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = (int(value) for value in match.groups())
            found.setdefault(kernel, {})[arch] = {"registers": registers, "stack": stack, "shared": shared}
    return found


def compare(found: dict, budget: dict) -> list[str]:
    """Every way in which `found` exceeds `budget`, a kernel or architecture that the budget lacks included."""
    problems = []
    for kernel, archs in sorted(found.items()):
        for arch, numbers in archs.items():
            allowed = budget.get(kernel, {}).get(arch)
            if allowed is None:
                problems.append(f"{kernel} {arch}: not in the budget")
                continue
            problems += [
                f"{kernel} {arch}: {key}: expected at most {allowed[key]}, got {value}"
                for key, value in numbers.items()
                if value > allowed[key]
            ]
    problems += [f"{kernel}: in the budget, not in the library" for kernel in sorted(set(budget) - set(found))]
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="set the budget to what was built")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or not LIBRARY.is_file():
        print(f"cuda_budget: expected cuobjdump and {LIBRARY.name}, got {cuobjdump} and {LIBRARY.is_file()}")
        return 1
    found = measure(LIBRARY, cuobjdump)
    if arguments.write:
        BUDGET.write_text(json.dumps({"cuda": toolkit(), "kernels": found}, indent=1, sort_keys=True) + "\n")
        return 0
    budget = json.loads(BUDGET.read_text())
    if budget["cuda"] != toolkit():
        print(f"not compared: the budget is for CUDA {budget['cuda']}, the library was built with {toolkit()}")
        return 0
    problems = compare(found, budget["kernels"])
    print("\n".join(problems) or f"{len(found)} kernels within budget")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
