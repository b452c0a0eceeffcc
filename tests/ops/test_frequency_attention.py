"""The frequency attention on every backend against the float64 reference."""

import functools
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast import reference
from pansharp_fast.ops import OPERATORS, BackendError, frequency_attention
from pansharp_fast.ops._backends import reasons, unavailable
from pansharp_fast.reference.frequency_attention import polar, self_conjugate
from tests.support.backends import device_of, parameters

OPERATOR = OPERATORS["frequency_attention"]
BACKENDS = parameters(OPERATOR, interpreted=True)
# Those with float64 kernels.
DOUBLES = [parameter for parameter in BACKENDS if torch.float64 in OPERATOR.support[parameter.values[0]].dtypes]
KERNELS = [parameter for parameter in BACKENDS if parameter.values[0] != "reference"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(shape, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_() for _ in range(3)]


def evaluate(tensors, grad, **options):
    """[out, gradient of q, of k, of v]."""
    out = frequency_attention(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out))]


def exact(tensors, grad, **options):
    doubles = [t.detach().cpu().double().requires_grad_() for t in tensors]
    return evaluate(doubles, grad.cpu().double(), backend="reference", **options)


def errors(actual, wanted):
    return [((a.cpu().double() - w).norm() / w.norm()).item() for a, w in zip(actual, wanted, strict=True)]


# A small scale keeps the softmax away from saturation, where all gradients but v's vanish.
CASES = [
    ((2, 8, 16, 16), {"num_heads": 2, "scale": 0.02}),
    ((1, 6, 17, 19), {"num_heads": 2, "scale": 0.02, "normalize": False}),
    ((3, 9, 12, 1), {"num_heads": 3, "scale": 0.1}),
    ((1, 5, 1, 13), {"num_heads": 1, "scale": 0.1}),
    ((2, 8, 1, 1), {"num_heads": 4}),
    ((1, 40, 9, 14), {"num_heads": 2, "scale": 0.01}),
    ((1, 16, 24, 41), {"num_heads": 4}),
]


@pytest.mark.values
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_against_float64(backend, shape, options, dtype):
    """No worse than plain PyTorch in the same type: twice its error forward, three times backward."""
    tensors = inputs(shape, dtype, device_of(backend))
    grad = torch.randn(shape)
    wanted = exact(tensors, grad, **options)
    ours = errors(evaluate(tensors, grad, backend=backend, **options), wanted)
    plain = errors(evaluate(tensors, grad, backend="reference", **options), wanted)
    floor = torch.finfo(dtype).eps
    assert ours[0] <= 2 * plain[0] + floor
    for own, eager in zip(ours[1:], plain[1:], strict=True):
        assert own <= 3 * eager + 4 * floor


@pytest.mark.values
@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("backend", DOUBLES)
def test_float64(backend, shape, options):
    tensors = inputs(shape, torch.float64, device_of(backend))
    grad = torch.randn(shape, dtype=torch.float64)
    ours = evaluate(tensors, grad, backend=backend, **options)
    for actual, wanted in zip(ours, exact(tensors, grad, **options), strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 4, 3), (2, 2, 3, 4), (1, 2, 1, 1)])
@pytest.mark.parametrize("backend", DOUBLES)
def test_gradcheck(backend, shape, normalize):
    tensors = inputs(shape, torch.float64, device_of(backend))
    assert torch.autograd.gradcheck(
        lambda *x: frequency_attention(*x, num_heads=2, scale=0.3, normalize=normalize, backend=backend), tensors
    )


@pytest.mark.values
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["zero", "constant", "negative", "even", "tiny", "one channel zero"])
def test_phase_cut_and_zero_amplitude(backend, kind, normalize):
    """Where the phase jumps or has no value, results are the reference's and all gradients are finite."""
    y, x = torch.arange(6.0)[:, None], torch.arange(8.0)[None, :]
    image = {
        "zero": torch.zeros(6, 8),
        "constant": torch.ones(6, 8),
        "negative": -torch.ones(6, 8),
        "even": -1.0 - ((x == 0) & (y == 0)).float(),  # its spectrum is real and negative
        "tiny": torch.full((6, 8), 1e-25),
    }.get(kind, torch.zeros(6, 8))
    base = image.expand(1, 4, 6, 8).clone()
    if kind == "one channel zero":
        base = torch.randn(1, 4, 6, 8)
        base[:, 1] = 0
    device = device_of(backend)
    tensors = [(factor * base).to(device).requires_grad_() for factor in (1.0, 2.0, -1.0)]
    options = {"num_heads": 2, "scale": 0.01, "normalize": normalize}
    results = evaluate(tensors, torch.randn(1, 4, 6, 8), backend=backend, **options)
    assert all(bool(t.isfinite().all()) for t in results)
    # On the same device: which way a phase jumps is that of its FFT's rounding.
    wanted = frequency_attention(*[t.detach() for t in tensors], backend="reference", **options)
    torch.testing.assert_close(results[0], wanted, rtol=1e-5, atol=1e-6 * max(1.0, wanted.abs().max().item()))


def test_phase_convention():
    values = torch.tensor([0j, -0.0 + 0j, -1 - 0.0j, -1 + 1e-9j, 1e-25 + 0j, 1 + 0j, 1j, -1j])
    amplitude, phase = polar(values, torch.tensor([False, False, False, False, False, False, False, True]))
    assert amplitude.tolist() == [0, 0, 1, 1, 0, 1, 1, 0]
    assert phase.tolist() == pytest.approx([0, 0, torch.pi, torch.pi, 0, 0, torch.pi / 2, 0])


@pytest.mark.parametrize(("height", "width"), list(itertools.product((1, 2, 5, 6), repeat=2)))
def test_self_conjugate_frequencies(height, width):
    """Exactly those at which the transform of every real map is real."""
    spectrum = torch.fft.rfft2(torch.randn(64, height, width, dtype=torch.float64))
    assert torch.equal(self_conjugate(height, width), spectrum.imag.abs().amax(0) < 1e-12)


@pytest.mark.values
@pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
def test_elementary_functions_to_2_ulp():
    def ulps(actual, wanted):
        magnitude = wanted.abs().float()
        ulp = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude
        return ((actual.double() - wanted).abs() / ulp.double()).max().item()

    spread = torch.exp(8 * torch.randn(400_000, 1))
    angles = torch.linspace(-torch.pi, torch.pi, 400_001)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    values = torch.cat([torch.randn(400_000, 2) * spread, circle, torch.tensor([[-1.0, 1e-18], [1e-18, -3.0]])])
    amplitude, phase = torch.ops.pansharp_fast.frequency_attention_polar(values)
    re, im = values.double().unbind(1)
    assert ulps(amplitude, torch.hypot(re, im)) <= 2
    assert ulps(phase, torch.atan2(im, re)) <= 2
    angles = torch.cat([angles, torch.randn(400_000) * 1e-3, torch.tensor([0.0, -0.0, torch.pi / 2, torch.pi])])
    cosine, sine = torch.ops.pansharp_fast.frequency_attention_unit(angles).unbind(1)
    assert ulps(cosine, angles.double().cos()) <= 2
    assert ulps(sine, angles.double().sin()) <= 2


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "part of a stack": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "reversed batch": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.values
@pytest.mark.parametrize("backend", [parameter for parameter in KERNELS if parameter in DOUBLES])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_shapes_and_strides(backend, data):
    heads, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    shape = (data.draw(st.integers(1, 3)), heads * depth, data.draw(st.integers(1, 11)), data.draw(st.integers(1, 11)))
    layouts = [data.draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(4)]
    options = {"num_heads": heads, "scale": 0.05, "normalize": data.draw(st.booleans())}
    torch.manual_seed(data.draw(st.integers(0, 9)))
    base = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    device = device_of(backend)
    strided = [LAYOUTS[name](x).to(device) for name, x in zip(layouts, base, strict=True)]
    tensors = [x.detach().requires_grad_() for x in strided[:3]]
    results = evaluate(tensors, strided[3], backend=backend, **options)
    assert results[0].is_contiguous()
    for actual, wanted in zip(results, exact(base[:3], base[3], **options), strict=True):
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-7, atol=1e-8 * max(1.0, wanted.abs().max().item()))


@pytest.mark.values
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 4, 1, 7), (2, 4, 7, 1), (2, 4, 1, 1)])
def test_strides_of_a_single_row_or_column(backend, shape):
    """Such a tensor counts as contiguous whatever the stride along the axis of length 1."""
    x = torch.randn(shape, device=device_of(backend)).transpose(2, 3)
    actual = frequency_attention(x, x, x, num_heads=2, backend=backend)
    wanted = frequency_attention(*[x.double()] * 3, num_heads=2, backend="reference")
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    tensors = inputs((0, 4, 3, 5), device=device_of(backend))
    results = evaluate(tensors, torch.zeros(0, 4, 3, 5), num_heads=2, backend=backend)
    assert all(t.shape == (0, 4, 3, 5) for t in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws(backend):
    device = device_of(backend)
    dtype = torch.float64 if torch.float64 in OPERATOR.support[backend].dtypes else torch.float32
    q, k, v = (t.detach() for t in inputs((2, 12, 7, 10), dtype, device))

    def attend(*x, **options):
        return frequency_attention(*x, num_heads=3, scale=0.05, backend=backend, **options)

    out = attend(q, k, v)
    # Heads do not see each other.
    order = torch.tensor([2, 0, 1])
    permuted = [x.unflatten(1, (3, 4))[:, order].flatten(1, 2) for x in (q, k, v)]
    unnormalized = attend(q, k, v, normalize=False).unflatten(1, (3, 4))[:, order].flatten(1, 2)
    close = functools.partial(
        torch.testing.assert_close, rtol=1e4 * torch.finfo(dtype).eps, atol=1e4 * torch.finfo(dtype).eps
    )
    close(attend(*permuted, normalize=False), unnormalized)
    # Normalisation takes away every pixel's scale.
    gain = torch.rand(2, 1, 7, 10, dtype=dtype, device=device) + 0.5
    close(attend(q * gain, k / gain, v * gain), out)
    # The gain of v comes through; the phases do not see it.
    close(attend(q, k, 3 * v, normalize=False), 3 * attend(q, k, v, normalize=False))
    # Rows of both attentions sum to one: where a head's channels of v agree, they come through unchanged.
    same = v[:, ::4].repeat_interleave(4, 1)
    close(attend(q, k, same, normalize=False), same)


@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_uninitialised_is_read(backend):
    """torch.empty filled with NaN leaves no trace, and repeating gives the same bits."""
    tensors = inputs((2, 6, 5, 9), device=device_of(backend))
    grad = torch.randn(2, 6, 5, 9)
    first = evaluate(tensors, grad, num_heads=2, scale=0.1, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        second = evaluate(tensors, grad, num_heads=2, scale=0.1, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
def test_threads_do_not_change_the_result():
    tensors, grad = inputs((1, 16, 96, 100)), torch.randn(1, 16, 96, 100)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(evaluate(tensors, grad, num_heads=2, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
@pytest.mark.parametrize("limit", [1, 4000, 1 << 30])
def test_chunks_do_not_change_the_result(monkeypatch, limit):
    module = sys.modules["pansharp_fast.ops.frequency_attention"]
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", limit)
    tensors, grad = inputs((3, 8, 9, 10), torch.float64), torch.randn(3, 8, 9, 10, dtype=torch.float64)
    results = evaluate(tensors, grad, num_heads=4, scale=0.05, backend="cpu")
    for actual, wanted in zip(results, exact(tensors, grad, num_heads=4, scale=0.05), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    device = device_of(backend)
    suffix = "_triton" if backend == "triton" else ""
    tensors = inputs((2, 6, 4, 5), device=device)
    options = (2, 0.1, True)
    frequency_attention(*tensors, num_heads=2, backend=backend)  # loads the library
    forward = getattr(torch.ops.pansharp_fast, f"frequency_attention_fwd{suffix}").default
    torch.library.opcheck(forward, (*tensors, *options))
    plain = [t.detach() for t in tensors]
    attention = forward(*plain, *options)[1]
    backward = getattr(torch.ops.pansharp_fast, f"frequency_attention_bwd{suffix}").default
    torch.library.opcheck(backward, (torch.randn(2, 6, 4, 5, device=device), *plain, attention, *options))


@pytest.mark.skipif(unavailable("cpu") is not None, reason=str(unavailable("cpu")))
def test_compile():
    tensors, grad = inputs((1, 4, 6, 8)), torch.randn(1, 4, 6, 8)

    def double(q, k, v):
        return 2 * frequency_attention(q, k, v, num_heads=2, scale=0.1)

    out = torch.compile(double, fullgraph=True)(*tensors)
    results = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    for actual, wanted in zip(results, evaluate(tensors, 2 * grad, num_heads=2, scale=0.1), strict=True):
        torch.testing.assert_close(actual, 2 * wanted if actual is results[0] else wanted)


def test_bad_arguments():
    q, k, v = (torch.randn(1, 4, 3, 3) for _ in range(3))
    for call, message in (
        (lambda: frequency_attention(q[0], k, v, num_heads=2), r"q: expected a floating-point tensor \[B, C, H, W\]"),
        (lambda: frequency_attention(q.long(), k, v, num_heads=2), "q: expected a floating-point tensor"),
        (lambda: frequency_attention(q, k[..., 1:], v, num_heads=2), r"k: expected .* as q, got .*\[1, 4, 3, 2\]"),
        (lambda: frequency_attention(q, k, v.double(), num_heads=2), r"v: expected .* as q, got torch.float64"),
        (lambda: frequency_attention(q, k, v, num_heads=3), "num_heads: expected a divisor of C = 4, got 3"),
        (lambda: frequency_attention(*[x[:, :, :0] for x in (q, k, v)], num_heads=2), "height and width of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(BackendError, match="cuda"):
        frequency_attention(q, k, v, num_heads=2, backend="cuda")


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_reasons_against_wide_heads(backend):
    q = torch.randn(1, 130, 2, 2)
    assert any("at most 64, got 65" in reason for reason in reasons(OPERATOR, backend, (q, q, q), num_heads=2))
    assert not any("at most 64" in reason for reason in reasons(OPERATOR, backend, (q, q, q), num_heads=5))


def test_half_precision_reference_is_float32_inside():
    tensors = [torch.randn(1, 4, 5, 6).bfloat16() for _ in range(3)]
    wanted = reference.frequency_attention(*[t.float() for t in tensors], num_heads=2).bfloat16()
    assert torch.equal(reference.frequency_attention(*tensors, num_heads=2), wanted)
