"""Norms and gated sums: laws, arguments, and the kernels in Triton's interpreter."""

import functools

import pytest
import torch
from torch.nn import functional as F

from pansharp_fast.ops import OPERATORS, BackendError, gated_sum, group_norm, join, layer_norm
from pansharp_fast.ops._backends import interpreting, reasons
from tests.ops.test_conformance import evaluate, expanded, judge, sliced, transposed
from tests.support.backends import device_of, parameters

OPERATOR = OPERATORS["norm"]
triton = pytest.mark.parametrize("backend", parameters(OPERATOR, torch.float32, interpreted=True)[:1])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def samples(device, dtype):
    return list(OPERATOR.samples(torch.device(device), dtype))


@triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(len(samples("cpu", torch.float32))))
def test_values(backend, dtype, index):
    sample = samples(device_of(backend), dtype)[index]
    judge("norm", sample, evaluate(sample, backend, False), False)


@triton
@pytest.mark.parametrize("layout", [transposed, sliced, expanded, torch.Tensor.contiguous])
@pytest.mark.parametrize("index", range(6))
def test_any_strides(backend, layout, index):
    sample = samples(device_of(backend), torch.float32)[index]
    tensors = tuple(layout(each) if each.dim() > 2 else each for each in sample.tensors)
    dense = type(sample)(sample.name, sample.run, tuple(each.contiguous() for each in tensors), sample.options)
    judge("norm", dense, evaluate(sample, backend, False, tensors), False)


@triton
def test_views_of_wider_maps_are_read_in_place(backend):
    wide = torch.randn(2, 24, 5, 7, device=device_of(backend)).contiguous(memory_format=torch.channels_last)
    factors = torch.randn(2, 32, device=wide.device)
    for x in (wide[:, 8:], wide.mT[:, 8:].mT):
        for function in (functools.partial(group_norm, groups=4), layer_norm):
            options = {"offset": factors[:, 16:], "scale": factors[:, :16], "shift": factors[:, 16:]}
            actual = function(x, **options, backend=backend)
            torch.testing.assert_close(actual, function(x, **options, backend="reference"), rtol=1e-5, atol=1e-5)
            assert actual.is_contiguous(memory_format=torch.channels_last)


@triton
def test_many_shares_and_channels(backend):
    """More pixels than one program reads, more channels than one tile holds."""
    x = torch.randn(1, 320, 40, 45, device=device_of(backend)) * 1e-2 + 50
    for groups in (1, 320):
        exact = group_norm(x.double(), groups, backend="reference")
        error = (group_norm(x, groups, backend=backend) - exact).norm() / exact.norm()
        plain = (F.group_norm(x, groups) - exact).norm() / exact.norm()
        assert error <= 2 * plain + 1e-6


@triton
def test_deterministic_and_nothing_uninitialised(backend):
    for sample in samples(device_of(backend), torch.float32)[:6]:
        first = sample.run(*sample.tensors, backend=backend)[0]
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(first, sample.run(*sample.tensors, backend=backend)[0])
        finally:
            torch.use_deterministic_algorithms(False)


@triton
def test_schema_fake_and_compilation(backend):
    library = torch.ops.pansharp_fast
    x = torch.randn(2, 6, 5, 4, device=device_of(backend))
    row, vector = torch.randn(2, 6, device=x.device), torch.randn(6, device=x.device)
    for function, arguments in (
        (library.norm_fwd_triton, (x, vector, vector, row, row, row, 3, 1e-5, True)),
        (library.norm_fwd_triton, (x, None, None, None, None, None, 0, 1e-5, False)),
        (library.gated_sum_fwd_triton, (x, x, None, vector, None, row, None)),
        (library.join_fwd_triton, (x, [x, x], vector, None, 20, True)),
        (library.join_fwd_triton, (x, [], None, x[:, 0, 0, 0], 8, False)),
    ):
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
    for sample in samples(device_of(backend), torch.float32)[:4]:
        torch.compiler.reset()
        compiled = torch.compile(functools.partial(sample.run, backend=backend), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*sample.tensors), sample.run(*sample.tensors, backend=backend))


@triton
def test_empty_batch(backend):
    x = torch.randn(0, 6, 5, 4, device=device_of(backend))
    assert group_norm(x, 3, backend=backend).shape == layer_norm(x, backend=backend).shape == x.shape
    assert gated_sum(x, x, backend=backend).shape == x.shape
    assert join(x, x, channels=16, backend=backend).shape == (0, 16, 5, 4)


@triton
def test_selfcheck(backend):
    OPERATOR.selfcheck(backend, torch.device(device_of(backend)))


def test_reference_is_torch():
    x, weight, bias = torch.randn(2, 6, 5, 4), torch.randn(6), torch.randn(6)
    scale, shift, offset = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 6)
    moved = x + offset[:, :, None, None]
    pixels = moved.permute(0, 2, 3, 1)
    plain = {
        functools.partial(group_norm, groups=3): F.group_norm(moved, 3, weight, bias, 1e-5),
        layer_norm: F.layer_norm(pixels, (6,), weight, bias, 1e-6).permute(0, 3, 1, 2),
    }
    for function, norm in plain.items():
        options = {"weight": weight, "bias": bias, "offset": offset, "scale": scale, "shift": shift, "silu": True}
        expected = F.silu(norm * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
        torch.testing.assert_close(function(x, **options), expected)
    expected = x + scale[:, :, None, None] * (moved + bias[:, None, None]) + shift[:, :, None, None] * x
    torch.testing.assert_close(gated_sum(x, moved, x, bias_a=bias, gate_a=scale, gate_b=shift), expected)


def test_ones_and_an_impulse_are_a_bias():
    x, weight, bias = torch.randn(2, 6, 5, 4), torch.randn(7, 6, 3, 3), torch.randn(7)
    joined = F.conv2d(join(x, one=True, channels=8), join(weight, impulse=bias, channels=8), padding=1)
    torch.testing.assert_close(joined, F.conv2d(x, weight, bias, padding=1))


def test_gradients_are_the_references():
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(6, dtype=torch.float64, requires_grad=True)
    row = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for function in (functools.partial(group_norm, groups=2), layer_norm):
        call = lambda x, v, r, function=function: function(  # noqa: E731
            x, weight=v, bias=v, offset=r, scale=r, shift=r, silu=True
        )
        assert torch.autograd.gradcheck(call, (x, vector, row))
    assert torch.autograd.gradcheck(lambda x, v, r: gated_sum(x, x, x, bias_a=v, gate_a=r), (x, vector, row))
    assert torch.autograd.gradcheck(lambda x, v, r: join(x, x, bias=v, impulse=r[:, 0], channels=14), (x, vector, row))
    if interpreting():
        against = reasons(OPERATOR, "triton", (x.float(),))
        assert any("gradients" in each for each in against)


def test_arguments():
    x, vector, row = torch.randn(2, 6, 3, 2), torch.randn(6), torch.randn(2, 6)
    for call, message in (
        (lambda: group_norm(x[0], 1), "x: expected"),
        (lambda: group_norm(x, 4), "groups: expected a divisor of the 6 channels, got 4"),
        (lambda: group_norm(x, 2, vector[:5]), "weight: expected shape"),
        (lambda: layer_norm(x, scale=row), "shift: expected together with scale"),
        (lambda: layer_norm(x, offset=row[:1]), "offset: expected shape"),
        (lambda: gated_sum(x, x[:1]), "a: expected the shape of x"),
        (lambda: gated_sum(x, x.double()), "a: expected the dtype of x"),
        (lambda: gated_sum(x, x, gate_b=row), "b: expected together"),
        (lambda: join(x, x[:1]), "others: expected"),
        (lambda: join(x, x, channels=11), "channels: expected at least 12, got 11"),
        (lambda: join(x, one=True, impulse=x[:, 0, 0, 0]), "impulse: expected none together with one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(BackendError, match="norm has no cpu kernel"):
        group_norm(x, 2, backend="cpu")


@triton
def test_small_images_by_the_kernels_of_large_ones(backend, monkeypatch):
    from pansharp_fast.kernels import norm

    monkeypatch.setattr(norm, "_AT_ONCE", 0)
    for sample in samples(device_of(backend), torch.float32):
        if "group" in sample.name:
            judge("norm", sample, evaluate(sample, backend, False), False)
