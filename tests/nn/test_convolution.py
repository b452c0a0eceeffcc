"""The Winograd path of 3x3 convolutions: its values, and when it is taken."""

import pytest
import torch
from torch.nn import functional as F

from pansharp_fast import use_backend
from pansharp_fast.nn import Conv3x3


@pytest.fixture
def module():
    return Conv3x3(32, 48)


@pytest.fixture
def image():
    return torch.randn(1, 32, 97, 100)


def direct(module, x):
    return F.conv2d(x.double(), module.weight.double(), module.bias.double(), padding=1)


def test_values(module, image):
    with torch.no_grad():
        if not module._winograd(image):
            pytest.skip("this PyTorch has no NNPACK")
        expected = direct(module, image)
        assert (module(image) - expected).abs().max() <= 5e-5 * expected.abs().max()
        strided = image.contiguous(memory_format=torch.channels_last)
        assert (module(strided) - expected).abs().max() <= 5e-5 * expected.abs().max()


def test_direct_kernels_wherever_they_are_wanted(module, image):
    assert not module._winograd(image)  # gradients are recorded
    with torch.no_grad():
        assert not module._winograd(image[..., :40])
        assert not module._winograd(image.double())
        assert not Conv3x3(32, 16)._winograd(image)
        with use_backend("reference"):
            assert not module._winograd(image)
            torch.testing.assert_close(module(image), F.conv2d(image, module.weight, module.bias, padding=1))
        with torch.autocast("cpu", torch.bfloat16):
            assert not module._winograd(image)
        with torch.backends.nnpack.flags(enabled=False):
            assert not module._winograd(image)
