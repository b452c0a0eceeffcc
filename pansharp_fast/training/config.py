"""Settings of a training run: a YAML file, every key of which is a flag of the command line too."""

from __future__ import annotations

import dataclasses
import os
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .. import options
from ..options import shortened

T = TypeVar("T", bound="TrainConfig")


def key(help: str, default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """A field of a configuration with its line of help."""
    return field(default=default, metadata={"help": help}, **kwargs)


#: Bytes of a configuration file.
_LARGEST_FILE = 1 << 14
PRECISION_HELP = "auto (bfloat16 where the device has units for it), float32 or bfloat16 (autocast)"


@dataclass(kw_only=True)
class TrainConfig:
    """Keys that every recipe has. Paths may be relative to the working directory."""

    train: str = key("PanCollection HDF5 file with gt to train on")
    valid: str = key("PanCollection HDF5 file with gt that selects the best weights")
    out: str = key("folder of checkpoints, logs and pictures")
    sensor: str | None = key("sensor of the files; gives the peak", None)
    peak: float | None = key("largest digital number, over the sensor's own", None)
    device: str = key("auto (cuda where there is one, else cpu), cpu, cuda or cuda:N", "auto")
    seed: int = key("seed of weights, order, orientation and dropout", 2025)
    steps: int = key("optimiser steps of the whole run", 50_000)
    batch_size: int = key("samples of a step, over all processes", 48)
    augment: bool = key("random flips and rotations, with the phase of ms kept", True)
    lr: float = key("learning rate after warm-up", 1e-4)
    weight_decay: float = key("of AdamW", 0.01)
    warmup: int = key("steps over which the learning rate rises from 0", 100)
    schedule: str = key("of the learning rate after warm-up: cosine (to 0) or step", "cosine")
    milestones: tuple[int, ...] = key("schedule step: the rate is halved at each of these steps", ())
    clip: float = key("largest norm of the gradient; 0: no clipping", 1.0)
    ema: float = key("decay of the weights' moving average, which is then validated and kept; 0: none", 0.0)
    ema_start: int = key("step at which the moving average begins", 0)
    precision: str = key(PRECISION_HELP, "auto")
    channels_last: bool = key("memory format of the images", True)
    recompute: bool = key("a third of the memory for more time: features are computed twice, not held", False)
    workers: int = key("processes that read samples; 0: the training process itself", 0)
    log_every: int = key("steps between lines of log.csv", 50)
    valid_every: int = key("steps between validations", 1000)
    save_every: int = key("steps between saved states", 500)
    select: str = key("measure on the validation split that selects: psnr, sam or ergas", "psnr")

    def __post_init__(self) -> None:
        self.precision = options.precision(self.precision)
        for name, allowed in _CHOICES.items():
            options.expect(name, getattr(self, name), allowed)
        for name in ("steps", "batch_size", "log_every", "valid_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


_CHOICES = {
    "schedule": ("cosine", "step"),
    "select": ("psnr", "sam", "ergas"),
}


def field_types(config: type[TrainConfig]) -> dict[str, Any]:
    """Key -> annotated type."""
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, which is one of the types that fields above use."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name}: expected a list, got {reprlib.repr(value)}")
        return tuple(_convert(name, part, item) for part in value)
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        if kind is int:
            return int(float(value))
        if kind is float:  # YAML reads 1e-4 as text
            return float(value)
        if kind is str and not isinstance(value, (str, int, float, os.PathLike)):
            raise ValueError
        return kind(value)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {reprlib.repr(value)}") from None


def _read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a small YAML file of plain values holds.

    Tags make Python objects of what they like; aliases and levels grow a small file, or its reading, to any size.
    """
    import yaml

    with open(path, "rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"{path}: expected at most {_LARGEST_FILE} bytes, got more")
    problem, depth = "", 0
    try:
        text = content.decode()
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                problem = "values and lists of them, got more levels"
            elif isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
                problem = "values without tags and aliases, got one"
            if problem:
                problem += f" in line {event.start_mark.line + 1}"
                break
        else:
            return yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, no UTF-8
        problem = f"YAML, got {shortened(error)}"
    raise ValueError(f"{path}: expected {problem}")


def load_config(config: type[T], path: str | os.PathLike[str] | None = None, **overrides: Any) -> T:
    """Configuration from a YAML file, then `overrides`; values of None leave the file's alone.

    Raises:
        ValueError: an unknown or missing key, or a value of the wrong type.
        OSError: the file cannot be read.
    """
    values: dict[str, Any] = {}
    if path is not None:
        loaded = _read_yaml(path)
        if not isinstance(loaded, dict):
            raise ValueError(f"{path}: expected key: value lines, got {type(loaded).__name__}")
        values.update(loaded)
    values.update({name: value for name, value in overrides.items() if value is not None})
    kinds = field_types(config)
    unknown = sorted(str(key) for key in set(values) - set(kinds))
    if unknown:
        raise ValueError(f"configuration: expected keys among {', '.join(kinds)}, got {shortened(', '.join(unknown))}")
    needed = [f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"configuration: expected {', '.join(needed)}, got none for {', '.join(missing)}")
    return config(**{name: _convert(name, value, kinds[name]) for name, value in values.items()})
