"""Values that options may have, for the library and the command line alike. Light to import: no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import reprlib
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: How a network computes. "bfloat16" is autocast to it, "auto" that where the device computes in it natively.
PRECISIONS = ("auto", "float32", "bfloat16")
#: Other spelling -> name in `PRECISIONS`.
_PRECISION_ALIASES = {"bf16": "bfloat16", "fp32": "float32"}
#: Samplers of diffusion models.
SAMPLERS = ("ddim", "dpm++")
#: What the output of a diffusion network stands for.
PREDICTIONS = ("sample", "epsilon", "v_prediction")
#: Which keys PAN-Crafter's branches attend with, and how their neighbours are formed; see `nn.CM3A`.
ATTENTION_KEYS = ("aligned", "released")
NEIGHBOURS = ("learned", "shift")
#: Pixel types of written rasters.
DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "float32", "float64")
#: Classical methods of `sharpen`.
METHODS = ("exp", "brovey", "gsa", "bt-h", "mtf-glp-hpm", "mtf-glp-fs", "mtf-glp-hpm-r")
#: Where the bands of a result lie: where PAN shows things, or where each MS band does.
FRAMES = ("pan", "ms")
#: Architectures whose weights sharpen, alone or with a sampler.
SHARPENERS = ("pancrafter", "uknow-student", "uknow-teacher")


def shortened(message: object, length: int = 300) -> str:
    """One line of at most so many characters."""
    line = " ".join(str(message).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def expect(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {shortened(repr(value))}")


def check_fields(config: Any, **ranges: tuple[float, float]) -> None:
    """Raise ValueError unless these fields of a dataclass hold numbers in their ranges, ends included.

    A field annotated as a tuple holds up to 8 of them; one annotated as int, or a tuple of int, whole ones.
    """
    for field in dataclasses.fields(config):
        if field.name not in ranges:
            continue
        value, (least, most) = getattr(config, field.name), ranges[field.name]
        several, whole = "tuple" in str(field.type), "int" in str(field.type)
        kind = int if whole else (int, float)
        numbers = value if several else (value,)
        if len(numbers) > 8 or not all(
            isinstance(n, kind) and not isinstance(n, bool) and least <= n <= most for n in numbers
        ):
            what = f"{'whole ' if whole else ''}number{'s' if several else ''} from {least:g} to {most:g}"
            raise ValueError(
                f"{field.name}: expected {'up to 8 ' if several else 'a '}{what}, got {reprlib.repr(value)}"
            )


def precision(name: str) -> str:
    """The member of `PRECISIONS` that `name` spells ("bf16" is bfloat16).

    Raises:
        ValueError: it spells none.
    """
    chosen = _PRECISION_ALIASES.get(name, name)
    expect("precision", chosen, PRECISIONS)
    return chosen


def device(name: str | torch.device | None) -> torch.device:
    """The device called `name`; None, "" and "auto" are the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    if name is None or name in ("", "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} visible CUDA devices, got {name!r}")
    return chosen


def autocast(name: str, on: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which a network computes in precision `name` on a device.

    bfloat16 on a CPU that has to emulate it warns, once.

    Raises:
        ValueError: unknown precision.
    """
    import torch

    if not in_bfloat16(name, on):
        return contextlib.nullcontext()
    return torch.autocast(on.type, torch.bfloat16)


def in_bfloat16(name: str, on: torch.device) -> bool:
    """Whether precision `name` means bfloat16 on a device. On a CPU that has to emulate it this warns, once.

    Raises:
        ValueError: unknown precision.
    """
    name = precision(name)
    if name == "auto":
        return _has_bfloat16(on.type)
    if name == "bfloat16" and on.type == "cpu" and not _has_bfloat16("cpu"):
        _warn_of_emulation()
    return name == "bfloat16"


@functools.cache
def _has_bfloat16(kind: str) -> bool:
    """Whether devices of this kind multiply in bfloat16 by units of their own."""
    import torch

    if kind == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@functools.cache
def _warn_of_emulation() -> None:
    warnings.warn(
        "precision: expected float32 or auto on a CPU without bfloat16 units, got bfloat16, "
        "which takes 8 to 10 times as long as float32 there",
        stacklevel=5,
    )
