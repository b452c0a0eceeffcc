"""The CUDA kernels of cm3a, run by the CPU shim: values and gradients against the float64 reference."""

import pytest
import torch

from pansharp_fast import reference
from tests import simt
from tests.ops.test_conformance import cotangents, judge, samples
from tests.simt import ORDERS

FAULTS = {
    "missing barrier": ("    __syncthreads();\n    project<", "    if (!FAULT) __syncthreads();\n    project<", 0),
    "off by one": ("y0 -= kRadius;", "y0 -= kRadius - FAULT;", 0),
    "operands of a tile swapped": ("kUp<kSplit> * lower[0]", "kUp<kSplit> * (FAULT ? upper[1] : lower[0])", 0),
    "missing barrier, shift": ("    __syncthreads();\n  };\n", "    if (!FAULT) __syncthreads();\n  };\n", 0),
    "mirrored window": (
        "G::J - 1 - (dy * kWindow + dx)",
        "FAULT ? dy * kWindow + dx : G::J - 1 - (dy * kWindow + dx)",
        0,
    ),
    "offset of a weight": ("beside(p + 1, 0)", "beside(p + !FAULT, 0)", 0),
    "rows not stepped": (
        "from += static_cast<int64_t>(kWarps) * s.width;",
        "from += FAULT ? 0 : static_cast<int64_t>(kWarps) * s.width;",
        0,
    ),
    "columns beside the tile": ("% 2 * (kTileWidth + kRadius)", "% 2 * (kTileWidth + (FAULT ? 0 : kRadius))", 0),
    "last candidate of a weight": ("sum -= sums[i];", "sum -= FAULT ? -sums[i] : sums[i];", 0),
}
SOUND = simt.Library("csrc/cuda/cm3a.cu", ("cm3a_fwd", "cm3a_bwd"))
FAULTY = simt.Library(SOUND.source, SOUND.names, tuple(FAULTS.values()), "-O0")


@pytest.fixture(scope="module")
def ops():
    return SOUND.ops


def case(shape, heads, window, learned, dtype=torch.float32, channels_last=False):
    """Random inputs of one call: (five tensors, weight, bias, two gradients)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    tensors = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(5)]
    dim, count = shape[1] // heads, window**2
    weight = torch.randn(dim, count, window, window) * 0.3 if learned else None
    bias = torch.randn(dim, count) * 0.3 if learned else None
    gradients = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2)]
    return tensors, weight, bias, gradients


def expected(tensors, weight, bias, gradients, heads, window, scale, dtype=torch.float64):
    """(outputs, gradients) of the reference in `dtype`."""
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (*tensors, weight, bias)]
    out = reference.cm3a(*leaves, num_heads=heads, window=window, scale=scale)
    torch.autograd.backward(out, [g.to(dtype) for g in gradients])
    return [o.detach() for o in out], [t.grad for t in leaves if t is not None]


def run(ops, tensors, weight, bias, gradients, heads, window, scale, channels_last, tf32=False):
    options = (heads, window, scale, channels_last, tf32)
    out = ops.cm3a_fwd(*tensors, weight, bias, *options)
    grads = ops.cm3a_bwd(*gradients, *tensors, weight, bias, *options)
    return list(out), list(grads if weight is not None else grads[:5])


def error(actual, exact):
    """Norm of the deviation over the norm of the exact value, per tensor; a maximum over few values is noise."""
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]


@pytest.mark.parametrize(
    ("shape", "heads", "window", "learned", "channels_last"),
    [
        ((1, 16, 5, 7), 2, 3, True, False),
        ((2, 16, 19, 33), 1, 3, True, True),
        ((1, 10, 3, 34), 2, 3, True, False),  # five channels a head: an incomplete chunk
        ((1, 16, 18, 9), 1, 3, False, True),
        ((2, 3, 1, 1), 3, 3, True, False),
        ((1, 8, 10, 6), 1, 5, True, True),
        ((1, 12, 9, 35), 1, 5, False, False),
        ((1, 8, 34, 72), 1, 3, True, False),  # rows in vectors, a tile with neighbours on all sides
        ((1, 8, 34, 72), 1, 3, True, True),
        ((1, 16, 10, 36), 1, 5, True, False),
        ((1, 10, 12, 20), 2, 5, True, True),
    ],
)
def test_agrees_with_reference(ops, shape, heads, window, learned, channels_last):
    data = case(shape, heads, window, learned, channels_last=channels_last)
    options = (heads, window, 0.3)
    out, grads = expected(*data, *options)
    plain_out, plain_grads = expected(*data, *options, dtype=torch.float32)
    got_out, got_grads = run(ops, *data, *options, channels_last)
    # On a single pixel the plain run may be exact by luck: half a unit of float32, or one, as tensor cores truncate.
    floor = 2**-23 if learned else 2**-24
    for ours, plain in zip(error(got_out, out), error(plain_out, out), strict=True):
        assert ours <= 2 * max(plain, floor)
    # Windows of 25 candidates: three truncated sums for each value instead of one.
    factor = 3 if window == 3 or not learned else 3.5
    for ours, plain in zip(error(got_grads, grads), error(plain_grads, grads), strict=True):
        assert ours <= factor * max(plain, floor)


@pytest.mark.parametrize("number", range(4))
def test_few_values_by_the_rule_for_gpus(ops, number):
    """The operator's own samples of one pixel: truncated sums that cancel."""
    few = [each for each in samples("cm3a", "cpu", torch.float32) if each.tensors[0].shape[-2:].numel() == 1]
    sample = [each for each in few if len(each.tensors) > 5][number]
    heads, window = (sample.run.keywords[name] for name in ("num_heads", "window"))
    tensors, factor = sample.tensors[:5], sample.tensors[5:]
    gradients = cotangents(tensors[:2])
    options = heads, window, (tensors[0].shape[1] // heads) ** -0.5, "channels_last=True" in sample.name
    judge("cm3a", sample, run(ops, tensors, *factor, gradients, *options), True, tensor_cores=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "channels_last"), [(9, False), (12, False), (9, True)])
def test_low_precision(ops, dtype, width, channels_last):
    data = case((1, 16, 6, width), 2, 3, True, dtype, channels_last)
    options = (2, 3, 0.25)
    out, grads = expected(*data, *options)
    plain_out, plain_grads = expected(*data, *options, dtype=dtype)
    got_out, got_grads = run(ops, *data, *options, channels_last)
    assert all(t.dtype == dtype for t in (*got_out, *got_grads[:5]))
    for ours, plain in zip(error(got_out, out), error(plain_out, out), strict=True):
        assert ours <= 2 * plain
    for ours, plain in zip(error(got_grads, grads), error(plain_grads, grads), strict=True):
        assert ours <= 3 * plain


@pytest.mark.parametrize("channels_last", [False, True])
def test_result_does_not_depend_on_the_order_of_threads(ops, monkeypatch, channels_last):
    data = case((1, 16, 9, 40), 1, 3, True, channels_last=channels_last)
    results = []
    for order in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", order)
        out, grads = run(ops, *data, 1, 3, 0.25, channels_last)
        results.append([*out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_empty_batch(ops):
    data = case((0, 16, 4, 4), 2, 3, True)
    out, grads = run(ops, *data, 2, 3, 0.25, False)
    assert out[0].shape == (0, 16, 4, 4)
    assert all(not g.any() for g in grads[5:])


@pytest.mark.parametrize("window", [3, 5])
def test_tf32_where_allowed(ops, window):
    """TF32 products are about 2^-11 off; less would mean that the permission has no effect."""
    data = case((1, 8, 6, 9), 1, window, True)
    out, grads = expected(*data, 1, window, 0.3)
    got_out, got_grads = run(ops, *data, 1, window, 0.3, False, tf32=True)
    assert 1e-5 < max(error(got_out, out)) < 6e-4
    assert max(error(got_grads, grads)) < 2e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tf32", [False, True])
def test_non_finite_values_reach_their_neighbourhood_and_no_further(ops, value, tf32):
    tensors, weight, bias, _ = case((1, 8, 7, 12), 1, 3, True)
    tensors[1][0, 3, 3, 5] = value
    out_pan, out_ms = ops.cm3a_fwd(*tensors, weight, bias, 1, 3, 0.3, False, tf32)
    reached = torch.zeros(7, 12, dtype=torch.bool)
    reached[2:5, 4:7] = True
    assert torch.equal(out_pan.isfinite(), ~reached.expand_as(out_pan))
    assert out_ms.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_unaligned_maps(ops, channels_last):
    """A dense map whose address is not a multiple of eight values: the layout of the kernels changes, no result."""
    tensors, weight, bias, gradients = case((1, 8, 6, 12), 1, 3, True, channels_last=channels_last)
    wanted = run(ops, tensors, weight, bias, gradients, 1, 3, 0.3, channels_last)
    moved = torch.empty(tensors[1].numel() + 1)[1:].as_strided(tensors[1].shape, tensors[1].stride())
    tensors[1] = moved.copy_(tensors[1])
    got = run(ops, tensors, weight, bias, gradients, 1, 3, 0.3, channels_last)
    for ours, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_noticed(monkeypatch, fault):
    """The comparison above fails on a kernel with a fault: its passing means something."""
    data = case((1, 8, 9, 40), 1, 3, fault != "missing barrier, shift")
    monkeypatch.setenv("SIMT_FAULT", str(list(FAULTS).index(fault)) if fault else "")
    results = [each for half in run(FAULTY.ops, *data, 1, 3, 0.25, False) for each in half]
    exact = [each for half in expected(*data, 1, 3, 0.25) for each in half]
    agree = max(error(results, exact)) < 1e-3 and not any(each.isnan().any() for each in results)
    assert agree == (fault is None)
