"""Builds CUDA sources for the CPU shim and loads them as operators that take CPU tensors.

`python -m tests.simt` builds every library that the tests beside it ask for, one a core; a test builds what is missing.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pansharp_fast.ops  # noqa: F401  (defines the schemas)

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "simt"
TORCH = Path(torch.__file__).resolve().parent
ORDERS = ("forward", "reverse", "shuffle")

#: Every library that was declared.
LIBRARIES: list[Library] = []
_definitions: list[torch.library.Library] = []  # a library's definitions go when it does


def schema_of(name: str) -> str:
    """Schema of operator `pansharp_fast::name` without its name."""
    text = str(getattr(torch.ops.pansharp_fast, name).default._schema)
    return text[text.index("(") :]


@dataclass(frozen=True)
class Library:
    """A source compiled with g++ against the shim, kept by a hash of everything that it is made of.

    Attributes:
        source: path below the project root.
        names: operators of pansharp_fast that the source implements; the shim's have the same schemas (or `schema`).
        edits: (old, new, which), each replaces the `which`-th occurrence of `old`, all counted in the source as it is.
            `FAULT` in the n-th `new` is true where the environment variable SIMT_FAULT is n.
        optimise: the compiler's flag: what runs little is quicker built than run without.
    """

    source: str
    names: tuple[str, ...]
    edits: tuple[tuple[str, str, int], ...] = ()
    optimise: str = "-O1"
    schema: str = ""

    def __post_init__(self) -> None:
        LIBRARIES.append(self)

    @functools.cached_property
    def text(self) -> str:
        """The source with its edits."""
        source = (ROOT / self.source).read_text()
        places = []
        for number, (old, new, which) in enumerate(self.edits):
            start = -1
            for _ in range(which + 1):
                start = source.find(old, start + 1)
                if start < 0:
                    raise ValueError(f"edit: expected over {which} occurrences of {old!r} in {self.source}")
            places.append((start, start + len(old), new.replace("FAULT", f"::simt::fault({number})")))
        for start, end, new in sorted(places, reverse=True):
            source = source[:start] + new + source[end:]
        return source

    @property
    def namespace(self) -> str:
        return f"simt_{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"

    def build(self) -> Path:
        """Path of the library, compiled if it is not there."""
        # _longjmp leaves a fiber's stack for another: neither fortified calls nor shadow stacks allow that.
        flags = [
            "-std=c++20", self.optimise, "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-fcf-protection=none",
            f"-DPSF_SIMT={self.namespace}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *os.environ.get("SIMT_FLAGS", "").split(),
        ]  # fmt: skip
        digest = hashlib.sha256(" ".join([self.text, torch.__version__, *flags]).encode())
        for header in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / "simt.h"]):
            digest.update(header.read_bytes())
        BUILD.mkdir(parents=True, exist_ok=True)
        library = BUILD / f"{Path(self.source).stem}_{digest.hexdigest()[:16]}.so"
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
            if not library.is_file():
                unit, temporary = library.with_suffix(".cpp"), library.with_suffix(".tmp")
                unit.write_text(self.text)
                command = [
                    os.environ.get("CXX", "g++"), *flags, f"-I{ROOT / 'csrc'}", f"-I{HERE}",
                    f"-isystem{TORCH / 'include'}", str(unit), "-o", str(temporary),
                    f"-L{TORCH / 'lib'}", "-ltorch_cpu",
                ]  # fmt: skip
                subprocess.run(command, check=True)
                temporary.rename(library)
        return library

    @functools.cached_property
    def ops(self) -> Any:
        """The operators' namespace."""
        library = self.build()
        definitions = torch.library.Library(self.namespace, "DEF")
        for name in self.names:
            definitions.define(name + (self.schema or schema_of(name)))
        _definitions.append(definitions)
        torch.ops.load_library(str(library))
        return getattr(torch.ops, self.namespace)
