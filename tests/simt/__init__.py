"""Builds CUDA sources for the CPU shim and loads them as operators that take CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "simt"
TORCH = Path(torch.__file__).resolve().parent

_libraries: list[torch.library.Library] = []  # a library's definitions go when it does


def schema_of(name: str) -> str:
    """Schema of operator `pansharp_fast::name` without its name."""
    text = str(getattr(torch.ops.pansharp_fast, name).default._schema)
    return text[text.index("(") :]


@functools.cache
def load(source: str, names: tuple[str, ...], *edits: tuple[str, str, int], schema: str = "") -> Any:
    """Compile `source` (path below the project root) with g++ against the shim; return the operators' namespace.

    names: operators of pansharp_fast that the source implements; the shim's have the same schemas (or `schema`).
    edits: (old, new, which), replaces the `which`-th occurrence of `old` first: a planted fault, or another constant.
    The library is kept by a hash of everything that it is made of, so that a second run compiles nothing.
    """
    text = (ROOT / source).read_text()
    for old, new, which in edits:
        parts = text.split(old)
        if len(parts) <= which + 1:
            raise ValueError(f"edit: expected over {which} occurrences of {old!r} in {source}, got {len(parts) - 1}")
        text = old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])
    namespace = f"simt_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    flags = [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-w",
        f"-DPSF_SIMT={namespace}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    digest = hashlib.sha256(" ".join([text, torch.__version__, *flags]).encode())
    for header in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / "simt.h"]):
        digest.update(header.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"{Path(source).stem}_{digest.hexdigest()[:16]}.so"
    if not library.is_file():
        unit = library.with_suffix(".cpp")
        unit.write_text(text)
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        command = [
            os.environ.get("CXX", "g++"), *flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-isystem{TORCH / 'include'}",
            str(unit), "-o", str(temporary), f"-L{TORCH / 'lib'}", "-ltorch_cpu",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        temporary.rename(library)
    definitions = torch.library.Library(namespace, "DEF")
    for name in names:
        definitions.define(name + (schema or schema_of(name)))
    _libraries.append(definitions)
    torch.ops.load_library(str(library))
    return getattr(torch.ops, namespace)
