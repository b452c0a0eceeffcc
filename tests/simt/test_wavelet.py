"""The CUDA kernels of the wavelet transforms, run by the CPU shim, against the float64 reference."""

import pytest
import torch

from pansharp_fast.ops.wavelet import MODES, Level, _analysis, _filters, _synthesis
from tests import simt

SOURCE = "csrc/cuda/wavelet.cu"
NAMES = ("wavelet_fwd", "wavelet_bwd")
ORDERS = ("forward", "reverse", "shuffle")


@pytest.fixture(scope="module")
def ops():
    return simt.load(SOURCE, NAMES)


def level(wavelet, mode, dilation=1, second=None):
    index = MODES.index(mode)
    return Level(_filters(wavelet, "dec"), _filters(second or wavelet, "dec"), index, index, dilation)


def agrees(ops, one, shape, dtype=torch.float64, bound=1e-10):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = _analysis(x.double(), one, "reference")
    actual = ops.wavelet_fwd(x, *one)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound * float(expected.abs().max()))
    bands = expected.to(dtype).unbind(1)
    expected = _synthesis([b.double() for b in bands], one, shape[1:], "reference")
    actual = ops.wavelet_bwd(*bands, *one, *shape[1:])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("wavelet", "second"), [("haar", "haar"), ("db2", "db2"), ("db4", "db4"), ("db3", "bior1.3")])
def test_every_mode(ops, mode, wavelet, second):
    for shape in ((1, 5, 8), (2, 19, 35), (1, 2, 3)):
        agrees(ops, level(wavelet, mode, second=second), shape)


@pytest.mark.parametrize("mode", ["zero", "symmetric", "periodization", "stationary"])
@pytest.mark.parametrize("wavelet", ["dmey", "coif17"])
def test_long_filters(ops, mode, wavelet):
    agrees(ops, level(wavelet, mode), (1, 6, 10))


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_dilation(ops, wavelet):
    agrees(ops, level(wavelet, "stationary", 4), (2, 8, 40))
    with pytest.raises(RuntimeError, match="size: expected a multiple of the dilation 4, got 6"):
        ops.wavelet_fwd(torch.zeros(1, 6, 8), *level(wavelet, "stationary", 4))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("wavelet", "mode"), [("haar", "zero"), ("haar", "stationary"), ("db4", "reflect")])
def test_dtypes(ops, wavelet, mode, dtype, bound):
    agrees(ops, level(wavelet, mode), (1, 6, 16), dtype, bound)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_strides_and_empty_batch(ops, wavelet):
    one = level(wavelet, "symmetric")
    base = torch.randn(2, 14, 17, dtype=torch.float64)
    for x in (base[:, 1:13, 1:15], base.transpose(1, 2), base[..., ::2], base[:, :12, :16]):
        expected = _analysis(x, one, "reference")
        torch.testing.assert_close(ops.wavelet_fwd(x, *one), expected)
    assert ops.wavelet_fwd(base[:0], *one).shape[0] == 0


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_threads_does_not_matter(ops, monkeypatch, order):
    monkeypatch.setenv("SIMT_ORDER", order)
    agrees(ops, level("db2", "symmetric"), (1, 9, 40))


def test_index_arithmetic_beyond_32_bits(ops, tmp_path):
    """Planes and rows farther apart than 2^31 elements, in a sparse file of which few pages are ever touched."""
    rows, plane = 2**28 + 8, 2**32 + 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=plane + 9 * rows + 16, dtype=torch.float32)
    x = storage.as_strided((2, 10, 12), (plane, rows, 1))
    x.copy_(torch.randn(2, 10, 12))
    for wavelet, mode in (("db2", "symmetric"), ("haar", "zero"), ("haar", "stationary")):
        one = level(wavelet, mode)
        torch.testing.assert_close(ops.wavelet_fwd(x, *one), _analysis(x.contiguous(), one, "reference"))


def test_planted_fault_is_noticed():
    edit = ("  __syncthreads();\n\n  const int64_t width = s.x.count", "  const int64_t width = s.x.count", 0)
    faulty = simt.load(SOURCE, NAMES, edit)
    with pytest.raises(AssertionError):
        agrees(faulty, level("db2", "symmetric"), (1, 9, 40))
