"""The CUDA kernels of the wavelet transforms, run by the CPU shim, against the float64 reference."""

import pytest
import torch

from pansharp_fast.ops.wavelet import MODES, Level, _analysis, _filters, _synthesis
from tests import simt
from tests.simt import ORDERS

FAULTS = [
    (f"  __syncthreads();\n\n{after}", f"  if (!FAULT) __syncthreads();\n\n{after}", 0)
    for after in ("  // Eight rows", "  const int c0")
]
SOUND = simt.Library("csrc/cuda/wavelet.cu", ("wavelet_fwd", "wavelet_bands_fwd", "wavelet_bwd"))
FAULTY = simt.Library(SOUND.source, SOUND.names, tuple(FAULTS), "-O0")


@pytest.fixture(scope="module")
def ops():
    return SOUND.ops


def level(wavelet, mode, dilation=1, second=None):
    index = MODES.index(mode)
    return Level(_filters(wavelet, "dec"), _filters(second or wavelet, "dec"), index, index, dilation)


def agrees(ops, one, shape, dtype=torch.float64, bound=1e-10):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = _analysis(x.double(), one, "reference")
    actual = ops.wavelet_fwd(x, *one)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound * float(expected.abs().max()))
    for band, own in zip(actual.unbind(1), ops.wavelet_bands_fwd(x, *one), strict=True):
        assert torch.equal(own, band)
    bands = expected.to(dtype).unbind(1)
    expected = _synthesis([b.double() for b in bands], one, shape[1:], "reference")
    actual = ops.wavelet_bwd(*bands, *one, *shape[1:])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("wavelet", "second"), [("haar", "haar"), ("db2", "db2"), ("db4", "db4"), ("db3", "bior1.3")])
def test_every_mode(ops, mode, wavelet, second):
    for shape in ((1, 5, 8), (2, 19, 35), (1, 2, 3)):
        agrees(ops, level(wavelet, mode, second=second), shape)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["db2", "db3", "db4", "bior4.4"])
def test_tiles_away_from_the_border(ops, mode, wavelet):
    agrees(ops, level(wavelet, mode), (1, 75, 966))


@pytest.mark.parametrize("modes", [("zero", "smooth"), ("antireflect", "zero"), ("periodization", "symmetric")])
@pytest.mark.parametrize("wavelet", ["haar", "db3", "db4"])
def test_a_mode_for_each_axis(ops, modes, wavelet):
    one = level(wavelet, modes[0])._replace(mode_x=MODES.index(modes[1]))
    for shape in ((2, 19, 35), (1, 75, 966)):
        agrees(ops, one, shape)


@pytest.mark.parametrize("mode", ["zero", "symmetric", "periodization", "smooth", "antireflect", "stationary"])
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


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-10), (torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("dilation", [1, 2, 3, 4, 8, 16])
def test_packs_of_the_stationary_haar_transform(ops, dilation, dtype, bound):
    """Partners in the same pack, the next one or one of their own; rows of several to a block and of several blocks."""
    one = level("haar", "stationary", dilation)
    for shape in ((2, dilation, 16 * dilation), (1, 2 * dilation, dilation), (1, 3 * dilation, 240 * dilation)):
        agrees(ops, one, shape, dtype, bound)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_long_rows_of_the_haar_transform(ops, dtype, bound):
    for shape in ((2, 4, 2200), (1, 6, 1058), (3, 2, 24)):
        agrees(ops, level("haar", "zero"), shape, dtype, bound)


@pytest.mark.parametrize(("wavelet", "mode"), [("haar", "symmetric"), ("haar", "stationary"), ("db2", "symmetric")])
def test_strides_and_empty_batch(ops, wavelet, mode):
    one = level(wavelet, mode)
    base = torch.randn(2, 14, 17, dtype=torch.float64)
    for x in (base[:, 1:13, 1:15], base.transpose(1, 2), base[..., ::2], base[:, :12, :16], base[:, :, 1:]):
        expected = _analysis(x, one, "reference")
        torch.testing.assert_close(ops.wavelet_fwd(x, *one), expected)
        wide = torch.cat([expected, expected], -1)
        for first in (0, 1, 2):
            bands = wide[..., first : first + expected.shape[-1]].unbind(1)
            back = _synthesis(bands, one, x.shape[1:], "reference")
            torch.testing.assert_close(ops.wavelet_bwd(*bands, *one, *x.shape[1:]), back)
    assert ops.wavelet_fwd(base[:0], *one).shape[0] == 0
    assert [band.shape[0] for band in ops.wavelet_bands_fwd(base[:0], *one)] == [0] * 4


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("wavelet", "mode"), [("db2", "symmetric"), ("db3", "antireflect"), ("haar", "stationary")])
def test_order_of_threads_does_not_matter(ops, monkeypatch, order, wavelet, mode):
    monkeypatch.setenv("SIMT_ORDER", order)
    agrees(ops, level(wavelet, mode), (1, 40, 200))


def test_index_arithmetic_beyond_32_bits(ops, tmp_path):
    """Planes and rows farther apart than 2^31 elements, in a sparse file of which few pages are ever touched."""
    rows, plane = 2**28 + 8, 2**32 + 16
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=plane + 9 * rows + 16, dtype=torch.float32)
    x = storage.as_strided((2, 10, 12), (plane, rows, 1))
    x.copy_(torch.randn(2, 10, 12))
    for wavelet, mode in (("db2", "symmetric"), ("haar", "zero"), ("haar", "stationary")):
        one = level(wavelet, mode)
        torch.testing.assert_close(ops.wavelet_fwd(x, *one), _analysis(x.contiguous(), one, "reference"))


@pytest.mark.parametrize("which", range(len(FAULTS)))
def test_planted_fault_is_noticed(monkeypatch, which):
    for order in ("forward", "shuffle"):  # threads read to their right: what "reverse" has run already
        monkeypatch.setenv("SIMT_ORDER", order)
        monkeypatch.setenv("SIMT_FAULT", "")
        agrees(FAULTY.ops, level("db2", "symmetric"), (1, 9, 40))
        monkeypatch.setenv("SIMT_FAULT", str(which))
        with pytest.raises(AssertionError):
            agrees(FAULTY.ops, level("db2", "symmetric"), (1, 9, 40))
