"""3x3 convolution with its surroundings and the factors of group norms, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast.ops import BackendError, conv3x3, explain, group_norm_factors, use_backend
from pansharp_fast.ops._backends import unavailable

pytestmark = pytest.mark.skipif(unavailable("cpu") is not None, reason="the package was not compiled")

#: Relative norm of the error: of Winograd's sums in float32, and of rounding the result to 16 bits.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def case(batch, channels, outputs, height, width, dtype=torch.float32, seed=0):
    """x, weight and the keyword arguments of a call that uses all of them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    x = random(batch, channels, height, width).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (random(outputs, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype)
    options = {
        "bias": random(batch, outputs),
        "scale": random(batch, channels) + 1,
        "shift": random(batch, channels),
        "residual": random(batch, outputs, height, width).to(dtype),
        "silu": True,
    }
    return x, weight, options


def exact(x, weight, options):
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return conv3x3(x.double(), weight.double(), **wide, backend="reference")


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.values
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 32, 32, 16, 16),
        (2, 17, 40, 37, 21),
        (1, 200, 8, 5, 33),
        (3, 1, 1, 1, 1),
        (1, 48, 129, 4, 70),
        (2, 24, 37, 102, 119),  # 16 bits: tiles of 6x6
        (1, 200, 9, 97, 96),
    ],
)
def test_values(sizes, dtype):
    x, weight, options = case(*sizes, dtype)
    actual = conv3x3(x, weight, **options, backend="cpu")
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert error(actual, exact(x, weight, options)) < TOLERANCE[dtype]


@pytest.mark.values
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
def test_any_size_and_any_part(batch, channels, outputs, height, width, data):
    x, weight, options = case(batch, channels, outputs, height, width)
    if not data.draw(st.booleans(), "norm"):
        del options["scale"], options["shift"]
    for name in ("bias", "residual", "silu"):
        if not data.draw(st.booleans(), name):
            del options[name]
    if "bias" in options and data.draw(st.booleans(), "shared bias"):
        options["bias"] = options["bias"][0]
    assert error(conv3x3(x, weight, **options, backend="cpu"), exact(x, weight, options)) < TOLERANCE[torch.float32]


def test_reference_is_what_the_modules_of_torch_give():
    x, weight, options = case(2, 12, 5, 9, 7)
    y = F.silu(x * options["scale"][:, :, None, None] + options["shift"][:, :, None, None])
    y = F.conv2d(y, weight, padding=1) + options["bias"][:, :, None, None] + options["residual"]
    torch.testing.assert_close(conv3x3(x, weight, **options, backend="reference"), y, rtol=1e-5, atol=1e-5)


@pytest.mark.values
def test_layouts():
    x, weight, options = case(2, 24, 16, 12, 20)
    expected = conv3x3(x, weight, **options, backend="cpu")
    wide = torch.randn(2, 30, 12, 40).contiguous(memory_format=torch.channels_last)
    view = wide[:, 3:27, :, ::2]  # a run of channels, every other pixel
    view.copy_(x)
    odd = weight.contiguous(memory_format=torch.channels_last)
    options["residual"] = options["residual"].contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv3x3(x.contiguous(), weight, **options, backend="cpu"), expected)
    assert torch.equal(conv3x3(view, odd, **options, backend="cpu"), expected)


def test_results_do_not_depend_on_threads_or_on_the_batch():
    x, weight, options = case(3, 33, 20, 40, 50)
    expected = conv3x3(x, weight, **options, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(conv3x3(x, weight, **options, backend="cpu"), expected)
    finally:
        torch.set_num_threads(threads)
    one = {name: value[1:2] if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    assert torch.equal(conv3x3(x[1:2], weight, **one, backend="cpu"), expected[1:2])


@pytest.mark.values
def test_larger_tiles_round_no_worse_than_the_result():
    x, weight, _ = case(1, 128, 32, 108, 108, torch.float16)
    expected = exact(x, weight, {})
    rounding = error(expected.half(), expected)
    assert error(conv3x3(x, weight, backend="cpu"), expected) < 1.05 * rounding


@pytest.mark.values
def test_extreme_values_travel():
    x, weight, options = case(1, 16, 16, 24, 24)
    x[0, 3, 10, 10] = float("nan")
    y = conv3x3(x, weight, **options, backend="cpu")
    assert y[0, :, 9:12, 9:12].isnan().all()
    assert y[0, :, 16:].isfinite().all()
    large = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30]).view(1, 1, 1, 6)
    centre = torch.zeros(1, 1, 3, 3)
    centre[0, 0, 1, 1] = 1
    actual = conv3x3(large[..., :5], centre, silu=True, backend="cpu")
    torch.testing.assert_close(actual, F.silu(large[..., :5]), rtol=1e-5, atol=1e-4)


def test_derivatives_come_from_the_reference():
    x, weight, options = case(1, 8, 8, 6, 6)
    weight.requires_grad_()
    assert "gradients" in explain("conv3x3", x, weight).split("cpu: ")[1]
    with pytest.raises(BackendError, match="gradients"):
        conv3x3(x, weight, **options, backend="cpu")
    (gradient,) = torch.autograd.grad(conv3x3(x, weight, **options).sum(), weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        conv3x3(x, weight, **options, backend="cpu")


def test_opcheck_and_compile():
    x, weight, options = case(1, 8, 6, 9, 10)
    arguments = (x, weight, options["bias"], options["scale"], options["shift"], options["residual"], True)
    torch.library.opcheck(torch.ops.pansharp_fast.conv3x3_fwd.default, arguments, test_utils="test_schema")
    torch.library.opcheck(torch.ops.pansharp_fast.conv3x3_fwd.default, arguments, test_utils="test_faketensor")
    torch.library.opcheck(
        torch.ops.pansharp_fast.group_norm_factors.default, (x, None, None, 2, 1e-5), test_utils="test_faketensor"
    )

    def block(x):
        scale, shift = group_norm_factors(x, 4)
        return conv3x3(x, weight, scale=scale, shift=shift, silu=True)

    expected = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 12, 5, 7), (1, 40, 70, 65), (1, 6, 1, 1)])
@pytest.mark.parametrize("groups", [1, 2])
def test_group_norm_factors(sizes, groups, dtype):
    # Far from zero: sums of squares alone would cancel.
    x = (torch.randn(sizes) * 0.5 + 30 * torch.randn(sizes[1])[:, None, None]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(sizes[1]), torch.randn(sizes[1])
    scale, shift = group_norm_factors(x, groups, weight, bias, eps=1e-5, backend="cpu")
    expected = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    actual = x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for got, want in zip((scale, shift), group_norm_factors(x.double(), groups, weight, bias), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.values
def test_statistics_hold_far_from_zero():
    x = (1000 + torch.randn(1, 4, 64, 64, dtype=torch.float64)).float()
    scale, shift = group_norm_factors(x, 4, backend="cpu")
    normalised = x.double() * scale.double()[:, :, None, None] + shift.double()[:, :, None, None]
    torch.testing.assert_close(normalised.var((2, 3)), torch.ones(1, 4).double(), rtol=2e-3, atol=0)


def test_named_backend():
    x, weight, _ = case(1, 4, 4, 5, 5)
    with use_backend("reference"):
        torch.testing.assert_close(conv3x3(x, weight), F.conv2d(x, weight, padding=1))
    with pytest.raises(BackendError, match="dtype"):
        conv3x3(x.double(), weight.double(), backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 5, 5)}, "x: expected"),
        ({"weight": torch.randn(6, 7, 3, 3)}, r"weight: expected \[O, 8, 3, 3\], got"),
        ({"bias": torch.randn(7)}, "bias: expected"),
        ({"shift": None}, "shift: expected together"),
        ({"scale": torch.randn(8)}, "scale: expected"),
        ({"residual": torch.randn(2, 6, 5, 6)}, "residual: expected shape"),
        ({"residual": torch.randn(2, 6, 5, 5).double()}, "residual: expected the dtype"),
    ],
)
def test_errors(change, message):
    x, weight, options = case(2, 8, 6, 5, 5)
    arguments = {"x": x, "weight": weight, **options, **change}
    with pytest.raises(ValueError, match=message):
        conv3x3(**arguments)


def test_errors_of_the_factors():
    with pytest.raises(ValueError, match="groups: expected a divisor of the 8 channels, got 3"):
        group_norm_factors(torch.randn(1, 8, 4, 4), 3)
    with pytest.raises(ValueError, match="weight: expected shape"):
        group_norm_factors(torch.randn(1, 8, 4, 4), 2, torch.randn(4))
