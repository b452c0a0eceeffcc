"""The CUDA kernels of the frequency attention, run by the CPU shim through the operator's own Python halves."""

import sys

import pytest
import torch

from pansharp_fast.ops import frequency_attention
from tests import simt
from tests.simt import ORDERS

module = sys.modules["pansharp_fast.ops.frequency_attention"]

#: So few blocks that the shapes that a CPU can emulate have several tiles a block.
FEW_BLOCKS = ("kBlocks = 1024", "kBlocks = 4", 0)
BARRIERS = [("__syncthreads();", "if (!FAULT) __syncthreads();", which) for which in range(10)]
SWAPPED = [
    ("lower[t].x, upper[t].y", "FAULT ? upper[t].y : lower[t].x, FAULT ? lower[t].x : upper[t].y", 0),
    ("element(below, lower, j + r),", "element(below, lower, j + r + (FAULT ? 4 : 0)),", 0),
    ("8 * n + r + e % 2 * 4", "(FAULT ? 8 * n + 2 * r + e % 2 : 8 * n + r + e % 2 * 4)", 0),
]
SOUND = simt.Library(
    "csrc/cuda/frequency_attention.cu",
    tuple(
        f"frequency_attention_{name}"
        for name in ("inverse_norm", "normalize_bwd", "gram", "gram_bwd", "apply", "apply_bwd")
    ),
)
FEW = simt.Library(SOUND.source, SOUND.names, (FEW_BLOCKS,))
FAULTY = simt.Library(SOUND.source, SOUND.names, (*BARRIERS, *SWAPPED, FEW_BLOCKS), "-O0")
POLAR = simt.Library("tests/simt/polar.cu", ("frequency_attention_polar",))


@pytest.fixture(scope="module")
def passes():
    return SOUND.ops


def run(passes, tensors, grad, heads, scale, normalize):
    out, attention = module._forward(passes, *tensors, heads, scale, normalize)
    return [out, *module._gradients(passes, grad, *tensors, attention, heads, scale, normalize)]


def errors(passes, shape, heads, scale, normalize=True, dtype=torch.float64, layout=torch.contiguous_format):
    """Relative norm of the deviation from the float64 reference, of the result and of the three gradients."""
    tensors = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3)]
    grad = torch.randn(shape).to(dtype)
    leaves = [t.double().requires_grad_() for t in tensors]
    exact = frequency_attention(*leaves, num_heads=heads, scale=scale, normalize=normalize, backend="reference")
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())]
    ours = run(passes, tensors, grad, heads, scale, normalize)
    assert all(o.dtype == dtype for o in ours)
    return [((o.double() - w).norm() / w.norm()).item() for o, w in zip(ours, wanted, strict=True)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("shape", "heads", "normalize"),
    [
        ((2, 6, 6, 9), 2, True),
        ((1, 9, 1, 7), 1, False),
        ((1, 14, 5, 4), 1, True),  # two Gram entries a thread
        ((1, 2, 17, 30), 1, True),  # three runs
    ],
)
def test_values_and_gradients(passes, monkeypatch, order, shape, heads, normalize):
    monkeypatch.setenv("SIMT_ORDER", order)
    assert max(errors(passes, shape, heads, 0.02, normalize)) < 1e-9


def test_many_channels(passes):
    assert max(errors(passes, (1, 34, 3, 4), 1, 0.02)) < 1e-9


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [3, 11, 20, 34, 64])
def test_several_tiles_a_block(monkeypatch, order, depth):
    """Two runs of two tiles, the last of which is not full; odd numbers of frequencies."""
    monkeypatch.setenv("SIMT_ORDER", order)
    tile = 128 if depth <= 16 else 64 if depth <= 32 else 32
    heads = 2 if depth <= 8 else 1
    shape = (1, heads * depth, 25, {128: 32, 64: 16, 32: 8}[tile])
    frequencies = shape[2] * (shape[3] // 2 + 1)
    assert 3 * tile < frequencies < 4 * tile
    assert max(errors(FEW.ops, shape, heads, 0.02)) < 1e-9
    assert max(errors(FEW.ops, shape, heads, 0.02, dtype=torch.float32)) < 2e-5


def test_amplitudes_and_phases():
    """To 2^-22 and 2 ulp, with approximate functions as far off as they may be; the conventions at 0 and at the cut."""
    polar = POLAR.ops.frequency_attention_polar
    angles = torch.linspace(-torch.pi, torch.pi, 50_001)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    spread = torch.exp(8 * torch.randn(50_000, 1))
    values = torch.cat([torch.randn(50_000, 2) * spread, circle, torch.tensor([[-1.0, 1e-18], [1e-18, -3.0]])])
    amplitude, phase = polar(values).double()
    re, im = values.double().unbind(1)
    assert ((amplitude / torch.hypot(re, im) - 1).abs() <= 2**-22).all()
    wanted = torch.atan2(im, re)
    magnitude = wanted.abs().float()
    ulp = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude
    assert ((phase - wanted).abs() <= 2 * ulp).all()
    special = torch.tensor([[0.0, 0], [-0.0, 0], [-1, -0.0], [1e-25, 0], [1, 0], [0, 1], [0, -1], [-2, 0]])
    amplitude, phase = polar(special)
    torch.testing.assert_close(amplitude, torch.tensor([0.0, 0, 1, 0, 1, 1, 1, 2]))
    half = torch.pi / 2
    assert torch.equal(phase, torch.tensor([0, 0, 2 * half, 0, 0, half, -half, 2 * half]))


# Strips of both Gram matrices: 1 (eight groups of warps), 2 (four groups), 4 (two groups), 8.
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [8, 14, 20, 34])
def test_gram_matrices_on_tensor_cores(passes, monkeypatch, order, depth):
    """float32: twice the error of plain float32, and half a unit that sums of positive products lose by truncation."""
    monkeypatch.setenv("SIMT_ORDER", order)
    q, k = (torch.randn(1, 2 * depth, 6, 7, 2) for _ in range(2))
    q[..., 0, :, 1] = k[..., 0, :, 1] = 0  # where the spectrum of a real map is real
    q[..., 3, :, 1] = k[..., 3, :, 1] = 0

    def gram(q, k):
        parts = [(x[..., 0].hypot(x[..., 1]), torch.atan2(x[..., 1], x[..., 0])) for x in (q, k)]
        return torch.stack([a.view(2, depth, 42) @ b.view(2, depth, 42).mT for a, b in zip(*parts, strict=True)], 1)

    exact = gram(q.double(), k.double())
    ours = passes.frequency_attention_gram(q, k, 2, 12)[0]
    for part in range(2):
        allowed = 2 * (gram(q, k) - exact)[:, part].norm() + 2**-24 * exact[:, part].norm()
        assert (ours - exact)[:, part].norm() <= allowed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("depth", [5, 8, 14, 20, 34, 64])
def test_attention_on_tensor_cores(passes, monkeypatch, order, depth):
    """float32: at most twice the error of plain float32."""
    monkeypatch.setenv("SIMT_ORDER", order)
    v = torch.randn(1, 2 * depth, 6, 7, 2)
    v[..., 0, :, 1] = v[..., 3, :, 1] = 0  # where the spectrum of a real map is real
    attention = torch.softmax(torch.randn(1, 2, 2, depth, depth), -1)

    def apply(v, attention):
        heads = torch.view_as_complex(v).view(1, 2, depth, 42)
        out = torch.polar(attention[:, :, 0] @ heads.abs(), attention[:, :, 1] @ heads.angle())
        return torch.view_as_real(out).view(v.shape)

    exact, plain = apply(v.double(), attention.double()), apply(v, attention)
    passes.frequency_attention_apply(v, attention, 2, 12)
    assert (v - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_types_and_layouts(passes, dtype, limit, layout):
    assert max(errors(passes, (2, 6, 5, 8), 2, 0.05, dtype=dtype, layout=layout)) < limit


def test_zero_and_constant_maps_have_finite_gradients(passes):
    for value in (0.0, 1.0, -1.0):
        tensors = [torch.full((1, 4, 4, 6), value) for _ in range(3)]
        results = run(passes, tensors, torch.randn(1, 4, 4, 6), 2, 0.1, True)
        assert all(bool(t.isfinite().all()) for t in results)


def plant(monkeypatch, fault):
    monkeypatch.setenv("SIMT_FAULT", "" if fault is None else str(fault))


@pytest.mark.parametrize("which", [None, *range(len(SWAPPED))])
def test_swapped_operands_and_results_are_noticed(monkeypatch, which):
    plant(monkeypatch, which if which is None else len(BARRIERS) + which)
    agree = max(errors(FAULTY.ops, (1, 12, 5, 8), 1, 0.05, dtype=torch.float32)) < 1e-3
    assert agree == (which is None)


@pytest.mark.parametrize("which", [None, *range(len(BARRIERS))])
def test_missing_barrier_is_noticed(monkeypatch, which):
    """Every barrier is needed, those that guard the next tile too."""
    assert (simt.ROOT / SOUND.source).read_text().count("__syncthreads();") == len(BARRIERS)
    plant(monkeypatch, which)
    worst = 0.0
    for order in ORDERS:
        monkeypatch.setenv("SIMT_ORDER", order)
        found = errors(FAULTY.ops, (1, 12, 25, 32), 1, 0.02)
        worst = max(worst, *(1.0 if error != error else error for error in found))
    assert (worst > 1e-6) == (which is not None)
