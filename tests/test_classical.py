"""Laws that hold for every classical method, through `sharpen`."""

import numpy as np
import pytest
import torch

from pansharp_fast import classical, metrics, sharpen
from pansharp_fast.data.observation import observe

from .test_textbook import truth

METHODS = tuple(classical.METHODS)
#: Methods that bring PAN to MS's scale themselves.
EQUALISING = tuple(name for name in METHODS if name not in ("exp", "brovey"))
OPTIONS = {"register": "off"}


def pair(ratio: float = 4, size: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pan, ms, gt) float32; PAN is the mean of the bands, MS what a sensor would see."""
    gt = torch.from_numpy(truth(4, size))[None].float()
    small = round(size / ratio)
    return gt.mean(1, keepdim=True), observe(gt, (small, small), gains=[0.3] * 4, ratio=ratio), gt


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    """To a ten-thousandth of the values: the sums behind a result are float32's."""
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))


@pytest.mark.parametrize("register", ["off", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_bands(method, register):
    pan, ms, _ = pair()
    order = [2, 0, 3, 1]
    close(
        sharpen(pan, ms[:, order], method=method, register=register),
        sharpen(pan, ms, method=method, register=register)[:, order],
    )


@pytest.mark.parametrize("register", ["off", "auto"])
@pytest.mark.parametrize("method", METHODS)
def test_scale_of_both(method, register):
    pan, ms, _ = pair()
    for factor in (0.003, 17.0):
        close(
            sharpen(factor * pan, factor * ms, method=method, register=register),
            factor * sharpen(pan, ms, method=method, register=register),
        )


@pytest.mark.parametrize("method", EQUALISING)
def test_scale_and_offset_of_pan_alone(method):
    pan, ms, _ = pair()
    expected = sharpen(pan, ms, method=method, **OPTIONS)
    for other in (0.03 * pan, pan + 500, 5 * pan - 300):
        close(sharpen(other, ms, method=method, **OPTIONS), expected)


@pytest.mark.parametrize("method", EQUALISING)
def test_scale_of_ms_alone(method):
    pan, ms, _ = pair()
    close(sharpen(pan, 0.01 * ms, method=method, **OPTIONS), 0.01 * sharpen(pan, ms, method=method, **OPTIONS))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", ">u2", "float16", "float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method, dtype):
    """Integers are rounded and clipped, and nothing else depends on the type."""
    pan, ms = (np.rint(image.numpy() / 4).astype(dtype) for image in pair(size=48)[:2])
    result = sharpen(pan, ms, method=method, **OPTIONS)
    expected = sharpen(pan.astype("float32"), ms.astype("float32"), method=method, **OPTIONS)
    assert result.dtype == np.dtype(dtype).newbyteorder("=")
    if result.dtype.kind in "iu":
        limits = np.iinfo(dtype)
        expected = np.rint(expected).clip(limits.min, limits.max)
    np.testing.assert_array_equal(result, expected.astype(result.dtype))


@pytest.mark.parametrize("ratio", [1.5, 2, 3, 5, 6, 8])
def test_ratios(ratio):
    """At any ratio, by far better than interpolation where bands share PAN's detail."""
    pan, ms, gt = pair(ratio, 120)
    error = {
        method: float(metrics.ergas(sharpen(pan, ms, method=method, **OPTIONS), gt, ratio=ratio)) for method in METHODS
    }
    plain = error.pop("exp")
    assert max(error.values()) < 0.7 * plain, (error, plain)
