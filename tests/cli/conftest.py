"""A weights file of a small random network, and scenes on disk."""

from pathlib import Path

import pytest
import torch

from pansharp_fast.models import PANCrafter, preset, save_model

from ..inference.conftest import _one_thread, raster, scene

__all__ = ["_one_thread", "raster", "scene"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tiny` architecture, narrower, with random values in every tensor."""
    torch.manual_seed(11)
    model = PANCrafter(preset("tiny", hidden_sizes=(8, 8), depth=(1, 1), num_heads=2))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_model(path, model)
    return path
