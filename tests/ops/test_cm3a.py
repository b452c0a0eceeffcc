"""cm3a on every backend: values, gradients and laws, against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast import reference
from pansharp_fast.ops import BackendError, _library, cm3a, use_backend
from pansharp_fast.ops._backends import candidates, interpreting, unavailable
from pansharp_fast.ops.cm3a import OPERATOR
from tests.support.accuracy import BACKWARD, FORWARD, assert_accurate, error
from tests.support.backends import device_of, parameter, parameters

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


backends = pytest.mark.parametrize("backend", parameters(OPERATOR))


def _case(
    backend: str,
    shape: tuple[int, int, int, int, int],
    window: int,
    learned: bool,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    seed: int = 0,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(inputs q, k_pan, v_pan, k_ms, v_ms [, weight, bias], gradients of the outputs); shape = (B, heads, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim, height, width = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.randn(batch, heads * dim, height, width, generator=generator) for _ in range(7)]
    maps = [each.to(device_of(backend), dtype).contiguous(memory_format=layout) for each in maps]
    factor = []
    if learned:
        count = window**2
        factor = [torch.randn(dim, count, window, window, generator=generator) / window]
        factor.append(torch.randn(dim, count, generator=generator))
        factor = [each.to(device_of(backend), dtype) for each in factor]
    return [*maps[:5], *factor], maps[5:]


def _run(backend: str, inputs: list, gradients: list, dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    """Outputs and all gradients, computed in `dtype`."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    with use_backend(backend):
        outputs = cm3a(*leaves, **options)
        grads = torch.autograd.grad(outputs, leaves, [each.to(dtype) for each in gradients])
    return [*outputs, *grads]


def _assert_accurate(backend: str, inputs: list, gradients: list, **options: Any) -> None:
    dtype = inputs[0].dtype
    exact = _run("reference", inputs, gradients, torch.float64, **options)
    plain = _run("reference", inputs, gradients, dtype, **options)
    actual = _run(backend, inputs, gradients, dtype, **options)
    assert all(each.dtype == dtype for each in actual)
    assert_accurate(actual[:2], plain[:2], exact[:2], factor=FORWARD, floor=2)
    assert_accurate(actual[2:], plain[2:], exact[2:], factor=BACKWARD, floor=2)


@pytest.mark.values
@backends
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    dim=st.sampled_from([1, 3, 8, 16, 29]),
    height=st.integers(1, 9),
    width=st.integers(1, 20),
    window=st.sampled_from([3, 5]),
    learned=st.booleans(),
    dtype=st.sampled_from(DTYPES[:2]),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "transposed", "expanded"]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_strides(
    backend: str,
    batch: int,
    heads: int,
    dim: int,
    height: int,
    width: int,
    window: int,
    learned: bool,
    dtype: torch.dtype,
    layout: str,
    seed: int,
) -> None:
    inputs, gradients = _case(backend, (batch, heads, dim, height, width), window, learned, dtype, seed=seed)

    def laid_out(x: torch.Tensor) -> torch.Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":  # every second pixel of the right half of a larger map
            larger = x.new_full((batch, 2 * heads * dim, height, 2 * width), math.nan)
            larger[:, heads * dim :, :, ::2] = x
            return larger[:, heads * dim :, :, ::2]
        if layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "expanded" and batch:
            return x[:1].expand_as(x)
        return x

    inputs = [*(laid_out(x) for x in inputs[:5]), *inputs[5:]]
    gradients = [laid_out(x) for x in gradients]
    dense = [x.contiguous() for x in inputs]
    options = {"num_heads": heads, "window": window}
    leaves = [x.detach().requires_grad_() for x in inputs]
    with use_backend(backend):
        outputs = cm3a(*leaves, **options)
        actual = [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]
    expected_layout = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    if backend != "reference" and batch:
        assert all(each.is_contiguous(memory_format=expected_layout) for each in actual[:2])
    exact = _run("reference", dense, gradients, torch.float64, **options)
    plain = _run("reference", dense, gradients, dtype, **options)
    for got, usual, want in zip(actual, plain, exact, strict=True):
        assert got.shape == want.shape
        # The few values of a small map may cancel: plain PyTorch is then as far off.
        assert error(got, want) <= max(3e-2 if dtype == torch.bfloat16 else 1e-5, 3 * error(usual, want))


@backends
@pytest.mark.parametrize(("window", "learned"), [(3, True), (3, False), (5, True), (5, False)])
def test_gradcheck(backend: str, window: int, learned: bool) -> None:
    if torch.float64 not in OPERATOR.support[backend].dtypes:
        pytest.skip(f"{backend} does not take float64")
    inputs, _ = _case(backend, (1, 2, 2, 3, 4), window, learned, torch.float64)
    leaves = [each.requires_grad_() for each in inputs]
    torch.autograd.gradcheck(lambda *x: cm3a(*x, num_heads=2, window=window, backend=backend), leaves, fast_mode=True)


# ---- Laws ------------------------------------------------------------------------------------------------------------


def _forward(backend: str, inputs: list, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return cm3a(*inputs, backend=backend, **options)


@backends
@pytest.mark.parametrize("window", [3, 5])
def test_one_hot_weight_is_the_exact_shift(backend: str, window: int) -> None:
    inputs, _ = _case(backend, (1, 2, 8, 6, 9), window, False)
    one_hot = torch.eye(window**2, device=inputs[0].device).view(1, -1, window, window).repeat(8, 1, 1, 1)
    shifted = _forward(backend, inputs, num_heads=2, window=window)
    learned = _forward(backend, [*inputs, one_hot], num_heads=2, window=window)
    torch.testing.assert_close(learned, shifted)


@backends
def test_attention_sums_to_one(backend: str) -> None:
    # With W = 0 every candidate value is the bias; if all nine biases agree, any attention returns them.
    inputs, _ = _case(backend, (1, 2, 8, 6, 9), 3, False)
    value = torch.randn(8, device=inputs[0].device)
    weight, bias = torch.zeros(8, 9, 3, 3, device=value.device), value[:, None].repeat(1, 9)
    for out in _forward(backend, [*inputs, weight, bias], num_heads=2):
        torch.testing.assert_close(out, value.repeat(2).view(1, 16, 1, 1).expand_as(out))


@backends
@pytest.mark.parametrize("window", [3, 5])
def test_constant_value_comes_back_inside(backend: str, window: int) -> None:
    inputs, _ = _case(backend, (1, 2, 8, 7, 9), window, False)
    radius = window // 2
    q, k_pan, v, k_ms, _ = inputs
    v = torch.full_like(v, 2.5)
    for out in _forward(backend, [q, k_pan, v, k_ms, v], num_heads=2, window=window):
        inside = out[..., radius:-radius, radius:-radius]
        torch.testing.assert_close(inside, torch.full_like(inside, 2.5))
        assert (out[..., 0, :] < 2.5).all()  # outside pixels take part with value 0


@backends
def test_swapped_modalities_swap_the_outputs(backend: str) -> None:
    (q, k_pan, v_pan, k_ms, v_ms, *factor), _ = _case(backend, (1, 2, 8, 6, 9), 3, True)
    out_pan, out_ms = _forward(backend, [q, k_pan, v_pan, k_ms, v_ms, *factor], num_heads=2)
    swapped = _forward(backend, [q, k_ms, v_ms, k_pan, v_pan, *factor], num_heads=2)
    assert torch.equal(swapped[0], out_ms)
    assert torch.equal(swapped[1], out_pan)
    assert not torch.equal(out_pan, out_ms)


@backends
def test_translation(backend: str) -> None:
    inputs, _ = _case(backend, (1, 2, 8, 9, 24), 3, True)
    moved = [x.roll((2, 5), (2, 3)) if x.shape[-1] == 24 else x for x in inputs]
    for out, out_moved in zip(
        _forward(backend, inputs, num_heads=2), _forward(backend, moved, num_heads=2), strict=True
    ):
        torch.testing.assert_close(out_moved[..., 3:-1, 6:-1], out[..., 1:-3, 1:-6])


@backends
@pytest.mark.parametrize("window", [3, 5])
def test_scaled_dot_product_attention_with_a_neighbourhood_mask(backend: str, window: int) -> None:
    batch, heads, dim, height, width = 2, 2, 8, 5, 6
    inputs, _ = _case(backend, (batch, heads, dim, height, width), window, False)
    radius = window // 2
    rows, columns = torch.arange(height + 2 * radius), torch.arange(width + 2 * radius)
    # Keys and values are the zero-padded map: pixels outside are candidates with key and value zero, not masked.
    at = torch.cartesian_prod(torch.arange(height) + radius, torch.arange(width) + radius)
    keys = torch.cartesian_prod(rows, columns)
    mask = ((at[:, None] - keys[None]).abs() <= radius).all(-1).to(inputs[0].device)

    def tokens(x: torch.Tensor, padding: int) -> torch.Tensor:
        return F.pad(x, (padding,) * 4).reshape(batch, heads, dim, -1).transpose(2, 3)

    q, k_pan, v_pan, k_ms, v_ms = inputs
    outputs = _forward(backend, inputs, num_heads=heads, window=window)
    for out, k, v in zip(outputs, (k_pan, k_ms), (v_pan, v_ms), strict=True):
        dense = F.scaled_dot_product_attention(tokens(q, 0), tokens(k, radius), tokens(v, radius), attn_mask=mask)
        torch.testing.assert_close(out, dense.transpose(2, 3).reshape(q.shape))


# ---- Memory, non-finite values, determinism --------------------------------------------------------------------------


@pytest.mark.values
@backends
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_reach_their_neighbourhood_and_no_further(backend: str, value: float) -> None:
    inputs, _ = _case(backend, (1, 2, 8, 9, 40), 3, True)
    inputs[1][0, 3, 4, 20] = value
    out_pan, out_ms = _forward(backend, inputs, num_heads=2)
    finite = torch.isfinite(out_pan)
    assert not finite[0, :8, 3:6, 19:22].any()
    finite[0, :8, 3:6, 19:22] = True
    assert finite.all()
    assert torch.isfinite(out_ms).all()


@pytest.mark.values
@backends
def test_large_logits_do_not_overflow(backend: str) -> None:
    inputs, _ = _case(backend, (1, 2, 8, 6, 9), 3, False)
    inputs[0] *= 1e4
    exact = reference.cm3a(*(x.double() for x in inputs), num_heads=2)
    for out, want in zip(_forward(backend, inputs, num_heads=2), exact, strict=True):
        assert error(out, want) < 1e-3


@backends
def test_deterministic(backend: str) -> None:
    inputs, gradients = _case(backend, (2, 2, 8, 33, 70), 3, True)
    torch.use_deterministic_algorithms(True)
    try:
        first = _run(backend, inputs, gradients, torch.float32, num_heads=2)
        second = _run(backend, inputs, gradients, torch.float32, num_heads=2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cpu_does_not_depend_on_the_number_of_threads() -> None:
    inputs, gradients = _case("cpu", (2, 2, 8, 33, 70), 3, True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(_run("cpu", inputs, gradients, torch.float32, num_heads=2))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Triton, interpreted ---------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(not interpreting() or unavailable("triton") is not None, reason="not interpreted")


@interpreted
@pytest.mark.parametrize(
    ("shape", "window", "learned", "dtype", "channels_last"),
    [
        ((2, 1, 5, 3, 7), 3, True, torch.float32, True),
        ((1, 2, 4, 13, 11), 3, True, torch.bfloat16, False),
        ((1, 1, 18, 4, 3), 3, False, torch.float16, False),
        ((1, 1, 4, 4, 6), 5, True, torch.float32, False),
        ((1, 2, 3, 1, 1), 5, False, torch.float32, True),
    ],
)
def test_triton(
    shape: tuple[int, int, int, int, int], window: int, learned: bool, dtype: torch.dtype, channels_last: bool
) -> None:
    inputs, gradients = _case("triton", shape, window, learned, dtype, channels_last)
    _assert_accurate("triton", inputs, gradients, num_heads=shape[1], window=window)


@interpreted
def test_triton_takes_empty_batches_and_refuses_float64() -> None:
    inputs, gradients = _case("triton", (0, 1, 4, 3, 3), 3, True)
    results = _run("triton", inputs, gradients, torch.float32, num_heads=1)
    assert [each.shape for each in results[:2]] == [inputs[0].shape] * 2
    assert not results[-1].any()
    with pytest.raises(BackendError, match="dtype: expected one of float32, bfloat16, float16, got float64"):
        cm3a(*(x.double() for x in inputs), num_heads=1, backend="triton")


# ---- TF32 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_torch_setting_is_passed_on(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(_library, "call", lambda name, backend, *arguments: seen.append(arguments[-1]))
    inputs, _ = _case("cpu", (1, 1, 4, 3, 3), 3, True)
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        cm3a(*inputs, num_heads=1, backend="cpu")
    finally:
        torch.set_float32_matmul_precision(usual)
    assert seen == [precision == "high"]


@pytest.mark.parametrize("backend", [parameter("cuda")])
def test_tf32_where_torch_allows_it(backend: str) -> None:
    inputs, _ = _case(backend, (1, 2, 16, 17, 33), 3, True)
    exact = reference.cm3a(*(x.double() for x in inputs), num_heads=2)
    usual = torch.get_float32_matmul_precision()
    try:
        for precision, least, most in (("highest", 0.0, 1e-6), ("high", 1e-5, 1e-3)):
            torch.set_float32_matmul_precision(precision)
            out = _forward(backend, inputs, num_heads=2)
            assert least <= max(error(got, want) for got, want in zip(out, exact, strict=True)) <= most
    finally:
        torch.set_float32_matmul_precision(usual)


# ---- As a PyTorch operator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_opcheck(learned: bool, channels_last: bool) -> None:
    inputs, gradients = _case("cpu", (2, 2, 4, 5, 6), 3, learned, channels_last=channels_last)
    arguments = (*inputs, *([None, None] if not learned else []), 2, 3, 0.5, channels_last, False)
    torch.library.opcheck(torch.ops.pansharp_fast.cm3a_bwd.default, (*gradients, *arguments))
    leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.pansharp_fast.cm3a_fwd.default, leaves)


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [(None, "aot_eager"), ("cpu", "aot_eager"), ("reference", "aot_eager"), (None, "inductor")],
)
def test_compiles_as_one_graph(backend: str | None, compiler: str) -> None:
    inputs, gradients = _case("cpu", (1, 2, 4, 5, 6), 3, True)

    def step(*leaves: torch.Tensor) -> torch.Tensor:
        out_pan, out_ms = cm3a(*(each * 1.0 for each in leaves), num_heads=2, backend=backend)
        return (out_pan * gradients[0] + out_ms * gradients[1]).sum()

    def gradients_of(function: Any) -> list[torch.Tensor]:
        leaves = [each.detach().requires_grad_() for each in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves))

    torch.compiler.reset()
    compiled = gradients_of(torch.compile(step, fullgraph=True, backend=compiler))
    for got, want in zip(compiled, gradients_of(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    inputs, _ = _case("cpu", (1, 1, 4, 3, 3), 3, False)
    leaves = [each.requires_grad_() for each in inputs]
    out_pan, out_ms = cm3a(*leaves, num_heads=1, backend="cpu")
    (grad,) = torch.autograd.grad((out_pan + out_ms).square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cm3a_bwd: expected first derivatives only"):
        torch.autograd.grad(grad.sum(), leaves[:1])


# ---- Arguments -------------------------------------------------------------------------------------------------------


def test_meta_tensors_have_the_strides_of_real_ones() -> None:
    for channels_last in (False, True):
        inputs, _ = _case("cpu", (2, 2, 4, 5, 6), 3, True, channels_last=channels_last)
        real = cm3a(*inputs, num_heads=2, backend="cpu")
        for mode_output, output in zip(_under_fake_mode(inputs), real, strict=True):
            assert mode_output.stride() == output.stride()


def _under_fake_mode(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return cm3a(*(mode.from_tensor(x) for x in inputs), num_heads=2, backend="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 5, 6)}, "q: expected 4 dimensions"),
        ({"k_pan": torch.zeros(1, 8, 5, 7)}, "k_pan: expected the shape of q"),
        ({"v_ms": torch.zeros(1, 8, 5, 6, dtype=torch.float64)}, "v_ms: expected the dtype of q"),
        ({"num_heads": 3}, "num_heads: expected a divisor of the 8 channels, got 3"),
        ({"num_heads": 0}, "num_heads: expected a divisor"),
        ({"window": 7}, "window: expected one of"),
        ({"window": 5}, "weight: expected shape"),
        ({"weight": None}, "bias: expected None"),
        ({"bias": torch.zeros(4, 8)}, "bias: expected shape"),
        ({"weight": torch.zeros(4, 9, 3, 3, dtype=torch.int64)}, "weight: expected a floating dtype"),
        ({"backend": "gpu"}, "argument backend: expected auto or one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    names = ("q", "k_pan", "v_pan", "k_ms", "v_ms")
    arguments: dict[str, Any] = {name: torch.zeros(1, 8, 5, 6) for name in names}
    arguments.update(weight=torch.zeros(4, 9, 3, 3), bias=torch.zeros(4, 9), num_heads=2)
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        cm3a(**arguments)


def test_integer_maps_and_empty_images_are_refused() -> None:
    with pytest.raises(ValueError, match="q: expected a floating dtype"):
        cm3a(*[torch.zeros(1, 8, 5, 6, dtype=torch.int32)] * 5, num_heads=2)
    with pytest.raises(ValueError, match="q: expected at least one pixel, got 0 x 6"):
        cm3a(*[torch.zeros(1, 8, 0, 6)] * 5, num_heads=2)


def test_cpu_tensors_choose_the_cpu_kernel() -> None:
    assert candidates("cpu")[0] == "cpu"
    inputs, _ = _case("cpu", (1, 2, 4, 5, 6), 3, True)
    leaves = [each.requires_grad_() for each in inputs]
    assert "cm3a_fwd" in type(cm3a(*leaves, num_heads=2)[0].grad_fn).__name__
