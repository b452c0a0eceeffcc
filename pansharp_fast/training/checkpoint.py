"""State of a training run in one safetensors file, replaced in one move: a kill leaves the old one or the new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import read_tensors, write_tensors
from ..options import shortened

_META = "pansharp_fast"


def save_state(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able `meta` to a safetensors file."""
    # Copies, as names of one memory are refused.
    write_tensors(path, {name: tensor.detach().clone() for name, tensor in tensors.items()}, {_META: json.dumps(meta)})


def load_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and meta that `save_state` wrote.

    Raises:
        ValueError: the file is no such state.
        OSError: it cannot be read.
    """
    try:
        text, tensors = read_tensors(path)
        meta = json.loads(text.get(_META, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"state: {shortened(error)}") from None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: expected the state of a training run, got safetensors without its metadata")
    return tensors, meta


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors, named by parameter index and key."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `optimizer_tensors`; rates and other options stay as they are."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        index, entry = name.split(".", 1)
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
