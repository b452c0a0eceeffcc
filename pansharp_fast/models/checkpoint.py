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
from safetensors.torch import save_file

from ..files import atomic

#: Architecture name -> (module, model class). A model class has `architecture` and `config_class`, a model `config`;
#: a configuration has `bands`, `to_dict()` and takes its fields as keyword arguments.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "pancrafter": ("pansharp_fast.models.pancrafter", "PANCrafter"),
    "uknow-prior": ("pansharp_fast.models.prior", "PriorNet"),
    "uknow-teacher": ("pansharp_fast.models.fsa", "FSATeacher"),
    "uknow-student": ("pansharp_fast.models.fsa", "FSAStudent"),
}
#: Folder of the weights that come with the package.
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


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
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic(path) as part:
        save_file(tensors, part, metadata=text)  # type: ignore[arg-type]


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
            f"weights: expected a safetensors checkpoint, got the pickled file {path} (read a state dict with "
            "torch.load(weights_only=True), build with compat.from_official and write with save_model)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"weights: expected a safetensors checkpoint, got a damaged file {path} ({error})"
        ) from None
    try:
        architecture = text["architecture"]
        config, metadata = json.loads(text["config"]), json.loads(text.get("metadata", "{}"))
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"weights: expected metadata 'architecture' and 'config', got none or damaged in {path} ({error})"
        ) from None
    return architecture, config, metadata, tensors


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
    path = Path(path_or_name)
    if not path.suffix and not path.is_file():  # a folder of that name beside the caller does not hide the weights
        if str(path_or_name) not in available_weights():
            raise CheckpointError(
                f"weights: expected a file or one of {available_weights()}, got {str(path_or_name)!r}"
            )
        path = WEIGHTS / f"{path_or_name}.safetensors"
    architecture, config, _, tensors = read_checkpoint(path)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"weights: expected an architecture of {sorted(ARCHITECTURES)}, got {architecture!r} in {path}"
        )
    module, name = ARCHITECTURES[architecture]
    model_class = getattr(importlib.import_module(module), name)
    try:
        model = model_class(model_class.config_class(**config))
        model.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise CheckpointError(f"weights: expected tensors that fit the configuration, got {path} ({line})") from None
    if bands is not None and model.config.bands != bands:
        raise CheckpointError(
            f"weights: expected a model for {bands} bands, got one for {model.config.bands} in {path}"
        )
    return model.to(device).eval()
