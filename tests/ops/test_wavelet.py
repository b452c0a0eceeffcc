"""Wavelet transforms on every backend against PyWavelets, and the algebra that they must obey."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from pansharp_fast.nn import DWT2d, IDWT2d, ISWT2d, SWT2d
from pansharp_fast.ops import BackendError, dwt2, explain, idwt2, iswt2, swt2, wavedec2, waverec2
from pansharp_fast.ops._backends import reasons
from pansharp_fast.ops.wavelet import MODES, OPERATOR, Level, _analysis, _bands_of, _filters, _synthesis
from tests.support.accuracy import error
from tests.support.backends import device_of, parameter, parameters

pywt = pytest.importorskip("pywt")
ALL_MODES = MODES[:-1]
WAVELETS = pywt.wavelist(kind="discrete")
ORTHOGONAL = [name for name in WAVELETS if pywt.Wavelet(name).orthogonal]
SIZES = [1, 2, 3, 5, 6, 7, 16, 31, 63, 64, 65, 130]
BACKENDS = parameters(OPERATOR, torch.float64)
KERNELS = [parameter for parameter in BACKENDS if parameter.values != ("reference",)]
#: Where tensors of the running test lie: on the device of its backend.
DEVICE = "cpu"

backends = pytest.mark.parametrize("backend", BACKENDS)
each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    global DEVICE
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    DEVICE = device_of(parameters.get("backend") or "cpu")
    yield
    DEVICE = "cpu"


def covered(backend: str, *modes: str) -> bool:
    return not reasons(OPERATOR, backend, [torch.zeros(1, 1, device=DEVICE)], mode=modes)


def require(backend: str, *modes: str) -> None:
    if not covered(backend, *modes):
        pytest.skip(f"{backend} does not run {modes}")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def level(wavelet: str, mode: str, dilation: int = 1, second: str | None = None) -> Level:
    """A level with the analysis filters of `wavelet` along H and of `second` along W."""
    index = MODES.index(mode)
    return Level(_filters(wavelet, "dec"), _filters(second or wavelet, "dec"), index, index, dilation)


def nested(coeffs: Any) -> Any:
    """PyWavelets' nested arrays as nested tensors."""
    if isinstance(coeffs, (list, tuple)):
        return type(coeffs)(nested(each) for each in coeffs)
    return torch.from_numpy(np.ascontiguousarray(coeffs)).to(DEVICE)


def flat(coeffs: Any) -> list[Any]:
    if isinstance(coeffs, (list, tuple)):
        return [leaf for each in coeffs for leaf in flat(each)]
    return [coeffs]


def same(actual: Any, expected: Any) -> None:
    """Nested float64 results agree to rounding (sums of the smooth and antireflect borders cancel large terms)."""
    actual, expected = flat(actual), flat(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        a, e = a.cpu(), torch.as_tensor(np.asarray(e.cpu() if isinstance(e, torch.Tensor) else e))
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=0, atol=1e-9 * max(1.0, float(e.abs().max())))


# ---- PyWavelets ------------------------------------------------------------------------------------------------------


@pytest.mark.values
@backends
@settings(max_examples=80, deadline=None)
@given(
    wavelet=st.sampled_from(WAVELETS),
    mode=st.sampled_from(ALL_MODES),
    height=st.sampled_from(SIZES),
    width=st.sampled_from(SIZES),
    seed=st.integers(0, 99),
)
def test_dwt2_and_idwt2_are_pywavelets(
    backend: str, wavelet: str, mode: str, height: int, width: int, seed: int
) -> None:
    if not covered(backend, mode) or (mode.endswith("reflect") and min(height, width) < 2):
        return
    x = random(2, height, width, seed=seed)
    expected = pywt.dwt2(x.cpu().numpy(), wavelet, mode)
    same(dwt2(x, wavelet, mode, backend=backend), expected)
    same(idwt2(nested(expected), wavelet, mode, backend=backend), pywt.idwt2(expected, wavelet, mode))


@pytest.mark.values
@backends
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior4.4"])
def test_every_mode_is_pywavelets(backend: str, wavelet: str, mode: str) -> None:
    require(backend, mode)
    for height, width in ((7, 130), (64, 63), (2, 5)):
        x = random(height, width)
        expected = pywt.dwt2(x.cpu().numpy(), wavelet, mode)
        same(dwt2(x, wavelet, mode, backend=backend), expected)
        same(idwt2(nested(expected), wavelet, mode, backend=backend), pywt.idwt2(expected, wavelet, mode))


@pytest.mark.filterwarnings("ignore:.* has been renamed:DeprecationWarning")
@pytest.mark.parametrize("mode", ["per", "sym", "zpd", "cpd", "ppd", "sp1", *range(len(pywt.Modes.modes))])
def test_modes_by_what_pywavelets_takes(mode: Any) -> None:
    """Older names, and the numbers that `pywt.Modes.symmetric` and its like are."""
    x = random(7, 10)
    same(dwt2(x, "db2", mode), pywt.dwt2(x.cpu().numpy(), "db2", mode))
    same(wavedec2(x, "haar", (mode, "symmetric"), 1), pywt.wavedec2(x.cpu().numpy(), "haar", (mode, "symmetric"), 1))
    same(
        waverec2(wavedec2(x, "db2", mode, 1), "db2", mode),
        pywt.waverec2(pywt.wavedec2(x.cpu().numpy(), "db2", mode, 1), "db2", mode),
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_takes_bands_of_several_dtypes(backend: str | None) -> None:
    """As `torch.cat` does, and in the dtype that it gives; without autocast they are refused."""
    a, details = dwt2(random(2, 8, 10, dtype=torch.float32), "db2")
    coarse = a.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = idwt2((coarse, details), "db2", backend=backend)
        several = waverec2([coarse, (None, *details[1:])], "db2", backend=backend)
        stationary = iswt2([(coarse, details)], "db2", backend=backend)
    for got, want in (
        (actual, idwt2((coarse.float(), details), "db2", backend=backend)),
        (several, waverec2([coarse.float(), (None, *details[1:])], "db2", backend=backend)),
        (stationary, iswt2([(coarse.float(), details)], "db2", backend=backend)),
    ):
        assert got.dtype == torch.cat([coarse, *details]).dtype == torch.float32
        torch.testing.assert_close(got, want)
    assert torch.autograd.grad(actual.sum(), coarse)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one shape and dtype"):
        idwt2((coarse, details), "db2", backend=backend)


@backends
def test_wavelet_mode_and_axes_per_axis(backend: str) -> None:
    x = random(9, 3, 14)
    wavelets, modes, axes = ("db3", "bior2.2"), ("periodic", "symmetric"), (2, 0)
    expected = pywt.dwt2(x.cpu().numpy(), wavelets, modes, axes)
    same(dwt2(x, wavelets, modes, axes, backend=backend), expected)
    same(idwt2(nested(expected), wavelets, modes, axes, backend=backend), pywt.idwt2(expected, wavelets, modes, axes))
    several = pywt.wavedec2(x.cpu().numpy(), wavelets, modes, 1, axes)
    same(wavedec2(x, wavelets, modes, 1, axes, backend=backend), several)
    same(
        waverec2(nested(several), wavelets, modes, axes, backend=backend), pywt.waverec2(several, wavelets, modes, axes)
    )


@backends
@pytest.mark.parametrize(
    ("wavelet", "mode", "shape", "levels"),
    [("db2", "symmetric", (2, 33, 50), None), ("haar", "zero", (37, 21), 3), ("bior1.3", "periodization", (24, 22), 2)],
)
def test_wavedec2_and_waverec2_are_pywavelets(
    backend: str, wavelet: str, mode: str, shape: tuple[int, ...], levels: int | None
) -> None:
    x = random(*shape)
    expected = pywt.wavedec2(x.cpu().numpy(), wavelet, mode, levels)
    same(wavedec2(x, wavelet, mode, levels, backend=backend), expected)
    back = pywt.waverec2(expected, wavelet, mode)
    same(waverec2(nested(expected), wavelet, mode, backend=backend), back)
    same(
        waverec2(wavedec2(x, wavelet, mode, levels, stack=True, backend=backend), wavelet, mode, backend=backend), back
    )


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 30, 64, 131])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db5", "dmey"])
def test_number_of_levels_is_pywavelets(wavelet: str, size: int) -> None:
    x = random(size, size)
    assert len(wavedec2(x, wavelet)) == len(pywt.wavedec2(x.cpu().numpy(), wavelet))


def test_too_many_levels_warn() -> None:
    with pytest.warns(UserWarning, match="level: 4 is more than 3"):
        wavedec2(random(8, 8), "haar", level=4)


@pytest.mark.values
@backends
@pytest.mark.parametrize("trim_approx", [False, True])
@pytest.mark.parametrize(
    ("wavelet", "shape", "levels", "norm"),
    [
        ("haar", (3, 8, 20), 2, False),
        ("db3", (8, 24), 3, True),
        ("bior2.2", (4, 4), 1, False),
        ("haar", (2, 66), 1, True),
    ],
)
def test_swt2_and_iswt2_are_pywavelets(
    backend: str, wavelet: str, shape: tuple[int, ...], levels: int, norm: bool, trim_approx: bool
) -> None:
    x = random(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyWavelets warns of norm with biorthogonal filters
        expected = pywt.swt2(x.cpu().numpy(), wavelet, levels, trim_approx=trim_approx, norm=norm)
        back = pywt.iswt2(copy.deepcopy(expected), wavelet, norm)
    actual = swt2(x, wavelet, levels, trim_approx=trim_approx, norm=norm, backend=backend)
    same(actual, expected)
    same(iswt2(actual, wavelet, norm, backend=backend), back)
    stacked = swt2(x, wavelet, levels, trim_approx=trim_approx, norm=norm, stack=True, backend=backend)
    same(iswt2(stacked, wavelet, norm, backend=backend), back)


def test_swt2_starts_at_a_level() -> None:
    x = random(8, 16)
    same(swt2(x, "db2", 2, 1), pywt.swt2(x.cpu().numpy(), "db2", 2, 1))


# ---- Algebra ---------------------------------------------------------------------------------------------------------


@backends
@settings(max_examples=25, deadline=None)
@given(
    wavelet=st.sampled_from([name for name in WAVELETS if name != "dmey"]),  # a truncated filter: not exact by design
    mode=st.sampled_from(ALL_MODES),
    seed=st.integers(0, 99),
)
def test_perfect_reconstruction(backend: str, wavelet: str, mode: str, seed: int) -> None:
    if not covered(backend, mode):
        return
    height, width = 10 + seed % 13, 12 + seed % 7
    x = random(height, width, seed=seed)
    back = idwt2(dwt2(x, wavelet, mode, backend=backend), wavelet, mode, backend=backend)[:height, :width]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)  # the tables have ten digits
    x = random(8, 16, seed=seed)
    torch.testing.assert_close(
        iswt2(swt2(x, wavelet, 2, backend=backend), wavelet, backend=backend),
        x,
        rtol=0,
        atol=1e-8,
    )


@backends
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym6", "coif3"])
def test_energy_is_kept(backend: str, wavelet: str) -> None:
    x = random(16, 24)
    y = dwt2(x, wavelet, "periodization", stack=True, backend=backend)
    torch.testing.assert_close(y.square().sum(), x.square().sum(), rtol=1e-9, atol=0)
    parts = swt2(x, wavelet, 2, trim_approx=True, norm=True, stack=True, backend=backend)
    torch.testing.assert_close(sum(part.square().sum() for part in parts), x.square().sum(), rtol=1e-9, atol=0)


@backends
@settings(max_examples=15, deadline=None)
@given(wavelet=st.sampled_from(WAVELETS), dy=st.integers(-9, 9), dx=st.integers(-9, 9))
def test_swt_moves_with_the_image(backend: str, wavelet: str, dy: int, dx: int) -> None:
    x = random(8, 12)
    moved = swt2(x.roll((dy, dx), (0, 1)), wavelet, 2, stack=True, backend=backend)
    for a, b in zip(moved, swt2(x, wavelet, 2, stack=True, backend=backend), strict=True):
        torch.testing.assert_close(a, b.roll((dy, dx), (-2, -1)), rtol=0, atol=1e-12)


@backends
@each_mode
@pytest.mark.parametrize(
    ("wavelet", "second", "dilation"), [("haar", "haar", 1), ("db3", "bior1.3", 1), ("db2", "haar", 4)]
)
def test_synthesis_is_the_transpose_of_analysis(
    backend: str, mode: str, wavelet: str, second: str, dilation: int
) -> None:
    require(backend, mode)
    if dilation > 1 and mode != "stationary":
        dilation = 1
    one = level(wavelet, mode, dilation, second)
    for height, width in ((8, 12), (5, 8), (2, 37), (16, 3)):
        if backend == "cuda" and (height % dilation or width % dilation):
            continue  # refused: `test_cuda_refuses_sizes_between_taps`
        x = random(2, height, width)
        y = _analysis(x, one, backend)
        z = random(*y.shape, seed=1)
        back = _synthesis(z.unbind(1), one, (height, width), backend)
        torch.testing.assert_close((y * z).sum(), (x * back).sum(), rtol=1e-10, atol=1e-10)


# ---- Backends agree with the reference -------------------------------------------------------------------------------


@pytest.mark.values
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("wavelet", "mode"), [("haar", "symmetric"), ("db4", "reflect"), ("haar", "stationary")])
def test_error_is_that_of_plain_pytorch(backend: str, wavelet: str, mode: str, dtype: torch.dtype) -> None:
    require(backend, mode)
    one = level(wavelet, mode)
    for shape in ((2, 33, 71), (1, 6, 130)):
        x = random(*shape, dtype=dtype)
        exact = _analysis(x.double(), one, "reference")
        floor = torch.finfo(dtype).eps / 8
        plain = error(_analysis(x, one, "reference"), exact)
        assert error(_analysis(x, one, backend), exact) <= 2 * max(plain, floor)
        bands = exact.to(dtype).unbind(1)
        exact = _synthesis([band.double() for band in bands], one, shape[1:], "reference")
        plain = error(_synthesis(bands, one, shape[1:], "reference"), exact)
        actual = _synthesis(bands, one, shape[1:], backend)
        assert actual.dtype == dtype
        assert error(actual, exact) <= 3 * max(plain, floor)


@pytest.mark.parametrize("backend", KERNELS)
@each_mode
def test_gradients(backend: str, mode: str) -> None:
    require(backend, mode)
    one = level("db2", mode, 2 if mode == "stationary" else 1)
    size = (2, 4) if mode == "stationary" else (3, 4)  # multiples of the taps' spacing
    x = random(1, *size).requires_grad_()
    assert gradcheck(lambda t: _analysis(t, one, backend), x)
    assert gradgradcheck(lambda t: _analysis(t, one, backend).square(), x)
    bands = [b.detach().requires_grad_() for b in _analysis(x, one, backend).unbind(1)]
    assert gradcheck(lambda *b: _synthesis(b, one, size, backend), bands)
    assert gradgradcheck(lambda *b: _synthesis(b, one, size, backend).square(), bands)


@backends
def test_gradient_of_a_band_alone(backend: str) -> None:
    """A band that the loss does not see gets an exactly zero gradient, the others theirs."""
    x = random(2, 6, 7).requires_grad_()
    a, _ = dwt2(x, "db2", backend=backend)
    a.sum().backward()
    expected = random(2, 6, 7).requires_grad_()
    dwt2(expected, "db2", stack=True, backend="reference")[:, 0].sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


@backends
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 5, 4)])
def test_empty_batch(backend: str, shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    y = dwt2(x, "db2", stack=True, backend=backend)
    assert y.shape == (*shape[:2], 4, (shape[2] + 3) // 2, (shape[3] + 3) // 2)
    back = idwt2(y, "db2", backend=backend)
    back.sum().backward()
    assert x.grad is not None


@pytest.mark.values
@backends
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_any_strides(backend: str, wavelet: str) -> None:
    base = random(2, 3, 20, 26)
    views = [
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(-1, -2),
        base[:, 1:, 3:17, 5:24],
        base[..., ::2, ::2],
        base.flip(-1),
        base[:1, :1].expand(2, 3, -1, -1),
    ]
    for view in views:
        expected = dwt2(view.contiguous(), wavelet, stack=True, backend="reference")
        torch.testing.assert_close(dwt2(view, wavelet, stack=True, backend=backend), expected)
        bands = expected.unbind(-3)
        strided = [b.transpose(-1, -2).contiguous().transpose(-1, -2) for b in bands[:2]] + list(bands[2:])
        torch.testing.assert_close(
            idwt2((strided[0], tuple(strided[1:])), wavelet, backend=backend),
            idwt2(expected, wavelet, backend="reference"),
        )


@backends
def test_none_stands_for_zeros(backend: str) -> None:
    a, (h, v, d) = dwt2(random(2, 8, 9), "db2", backend=backend)
    zero = torch.zeros_like(a)
    torch.testing.assert_close(
        idwt2((None, (h, None, d)), "db2", backend=backend), idwt2((zero, (h, zero, d)), "db2", backend=backend)
    )
    torch.testing.assert_close(
        waverec2([a, (None, v, None)], "db2", backend=backend), waverec2([a, (zero, v, zero)], "db2", backend=backend)
    )


@backends
def test_same_input_same_bits(backend: str) -> None:
    x = random(3, 37, 45, dtype=torch.float32)
    assert torch.equal(dwt2(x, "db3", stack=True, backend=backend), dwt2(x, "db3", stack=True, backend=backend))


@pytest.mark.values
@backends
def test_not_a_number_stays_where_it_belongs(backend: str) -> None:
    x = random(1, 32, 32)
    x[0, 10, 12] = float("nan")
    y = dwt2(x, "haar", stack=True, backend=backend)
    assert y.isnan().sum() == 4
    assert y[0, :, 5, 6].isnan().all()


@pytest.mark.parametrize("backend", [parameter("cpu")])
def test_index_arithmetic_beyond_32_bits(backend: str, tmp_path: Any) -> None:
    """Planes and rows farther apart than 2^31 elements, in a sparse file of which few pages are ever touched."""
    rows, plane = 2**28 + 8, 2**32 + 16
    count = plane + 9 * rows + 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=count, dtype=torch.float32)
    x = storage.as_strided((2, 10, 12), (plane, rows, 1))
    x.copy_(random(2, 10, 12))
    one = level("db2", "symmetric")
    expected = _analysis(x.contiguous(), one, "reference")
    torch.testing.assert_close(_analysis(x, one, backend), expected)
    far = storage.as_strided((2, 6, 7), (plane, rows, 1))
    far.copy_(expected[:, 0])
    four = [far, *expected.unbind(1)[1:]]
    torch.testing.assert_close(
        _synthesis(four, one, (10, 12), backend), _synthesis(expected.unbind(1), one, (10, 12), "reference")
    )


@pytest.mark.values
def test_big_results_are_right() -> None:
    """Results of 32 MiB and more come in huge pages; they are stored past the caches in memory that was used before."""
    x = random(8, 1024, 1024, dtype=torch.float32)
    for _ in range(2):
        y = dwt2(x, "haar", stack=True, backend="cpu")
        torch.testing.assert_close(y[5], dwt2(x[5], "haar", stack=True, backend="reference"))
        torch.testing.assert_close(idwt2(y, "haar", backend="cpu"), x)
        s = swt2(x[:3], "haar", 1, stack=True, backend="cpu")[0]
        torch.testing.assert_close(s[2], swt2(x[2], "haar", 1, stack=True, backend="reference")[0])
        odd = random(5, 1501, 1303, dtype=torch.float32)  # rows and planes that end anywhere in a page
        y = dwt2(odd, "db2", stack=True, backend="cpu")
        torch.testing.assert_close(y[3], dwt2(odd[3], "db2", stack=True, backend="reference"))


def test_big_results_in_memory_that_was_used() -> None:
    """glibc keeps big blocks when it is told to; otherwise they are fresh at every call."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    test = f"{__file__}::{test_big_results_are_right.__name__}"
    done = subprocess.run([*command, test], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# ---- Triton ----------------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(
    bool(reasons(OPERATOR, "triton", [torch.zeros(1, 1)], mode="zero")),
    reason="triton runs neither here nor interpreted",
)


@needs_triton
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("smooth", "antireflect")])
def test_triton_is_the_reference(mode: str) -> None:
    one = level("db2", mode, second="bior1.3")
    x = random(1, 3, 8)
    expected = _analysis(x, one, "reference")
    same(_analysis(x, one, "triton"), expected)
    same(
        _synthesis(expected.unbind(1), one, (3, 8), "triton"), _synthesis(expected.unbind(1), one, (3, 8), "reference")
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_haar(dtype: torch.dtype) -> None:
    x = random(2, 10, 70, dtype=dtype)
    for mode, dilation in (("symmetric", 1), ("stationary", 2)):
        one = level("haar", mode, dilation)
        expected = _analysis(x.double(), one, "reference")
        floor = torch.finfo(dtype).eps / 8
        plain = error(_analysis(x, one, "reference"), expected)
        assert error(_analysis(x, one, "triton"), expected) <= 2 * max(plain, floor)


@needs_triton
def test_triton_gradient_empty_batch_and_strides() -> None:
    x = random(1, 7, 6).mT.requires_grad_()
    other = x.detach().clone().requires_grad_()
    dwt2(x, "db2", "reflect", stack=True, backend="triton").square().sum().backward()
    dwt2(other, "db2", "reflect", stack=True, backend="reference").square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert dwt2(x[:0], "db2", stack=True, backend="triton").shape == (0, 4, 4, 5)
    one = level("haar", "zero")
    torch.library.opcheck(torch.ops.pansharp_fast.wavelet_fwd_triton.default, (random(1, 2, 4).requires_grad_(), *one))


@needs_triton
def test_triton_index_arithmetic_beyond_32_bits(tmp_path: Any) -> None:
    rows, plane = 2**28 + 8, 2**32 + 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=plane + 12 * rows, dtype=torch.float32)
    x = storage.as_strided((2, 10, 12), (plane, rows, 1))
    x.copy_(random(2, 10, 12))
    one = level("haar", "symmetric")
    expected = _analysis(x.contiguous(), one, "reference")
    torch.testing.assert_close(_analysis(x, one, "triton"), expected)
    far = storage.as_strided((2, 5, 6), (plane, rows, 1))
    far.copy_(expected[:, 0])
    four = [far, *expected.unbind(1)[1:]]
    torch.testing.assert_close(
        _synthesis(four, one, (10, 12), "triton"), _synthesis(expected.unbind(1), one, (10, 12), "reference")
    )


@needs_triton
def test_triton_refuses_what_it_does_not_cover() -> None:
    with pytest.raises(BackendError, match="mode: expected a border of single samples, got smooth"):
        dwt2(random(4, 4), "haar", "smooth", backend="triton")


# ---- On a GPU --------------------------------------------------------------------------------------------------------


def test_cuda_refuses_sizes_between_taps() -> None:
    options = level("db2", "stationary", 4).options
    for size, refused in (((8, 12), False), ((5, 8), True), ((8, 6), True)):
        found = reasons(OPERATOR, "cuda", [random(2, *size)], **options)
        assert any("multiples of the tap spacing 4" in reason for reason in found) == refused


def plain_error(run: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype, exact: torch.Tensor) -> float:
    """Error of plain PyTorch in `dtype`; for float64, which is `exact` itself, that of float32 in proportion."""
    if dtype != torch.float64:
        return error(run(dtype), exact)
    return error(run(torch.float32), exact) / torch.finfo(torch.float32).eps * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["zero", "symmetric", "reflect", "periodization", "smooth", "stationary"])
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "bior4.4"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_gpu(backend: str, wavelet: str, mode: str, dtype: torch.dtype) -> None:
    if backend == "triton":
        require(backend, mode)
    one = level(wavelet, mode)
    for shape in ((3, 64, 96), (2, 20, 130)):
        x = random(*shape, dtype=dtype)
        exact = _analysis(x.double(), one, "reference")
        floor = torch.finfo(dtype).eps
        plain = plain_error(lambda dtype, x=x: _analysis(x.to(dtype), one, "reference"), dtype, exact)
        y = _analysis(x, one, backend)
        assert error(y, exact) <= max(2 * plain, floor)
        assert torch.equal(torch.stack(_bands_of(x, one, backend), 1), y)
        bands = [band.to(dtype) for band in exact.unbind(1)]

        def synthesis(dtype: torch.dtype, bands: Any = bands, size: Any = shape[1:]) -> torch.Tensor:
            return _synthesis([band.to(dtype) for band in bands], one, size, "reference")

        exact = synthesis(torch.float64)
        plain = plain_error(synthesis, dtype, exact)
        assert error(_synthesis(bands, one, shape[1:], backend), exact) <= max(2 * plain, floor)


# ---- Bands in memory of their own ------------------------------------------------------------------------------------


WITH_TRITON = parameters(OPERATOR, torch.float64, interpreted=True)


@pytest.mark.parametrize("backend", WITH_TRITON)
@pytest.mark.parametrize("mode", ["symmetric", "stationary"])
@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_bands_are_those_of_the_stacked_result(backend: str, mode: str, wavelet: str) -> None:
    one = level(wavelet, mode)
    for shape in ((2, 12, 34), (1, 2, 2), (0, 4, 6)):
        x = random(*shape)
        bands = _bands_of(x, one, backend)
        assert torch.equal(torch.stack(bands, 1), _analysis(x, one, backend))
        if backend != "reference":
            assert all(band.untyped_storage().nbytes() == band.numel() * band.element_size() for band in bands)


@pytest.mark.parametrize("backend", [parameter("cpu")])
def test_big_bands_on_the_cpu_share_memory(backend: str) -> None:
    x, one = random(1, 2048, 4096, dtype=torch.float32), level("haar", "stationary")
    bands = _bands_of(x, one, "cpu")
    assert len({band.untyped_storage().data_ptr() for band in bands}) == 1
    for band, own in zip(bands, torch.ops.pansharp_fast.wavelet_bands_fwd(x, *one), strict=True):
        assert torch.equal(band, own)


@pytest.mark.parametrize("backend", WITH_TRITON)
def test_gradient_of_some_of_the_bands(backend: str) -> None:
    x = random(2, 9, 14, dtype=torch.float64).requires_grad_()
    a, (_, v, _) = dwt2(x, "db2", "symmetric", backend=backend)
    (own,) = torch.autograd.grad((a.sin() + 3 * v).sum(), x)
    y = dwt2(x, "db2", "symmetric", stack=True, backend="reference")
    (expected,) = torch.autograd.grad((y[:, 0].sin() + 3 * y[:, 2]).sum(), x)
    torch.testing.assert_close(own, expected)


# ---- torch.library and torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", ["symmetric", "stationary"])
def test_opcheck(backend: str, mode: str) -> None:
    suffix = "_triton" if backend == "triton" else ""
    one = level("db2", mode)
    x = random(2, 6, 8).requires_grad_()
    for name in ("wavelet_fwd", "wavelet_bands_fwd"):
        torch.library.opcheck(getattr(torch.ops.pansharp_fast, f"{name}{suffix}").default, (x, *one))
    bands = [b.detach().clone().requires_grad_() for b in _analysis(x, one, backend).unbind(1)]
    torch.library.opcheck(getattr(torch.ops.pansharp_fast, f"wavelet_bwd{suffix}").default, (*bands, *one, 6, 8))


@pytest.mark.parametrize("backend", [None, *KERNELS])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiles_as_one_graph(backend: str | None) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        coeffs = wavedec2(x, "db2", level=2, backend=backend)
        y = waverec2(coeffs, "db2", backend=backend)
        return y + iswt2(swt2(x, "haar", 1, backend=backend), "haar", backend=backend)

    x = random(2, 12, 14).requires_grad_()
    (expected,) = torch.autograd.grad(f(x).square().sum(), x)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


# ---- Modules ---------------------------------------------------------------------------------------------------------


def test_modules() -> None:
    x = random(2, 3, 16, 24)
    y = DWT2d("db2")(x)
    assert y.shape == (2, 3, 4, 9, 13)
    torch.testing.assert_close(IDWT2d("db2")(y), x)
    torch.testing.assert_close(IDWT2d("db2")(DWT2d("db2", level=2)(x)), x)
    s = SWT2d("db2")(x)
    assert s.shape == (2, 3, 4, 16, 24)
    torch.testing.assert_close(ISWT2d("db2")(s), x)
    for trim_approx in (False, True):
        torch.testing.assert_close(ISWT2d("db2", True)(SWT2d("db2", 2, trim_approx, True)(x)), x)
    assert "db2" in repr(torch.nn.Sequential(DWT2d("db2"), IDWT2d("db2"), SWT2d("db2"), ISWT2d("db2")))


# ---- Errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: dwt2(X.numpy(), "haar"), TypeError, "data: expected a tensor, got ndarray"),
        (lambda: dwt2(X.long(), "haar"), TypeError, "data: expected a floating point dtype, got torch.int64"),
        (lambda: dwt2(X[0], "haar"), ValueError, "data: expected .* got 1 dimensions"),
        (lambda: dwt2(X, "haaar"), ValueError, "wavelet: expected a name .* got 'haaar'"),
        (lambda: dwt2(X, "morl"), ValueError, "wavelet: expected a name .* got 'morl'"),
        (lambda: dwt2(X, 3), TypeError, "wavelet: expected a name or a pywt.Wavelet, got int"),
        (lambda: dwt2(X, "haar", "mirror"), ValueError, "mode: expected one of .* got 'mirror'"),
        (lambda: dwt2(X, "haar", 9), ValueError, "mode: expected one of .* or of pywt.Modes, got 9"),
        (lambda: dwt2(X, "haar", None), ValueError, "mode: expected one of .* got None"),
        (lambda: dwt2(X, "haar", "stationary"), ValueError, "mode: expected one of .* got 'stationary'"),
        (lambda: dwt2(X, "haar", axes=(0, 0)), ValueError, "axes: expected two different axes"),
        (lambda: dwt2(X, "haar", axes=(0, 2)), ValueError, "axes: expected two axes of a 2-dimensional"),
        (lambda: dwt2(X, "haar", axes=(1, 0), stack=True), ValueError, "axes: expected .* with stack=True"),
        (lambda: dwt2(X[:1], "haar", "reflect"), ValueError, "data: expected at least 2 samples"),
        (lambda: dwt2(X[:0], "haar"), ValueError, "data: expected at least 1 samples"),
        (lambda: idwt2(X, "haar"), ValueError, r"coeffs: expected \[..., 4, H, W\], got shape"),
        (lambda: idwt2((X, (X, X)), "haar"), ValueError, "coeffs: expected three details"),
        (lambda: idwt2((X, (X, X, X[:2])), "haar"), ValueError, "coeffs: expected bands of one shape and dtype"),
        (lambda: idwt2((None, (None, None, None)), "haar"), ValueError, "coeffs: expected at least one band"),
        (lambda: idwt2((X, (X, X, X)), "dmey"), ValueError, "coeffs: expected at least 31 coefficients"),
        (lambda: wavedec2(X, "haar", level=-1), ValueError, "level: expected at least 0, got -1"),
        (lambda: waverec2([], "haar"), ValueError, "coeffs: expected"),
        (lambda: swt2(X, "haar", 2), ValueError, "data: expected multiples of 4 along both axes"),
        (lambda: swt2(X, "haar", -1), ValueError, "level, start_level: expected at least 0"),
        (lambda: iswt2([], "haar"), ValueError, "coeffs: expected a list of levels"),
    ],
)
def test_errors(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_unavailable_backend_says_why() -> None:
    with pytest.raises(BackendError, match="wavelet: argument backend asked for 'cuda'"):
        dwt2(X, "haar", backend="cuda")
    assert "wavelet cpu: available" in explain("wavelet", X, mode="smooth")
