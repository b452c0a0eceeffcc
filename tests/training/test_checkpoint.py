"""States on disk: exact, whole or absent."""

import errno
import os

import pytest
import torch

from pansharp_fast.training.checkpoint import load_optimizer, load_state, optimizer_tensors, save_state


def test_round_trip_is_exact(tmp_path):
    tensors = {"a.b": torch.randn(3, 4).t(), "n": torch.tensor(7), "h": torch.randn(5).bfloat16()}
    save_state(tmp_path / "s.safetensors", tensors, {"step": 3, "best": None})
    loaded, meta = load_state(tmp_path / "s.safetensors")
    assert meta == {"step": 3, "best": None}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_full_disk_keeps_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    save_state(path, {"a": torch.ones(2)}, {"step": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(path, {"a": torch.zeros(2)}, {"step": 2})
    assert load_state(path)[1] == {"step": 1}
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_optimizer_continues_exactly():
    def steps(optimizer, parameter, count):
        for _ in range(count):
            parameter.grad = parameter.detach().sin()
            optimizer.step()

    whole = torch.nn.Parameter(torch.randn(6))
    first = torch.nn.Parameter(whole.detach().clone())
    straight, stopped = torch.optim.AdamW([whole], lr=0.1), torch.optim.AdamW([first], lr=0.1)
    steps(straight, whole, 7)
    steps(stopped, first, 3)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = torch.optim.AdamW([second], lr=0.1)
    load_optimizer(resumed, {name: value.clone() for name, value in optimizer_tensors(stopped).items()})
    steps(resumed, second, 4)
    assert torch.equal(whole, second)


def test_foreign_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected the state of a training run"):
        load_state(tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_state(tmp_path / "p.safetensors")
