"""Checkpoints: a safetensors file whose metadata names the architecture and holds its configuration as JSON."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..files import atomic
from ..options import shortened

#: Architecture name -> (module, model class). A model class has `architecture` and `config_class`, a model `config`;
#: a configuration has `bands` (None: any number), `to_dict()` and takes its fields as keyword arguments.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "pancrafter": ("pansharp_fast.models.pancrafter", "PANCrafter"),
    "universal": ("pansharp_fast.models.universal", "Universal"),
    "uknow-prior": ("pansharp_fast.models.prior", "PriorNet"),
    "uknow-teacher": ("pansharp_fast.models.fsa", "FSATeacher"),
    "uknow-student": ("pansharp_fast.models.fsa", "FSAStudent"),
}
#: Folder of the weights that come with the package.
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


_OFFICIAL_FILES = (
    "a file of the public releases: compat.from_official and save_model turn it into a checkpoint, see docs/official.md"
)


class CheckpointError(ValueError):
    """A file is no checkpoint of this package, or not the one asked for."""


def available_weights() -> list[str]:
    """Names that `load_model` takes besides paths."""
    return sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))


def save_model(path: str | os.PathLike[str], model: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the model's tensors and configuration; the file appears whole or not at all.

    Args:
        path: file to write, conventionally `*.safetensors`; its folder must exist.
        model: an instance of one of `ARCHITECTURES`.
        metadata: further facts, such as the sensor or the training step, as values that JSON takes.
    """
    path = Path(path)
    text = {
        "architecture": model.architecture,
        "config": json.dumps(model.config.to_dict()),
        "metadata": json.dumps(dict(metadata or {})),
    }
    write_tensors(path, model.state_dict(), text)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], text: Mapping[str, str]) -> None:
    """Write a safetensors file whose bytes follow from its content alone; it appears whole or not at all."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = save(plain, metadata=dict(text))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(text.items()))  # the library writes its keys in an order of chance
    line = json.dumps(header, separators=(",", ":")).encode()
    line += b" " * (-len(line) % 8)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(len(line).to_bytes(8, "little") + line)
        file.write(memoryview(content)[end:])


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        ValueError: the file is none, is damaged, or holds tensors that are no floating-point numbers or step counts.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"expected a safetensors file, got a damaged file {path} ({shortened(error)})") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64):
            raise ValueError(f"expected floating-point tensors, got {tensor.dtype} as {shortened(name)} in {path}")
    return text, tensors


def read_checkpoint(
    path: str | os.PathLike[str],
) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """(architecture, configuration, further metadata, tensors) of a file written by `save_model`.

    Raises:
        CheckpointError: the file is missing, damaged, pickled or not of this package.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights: expected a file, got {path}, which does not exist")
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{":  # a short header may start with b"\x80" too
        raise CheckpointError(
            f"weights: expected a checkpoint of this package, got the pickled file {path} ({_OFFICIAL_FILES})"
        )
    try:
        text, tensors = read_tensors(path)
    except ValueError as error:
        raise CheckpointError(f"weights: {error}") from None
    if "architecture" not in text or "config" not in text:
        raise CheckpointError(
            f"weights: expected metadata 'architecture' and 'config', got none in {path} ({_OFFICIAL_FILES})"
        )
    try:
        config, metadata = json.loads(text["config"]), json.loads(text.get("metadata", "{}"))
        if not (isinstance(config, dict) and isinstance(metadata, dict)):
            raise ValueError("expected two objects")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"weights: expected metadata 'config' in JSON, got a damaged one in {path} ({shortened(error)})"
        ) from None
    return text["architecture"], config, metadata, tensors


def _compare(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless names and shapes are the same."""
    for name in sorted({*expected, *tensors}):
        shapes = [tuple(part[name].shape) if name in part else None for part in (expected, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: expected {shapes[0] or 'none'}, got {shapes[1] or 'none'}")


def find_weights(path_or_name: str | os.PathLike[str]) -> Path:
    """The file that `load_model` reads.

    Raises:
        CheckpointError: a name without suffix is neither a file nor one of `available_weights()`.
    """
    path = Path(path_or_name)
    if path.suffix or path.is_file():  # a folder of that name beside the caller does not hide the weights
        return path
    if str(path_or_name) not in available_weights():
        raise CheckpointError(f"weights: expected a file or one of {available_weights()}, got {str(path_or_name)!r}")
    return WEIGHTS / f"{path_or_name}.safetensors"


def load_model(
    path_or_name: str | os.PathLike[str], *, bands: int | None = None, device: torch.device | str = "cpu"
) -> Any:
    """A model in evaluation mode from a checkpoint.

    Args:
        path_or_name: a file, or one of `available_weights()` such as "tiny".
        bands: where given, the number of MS bands that the model must have.
        device: where the model is put.

    Raises:
        CheckpointError: no such weights, a damaged or pickled file, unknown architecture, tensors that do not fit the
            configuration, or another number of bands.
    """
    path = find_weights(path_or_name)
    architecture, config, _, tensors = read_checkpoint(path)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"weights: expected an architecture of {sorted(ARCHITECTURES)}, "
            f"got {shortened(repr(architecture))} in {path}"
        )
    module, name = ARCHITECTURES[architecture]
    model_class = getattr(importlib.import_module(module), name)
    try:
        settings = model_class.config_class(**config)
        with torch.device("meta"):  # a configuration may claim any size; nothing is allocated before the file agrees
            expected = model_class(settings).state_dict()
        _compare(expected, tensors)
        model = model_class(settings)
        model.load_state_dict(tensors)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"weights: expected tensors that fit the configuration, got {path} ({shortened(error)})"
        ) from None
    if bands is not None and model.config.bands not in (bands, None):
        raise CheckpointError(
            f"weights: expected a model for {bands} bands, got one for {model.config.bands} in {path}"
        )
    return model.to(device).eval()
