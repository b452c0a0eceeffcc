"""Banded matrices along both axes: laws beyond what the samples show, and what the operator refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast.ops import BackendError, explain, resample
from pansharp_fast.ops._backends import unavailable

pytestmark = pytest.mark.skipif(unavailable("cpu") is not None, reason="the package was not compiled")


def banded(images, bands, count, length, taps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, length - taps + 1, (images, bands, count), generator=generator)
    return first, torch.randn(images, bands, count, taps, generator=generator, dtype=torch.float64)


@pytest.mark.values
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size(data):
    batch, bands, height, width = (data.draw(st.integers(1, most)) for most in (2, 3, 70, 70))
    rows, columns = (
        banded(
            data.draw(st.sampled_from((1, batch))),
            data.draw(st.sampled_from((1, bands))),
            data.draw(st.integers(1, 140)),
            length,
            data.draw(st.integers(1, min(length, 30))),
        )
        for length in (height, width)
    )
    x = torch.randn(batch, bands, height, width, dtype=torch.float64)
    exact = resample(x, rows, columns, backend="reference")
    torch.testing.assert_close(resample(x, rows, columns, backend="cpu"), exact, rtol=1e-10, atol=1e-10)
    single = resample(x.float(), rows, columns, backend="cpu").double()
    assert float((single - exact).norm()) <= 2e-6 * float(exact.norm()) + 1e-6


def test_results_do_not_depend_on_threads_or_on_the_batch():
    x = torch.randn(3, 2, 150, 90)
    rows, columns = banded(1, 2, 133, 150, 18), banded(1, 1, 60, 90, 22)
    expected = resample(x, rows, columns, backend="cpu")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(resample(x, rows, columns, backend="cpu"), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(resample(x[1:2], rows, columns, backend="cpu"), expected[1:2])


@pytest.mark.values
def test_void_stays_where_the_taps_see_it():
    x = torch.randn(1, 1, 40, 40)
    x[..., 20, 20] = float("nan")
    first = torch.arange(36).view(1, 1, -1)
    weight = torch.full((1, 1, 36, 5), 0.2)
    y = resample(x, (first, weight), (first, weight), backend="cpu")
    assert torch.equal(y.isnan()[0, 0].nonzero().aminmax(dim=0)[0], torch.tensor([16, 16]))
    assert int(y.isnan().sum()) == 25


def test_derivatives_come_from_the_reference():
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True)
    rows, columns = banded(1, 2, 5, 9, 4), banded(1, 1, 6, 8, 3)
    assert "gradients" in explain("resample", x).split("cpu: ")[1]
    with pytest.raises(BackendError, match="gradients"):
        resample(x, rows, columns, backend="cpu")
    assert torch.autograd.gradcheck(lambda x: resample(x, rows, columns), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(3, 9, 8)}, r"x: expected \[B, C, H, W\]"),
        ({"x": torch.ones(2, 3, 9, 8, dtype=torch.int64)}, "x: expected"),
        ({"rows": banded(2, 2, 5, 9, 4)}, "rows: expected matrices for 1 or 2 images and 1 or 3 bands"),
        ({"columns": (torch.zeros(1, 1, 5), torch.ones(1, 1, 5, 2))}, "columns: expected first pixels"),
        ({"columns": (torch.zeros(1, 1, 4).long(), torch.ones(1, 1, 5, 2))}, "columns: expected first pixels"),
        ({"columns": (torch.zeros(1, 1, 5).long(), torch.ones(1, 1, 5, 9))}, "columns: expected 1 to 8 taps, got 9"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.randn(2, 3, 9, 8), "rows": banded(1, 3, 5, 9, 4), "columns": banded(2, 1, 6, 8, 3)}
    with pytest.raises(ValueError, match=message):
        resample(**arguments | change)


@pytest.mark.parametrize("place", [-1, 6])
def test_the_kernel_reads_nothing_outside(place):
    columns = (torch.tensor([[[0, place, 5]]]), torch.ones(1, 1, 3, 3))
    with pytest.raises(RuntimeError, match=f"columns: expected 3 pixels within 8, got such from {place}"):
        resample(torch.randn(1, 1, 9, 8), banded(1, 1, 5, 9, 4), columns, backend="cpu")
