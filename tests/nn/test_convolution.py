"""Convolutions inside networks: values, and when the faster forms are taken."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pansharp_fast import use_backend
from pansharp_fast.nn import Conv3x3, convolution
from pansharp_fast.nn.convolution import (
    LayerNorm,
    joined,
    joined_conv,
    joined_convs,
    mlp,
    norm_silu_conv,
    two_convolutions,
)
from tests.support.backends import needs_interpreter


def calls(run):
    """How often `run` reaches the compiled convolution."""
    with torch.profiler.profile() as trace:
        run()
    return sum(event.count for event in trace.key_averages() if event.key == "pansharp_fast::conv3x3_fwd")


def test_when_the_kernel_runs():
    module, image = Conv3x3(32, 48), torch.randn(1, 32, 40, 41)
    expected = F.conv2d(image.double(), module.weight.double(), module.bias.double(), padding=1)
    with torch.no_grad():
        assert calls(lambda: module(image)) == 1
        assert (module(image) - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert calls(lambda: module(image[..., :20])) == 0  # too small to pay
        assert calls(lambda: Conv3x3(32, 16)(image)) == 0
        assert calls(lambda: module.double()(image.double())) == 0
        module.float()
        with use_backend("reference"):
            assert calls(lambda: module(image)) == 0
            torch.testing.assert_close(module(image), F.conv2d(image, module.weight, module.bias, padding=1))
        with torch.autocast("cpu", torch.bfloat16):
            assert calls(lambda: module(image)) == 0
    assert calls(lambda: module(image)) == 0  # gradients are recorded


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_silu_conv(batch, kind, modulated):
    norm = nn.GroupNorm(8, 32) if kind == "group" else LayerNorm(32)
    conv, dropout = Conv3x3(32, 20), nn.Dropout(0.5).eval()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    layers = nn.Sequential(norm, nn.SiLU(), dropout, conv)
    x = torch.randn(batch, 32, 36, 33).contiguous(memory_format=torch.channels_last)
    options = {"shift": torch.randn(batch, 20), "residual": torch.randn(batch, 20, 36, 33)}
    if modulated:
        options["modulation"] = (torch.randn(batch, 32), torch.randn(batch, 32))
    y = norm(x)
    if modulated:
        scale, offset = (each[:, :, None, None] for each in options["modulation"])
        y = y * (1 + scale) + offset
    expected = conv(F.silu(y)) + options["shift"][:, :, None, None] + options["residual"]
    torch.testing.assert_close(norm_silu_conv(layers, x, **options), expected, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert calls(lambda: norm_silu_conv(layers, x, **options)) == 1
        torch.testing.assert_close(norm_silu_conv(layers, x, **options), expected, rtol=1e-4, atol=2e-5)
        dropout.train()
        assert calls(lambda: norm_silu_conv(layers, x, **options)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5), (3, 11), (0, 4)])  # one strip, several, none
def test_mlp(monkeypatch, shape, dtype):
    monkeypatch.setattr(convolution, "_STRIP_BYTES", 24 * 4 * 10)
    first, second, x = nn.Linear(16, 24).to(dtype), nn.Linear(24, 8).to(dtype), torch.randn(*shape, 16).to(dtype)
    expected = second(F.gelu(first(x), approximate="tanh"))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(mlp(first, second, x), expected, rtol=tolerance, atol=tolerance)
    (gradient,) = torch.autograd.grad(mlp(first, second, x).sum(), first.weight)
    assert gradient.abs().sum() > 0 or not x.numel()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_joined(layout):
    x = torch.randn(2, 5, 4, 3).contiguous(memory_format=layout)
    others = (torch.randn(2, 1, 4, 3), torch.randn(2, 3, 4, 3))
    result = joined(x, *others)
    assert torch.equal(result, torch.cat([x, *others], 1))
    assert result.is_contiguous(memory_format=layout)


# ---- The passes of GPUs, in Triton's interpreter ---------------------------------------------------------------------


class Passes(TorchDispatchMode):
    """Counts the norms and sums that run as kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in ("pansharp_fast::norm_fwd_triton", "pansharp_fast::gated_sum_fwd_triton")
        return function(*args, **(kwargs or {}))


def as_on_gpus(run):
    """The result of `run` by kernels, and how many of them ran."""
    with torch.no_grad(), use_backend("triton"), Passes() as passes:
        return run(), passes.count


@needs_interpreter
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["group", "layer"])
@pytest.mark.parametrize("way", ["shift", "modulation"])
def test_residual_blocks_of_gpus(batch, kind, way):
    def layers(inputs, outputs):
        norm = nn.GroupNorm(4, inputs) if kind == "group" else LayerNorm(inputs)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        return nn.Sequential(norm, nn.SiLU(), nn.Dropout(0.5).eval(), Conv3x3(inputs, outputs))

    first, second, shortcut = layers(8, 12), layers(12, 12), nn.Conv2d(8, 12, 1)
    x = torch.randn(batch, 8, 9, 7).contiguous(memory_format=torch.channels_last)
    if way == "shift":
        options = {"shift": torch.randn(batch, 12)}
    else:
        options = {"modulation": (torch.randn(batch, 12), torch.randn(batch, 12))}
    expected = two_convolutions(first, second, shortcut, x, **options)
    actual, count = as_on_gpus(lambda: two_convolutions(first, second, shortcut, x, **options))
    assert count == 3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if kind == "group":  # a layer norm gives channels_last whatever it gets
        assert as_on_gpus(lambda: two_convolutions(first, second, shortcut, x.contiguous(), **options))[1] == 0
    seen = []
    second[0].register_forward_hook(lambda *call: seen.append(call))
    actual, count = as_on_gpus(lambda: two_convolutions(first, second, shortcut, x, **options))
    assert len(seen) == 1
    assert count == 1 + (kind == "layer")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert two_convolutions(first, second, shortcut, x, **options).requires_grad


@needs_interpreter
@pytest.mark.parametrize("inputs", [11, 16])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_joined_convolutions(inputs, size, dtype, bias):
    conv = nn.Conv2d(inputs, 6, size, padding=size // 2, bias=bias).to(dtype)
    x = torch.randn(2, 7, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    other = torch.randn(2, inputs - 7, 5, 6)
    exact = copy.deepcopy(conv).double()(torch.cat([x, other.to(dtype)], 1).double())
    for run in (lambda: joined_conv(conv, x, other), lambda: torch.cat(joined_convs(conv, 2, x, other), 1)):
        for result in (run(), as_on_gpus(run)[0]):
            assert result.dtype == dtype
            assert (result - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
