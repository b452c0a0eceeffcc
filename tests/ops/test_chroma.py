"""Colours held within those near: what the operator promises, and what it refuses."""

import pytest
import torch

from pansharp_fast.ops import BackendError, hold_chroma
from pansharp_fast.ops._backends import unavailable
from tests.support.backends import parameter

both = pytest.mark.parametrize("backend", [parameter("cpu"), "reference"])


@both
def test_colours_that_were_there_or_near_stay(backend):
    near, start = torch.rand(1, 3, 20, 33), torch.rand(1, 3, 20, 33)
    moved = near.roll((2, -3), (2, 3))
    inner = (slice(None), slice(None), slice(2, None), slice(None, -3))
    for x in (near, start, moved):
        held = hold_chroma(x, start, near, (2, 3), backend=backend)
        torch.testing.assert_close(held[inner], x[inner])


@both
def test_new_colours_are_held_and_brightness_is_free(backend):
    near = torch.full((1, 2, 9, 9), 100.0)
    near[:, 1] = 110
    near[0, 1, 4, 4] = 130  # near is what lies up to two rows and three columns off
    allowed = torch.full((9, 9), 10.0)
    allowed[2:7, 1:8] = 30
    x = near.new_tensor([150, 200]).view(1, 2, 1, 1).expand(1, 2, 9, 9)
    held = hold_chroma(x, near, near, (2, 3), backend=backend)
    torch.testing.assert_close(held[0, 1] - held[0, 0], allowed)
    torch.testing.assert_close(held.mean(1), x.mean(1))


@pytest.mark.values
@pytest.mark.skipif(unavailable("cpu") is not None, reason="the package was not compiled")
def test_kernel_and_reference_hold_alike():
    """To the bit: nothing but the mean of bands rounds."""
    for size, reach in (((1, 2, 70, 133), (4, 4)), ((2, 4, 33, 48), (9, 2)), ((1, 2, 1, 1), (1, 1))):
        images = [torch.randn(size) for _ in range(3)]
        ours, theirs = (hold_chroma(*images, reach, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(unavailable("cpu") is not None, reason="the package was not compiled")
def test_derivatives_come_from_the_reference():
    images = [torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    with pytest.raises(BackendError, match="gradients"):
        hold_chroma(*images, (1, 2), backend="cpu")
    assert torch.autograd.gradcheck(lambda *images: hold_chroma(*images, (1, 2)), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9, 8)}, r"x: expected \[B, C, H, W\]"),
        ({"x": torch.zeros(2, 0, 9, 8)}, "x: expected"),
        ({"start": torch.zeros(2, 3, 9, 7)}, r"start: expected \(2, 3, 9, 8\)"),
        ({"near": torch.zeros(2, 3, 9, 8).double()}, r"near: expected .*float32.*, got .*float64"),
        ({"reach": (1, -1)}, "reach: expected 0 or more rows and columns"),
    ],
)
def test_errors(change, message):
    image = torch.zeros(2, 3, 9, 8)
    with pytest.raises(ValueError, match=message):
        hold_chroma(**{"x": image, "start": image, "near": image, "reach": (1, 1)} | change)
