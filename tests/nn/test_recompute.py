"""Features computed again in the backward pass: the same gradients out of less memory."""

import threading

import pytest
import torch
from torch import nn

from pansharp_fast import use_backend
from pansharp_fast.models import FSAConfig, FSAStudent, FSATeacher, PANCrafter, preset
from pansharp_fast.nn.recompute import recomputing


def pancrafter(name):
    widths = {"hidden_sizes": (16, 16), "depth": (1, 2), "attention_scales": (1,), "num_heads": 2}
    more = {"norm_groups": 4, "s_embed_size": 8} if name == "released" else {}
    inputs = torch.randn(2, 1, 32, 32), torch.randn(2, 1, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.0, 1.0])
    return PANCrafter(preset(name, bands=4, **widths, **more)), inputs


def unet(cls):
    model = cls(FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher))
    for block in model.modules():
        if hasattr(block, "drop_path_prob"):
            block.drop_path_prob = 0.3
    condition = model.condition(torch.rand(2, 4, 16, 24), torch.rand(2, 1, 16, 24))
    return model, (torch.randn(2, 4, 16, 24), torch.tensor([3, 400]), condition)


CASES = {
    "released": lambda: pancrafter("released"),
    "paper": lambda: pancrafter("paper"),
    "student": lambda: unet(FSAStudent),
    "teacher": lambda: unet(FSATeacher),
}


def loss_of(model, inputs, on, dtype=None):
    torch.manual_seed(2)
    with recomputing(on), torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(*inputs)
    return getattr(out, "out", out).float().square().mean()


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(1)
    model, inputs = CASES[request.param]()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.train(), inputs


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_the_same(case, dtype):
    model, inputs = case
    results = []
    for on in (False, True):
        model.zero_grad()
        loss = loss_of(model, inputs, on, dtype)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_backends_of_the_forward_pass(case):
    """The backward pass may run in a thread that knows nothing of the choice."""
    model, inputs = case
    results = []
    for on in (False, True):
        model.zero_grad()
        with use_backend("reference"):
            loss = loss_of(model, inputs, on)
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_less_is_held(case):
    model, inputs = case
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def held(on):
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, inputs, on)
        assert loss.requires_grad
        return sum(size for size, _ in found.values())

    assert held(True) < (0.5 if isinstance(model, PANCrafter) else 0.8) * held(False)
