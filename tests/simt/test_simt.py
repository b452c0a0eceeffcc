"""The shim notices what it is there to notice."""

import pytest
import torch

from tests import simt
from tests.simt import ORDERS

SELFTEST = simt.Library("tests/simt/selftest.cu", ("selftest",), schema="(Tensor x, int kind) -> Tensor")


@pytest.fixture(scope="module")
def selftest():
    return SELFTEST.ops.selftest


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [0, 4])
def test_right_kernels_agree(selftest, monkeypatch, order, kind):
    monkeypatch.setenv("SIMT_ORDER", order)
    x = torch.randn(3, 64)
    torch.testing.assert_close(selftest(x, kind), x.sum(1))


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_changes_the_result(selftest, monkeypatch, order):
    monkeypatch.setenv("SIMT_ORDER", order)
    x = torch.randn(3, 64)
    wrong = selftest(x, 1)
    if order == "reverse":  # the tree reads upwards: this order happens to hide the fault, which is why there are three
        return
    assert not torch.allclose(wrong, x.sum(1))


def test_write_beyond_a_shared_array_is_an_error(selftest):
    with pytest.raises(RuntimeError, match="beyond a shared array"):
        selftest(torch.randn(1, 64), 2)


def test_divergent_barrier_is_an_error(selftest):
    with pytest.raises(RuntimeError, match=r"deadlock|not reached"):
        selftest(torch.randn(1, 64), 3)


@pytest.mark.parametrize("order", ORDERS)
def test_tile_product(selftest, monkeypatch, order):
    monkeypatch.setenv("SIMT_ORDER", order)
    x = torch.randn(24, 8)
    tf32 = (x.view(torch.int32) & -(1 << 13)).view(torch.float32).double()
    expected = tf32[:16] @ tf32[16:].T
    actual = selftest(x, 5).view(16, 8).double()
    torch.testing.assert_close(actual, expected, rtol=2**-23, atol=0)
    assert (actual.abs() <= expected.abs()).all()  # sums are truncated
    assert not torch.allclose(actual, x[:16].double() @ x[16:].double().T, rtol=1e-5)
