"""Checkpoints: what comes back, and what is refused with which words."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from pansharp_fast.models import CheckpointError, PANCrafter, available_weights, load_model, preset, save_model
from pansharp_fast.models.checkpoint import read_checkpoint


@pytest.fixture
def model():
    return PANCrafter(preset("tiny", hidden_sizes=(8, 8), depth=(1, 1), num_heads=2))


def test_round_trip(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"sensor": "WV3"})
    loaded = load_model(path, bands=4)
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert read_checkpoint(path)[2] == {"sensor": "WV3"}
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pansharp_fast.models.checkpoint.save", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_every_shipped_name_loads():
    assert available_weights() == ["tiny", "universal"]
    for name, bands in (("tiny", 4), ("universal", None)):
        assert load_model(name).config.bands == bands


def refused(path, message, **options):
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(path, **options)
    assert "\n" not in str(error.value)


def test_refusals(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    refused(path, "expected a model for 8 bands, got one for 4", bands=8)
    refused(tmp_path / "none.safetensors", "which does not exist")
    refused("no-such-name", "expected a file or one of")

    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path, "damaged file")
    path.write_bytes(b"\xff" * 100)
    refused(path, "damaged file")

    for legacy in (False, True):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not legacy)
        refused(path, "pickled file")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "expected metadata"),
        ({"architecture": "pancrafter", "config": "{"}, "expected metadata"),
        ({"architecture": "resnet", "config": "{}"}, "expected an architecture of"),
        ({"architecture": "pancrafter", "config": '{"colour": 1}'}, "fit the configuration"),
        ({"architecture": "pancrafter", "config": '{"bands": 0}'}, "fit the configuration"),
        ({"architecture": "pancrafter", "config": json.dumps(preset("tiny").to_dict())}, "fit the configuration"),
    ],
)
def test_foreign_safetensors(tmp_path, metadata, message):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    refused(path, message)


def test_folder_does_not_hide_shipped_weights(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_model("tiny").config.bands == 4
