"""Networks as CUDA graphs: on a GPU, and with a stand-in for graphs without one."""

import copy

import pytest
import torch

from pansharp_fast.inference.recorded import Recorded
from pansharp_fast.inference.sharpener import Sharpener
from pansharp_fast.models import PANCrafter, preset
from tests.support.graphs import counted


@pytest.fixture
def graphs(monkeypatch):
    return counted(monkeypatch)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-6


def network(**changes):
    torch.manual_seed(0)
    widths = {"hidden_sizes": (16, 16), "depth": (1, 1), "attention_scales": (1,), "num_heads": 2, "norm_groups": 4}
    model = PANCrafter(preset("released", bands=4, s_embed_size=8, **widths, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(DEVICE)


def images(h, w):
    shapes = (1, 1, 4 * h, 4 * w), (1, 1, h, w), (1, 4, h, w)
    return (*(torch.rand(shape, device=DEVICE) for shape in shapes), torch.ones(1, device=DEVICE))


def check(recorded, size):
    inputs = images(*size)
    with torch.no_grad():
        actual, expected = recorded(*inputs), recorded.network(*inputs)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return actual


@pytest.mark.gpu
@torch.no_grad()
def test_recorded_is_the_network(graphs):
    recorded = Recorded(network())
    results = [check(recorded, (4, 4)) for _ in range(4)]
    kept = [each.clone() for each in results]
    assert len(graphs) == 1
    for _ in range(2):
        check(recorded, (4, 6))
    assert len(graphs) == 2
    check(recorded, (4, 4))
    assert len(graphs) == 2
    assert all(torch.equal(a, b) for a, b in zip(results, kept, strict=True))  # not overwritten
    for parameter in recorded.network.parameters():
        parameter.mul_(1.1)
    check(recorded, (4, 4))
    assert len(graphs) == 2  # a change in place is seen
    for parameter in recorded.network.parameters():
        parameter.data = parameter.data.mul(0.9)
    for _ in range(2):
        check(recorded, (4, 4))
    assert len(graphs) == 3


@pytest.mark.gpu
def test_casts_of_weights_are_part_of_the_graph(graphs):
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8).to(DEVICE).eval()
    recorded, x = Recorded(linear), torch.rand(4, 8, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(2):
            linear(x)  # autocast keeps the cast
            recorded(x)
    assert len(graphs) == 1
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        linear.weight.mul_(3)
        torch.testing.assert_close(recorded(x), linear(x))


@pytest.mark.gpu
@torch.no_grad()
def test_few_graphs_are_held(graphs):
    recorded = Recorded(network())
    for width in range(2, 14, 2):
        check(recorded, (2, width))
        check(recorded, (2, width))
    assert len(graphs) == 6
    assert len(recorded._graphs) == 4


@torch.no_grad()
def test_what_cannot_be_recorded_is_called(graphs, monkeypatch):
    recorded, seen = Recorded(network()), []
    handle = recorded.network.down1.register_forward_hook(lambda *call: seen.append(call))
    for _ in range(3):
        check(recorded, (4, 4))
    assert len(seen) == 6
    assert not graphs
    handle.remove()

    def fails(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    check(recorded, (4, 4))
    with pytest.warns(UserWarning, match="CUDA graph: the network is called instead .RuntimeError: operation not perm"):
        check(recorded, (4, 4))
    check(recorded, (4, 4))


@pytest.mark.gpu
def test_sharpener_records_its_tiles(graphs):
    model = network()
    sharpener = Sharpener(model, device=DEVICE)
    assert ("forward" in sharpener._options) == (DEVICE == "cuda")
    sharpener._options["forward"] = Recorded(model)
    for _ in range(4):
        pan, ms = torch.rand(1, 1, 28, 20) * 2000, torch.rand(1, 4, 7, 5) * 2000
        expected = model.sharpen(pan.to(DEVICE), ms.to(DEVICE), 2047)
        torch.testing.assert_close(sharpener(pan, ms), expected, rtol=TOLERANCE, atol=2047 * TOLERANCE)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_is_a_copy_of_the_weights(graphs):
    model = network()
    sharpener = Sharpener(model, device="cuda", precision="bfloat16")
    assert next(model.parameters()).dtype == torch.float32
    pan, ms = torch.rand(1, 1, 64, 64) * 500 + 500, torch.rand(1, 4, 16, 16) * 500 + 500
    exact = copy.deepcopy(model).cpu().sharpen(pan, ms, 2047)
    plain = model.sharpen(pan.cuda(), ms.cuda(), 2047)
    with torch.autocast("cuda", torch.bfloat16):
        cast = model.sharpen(pan.cuda(), ms.cuda(), 2047)
    errors = [(each.cpu() - exact).norm() for each in (sharpener(pan, ms), sharpener(pan, ms), cast, plain)]
    assert errors[0] <= 2 * errors[2]
    assert errors[1] <= 2 * errors[2]
    assert len(graphs) == 1
