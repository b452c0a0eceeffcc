"""`pansharp_fast.sharpen` on arrays and tensors."""

import numpy as np
import pytest
import torch

import pansharp_fast
from pansharp_fast.models import PANCrafter, load_model, preset, save_model

from .local_model import LocalModel

UNMOVED = {"register": "off"}


def pair(h: int = 20, w: int = 30, bands: int = 4, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return (
        rng.integers(100, 1500, (batch, 1, 4 * h, 4 * w), dtype=np.uint16),
        rng.integers(100, 1500, (batch, bands, h, w), dtype=np.uint16),
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64", ">u2"])
def test_numpy_in_numpy_out(dtype):
    pan, ms = (array % 200 for array in pair(batch=2))
    out = pansharp_fast.sharpen(pan.astype(dtype), ms.astype(dtype), weights=LocalModel(), **UNMOVED)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.dtype(dtype).newbyteorder("=")
    assert out.shape == (2, 4, 80, 120)
    exact = LocalModel().sharpen(torch.from_numpy(pan).float(), torch.from_numpy(ms).float(), 2047).numpy()
    if np.dtype(dtype).kind == "f":
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-3)
    else:
        limits = np.iinfo(dtype)
        np.testing.assert_allclose(out, exact.round().clip(limits.min, limits.max), atol=1)
        assert out.min() == max(limits.min, exact.min().round())


def test_tensor_in_tensor_out():
    pan, ms = (torch.from_numpy(array).float() for array in pair())
    out = pansharp_fast.sharpen(pan.requires_grad_(), ms, weights=LocalModel(), **UNMOVED, device="cpu")
    assert isinstance(out, torch.Tensor)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    torch.testing.assert_close(out, LocalModel().sharpen(pan.detach(), ms, 2047))


def test_tiles_equal_the_whole():
    pan, ms = (torch.from_numpy(array).float() for array in pair(65, 90, batch=2))
    model = LocalModel()
    whole = pansharp_fast.sharpen(pan, ms, weights=model, **UNMOVED, tile=512)
    assert len(model.calls) == len(ms)
    tiled = pansharp_fast.sharpen(pan, ms, weights=model, **UNMOVED, tile=128, overlap=32)
    assert len(model.calls) > 10
    assert max(shape[-1] for shape, _ in model.calls[len(ms) :]) == 128
    torch.testing.assert_close(tiled, whole, atol=1e-2, rtol=0)


def test_bf16_stays_close():
    pan, ms = (torch.from_numpy(array).float() for array in pair())
    exact = pansharp_fast.sharpen(pan, ms, weights=LocalModel(), **UNMOVED)
    rough = pansharp_fast.sharpen(pan, ms, weights=LocalModel(), **UNMOVED, precision="bf16")
    assert 0 < (exact - rough).abs().max() < 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pan": "wrong ratio"},
            ValueError,
            "ratio: expected MS pixels 4 times the size of PAN's, as the weights want, got 2 x 2",
        ),
        ({"ms": "3 bands"}, ValueError, "MS: expected 4 bands, as the weights have, got 3"),
        ({"pan": "nan"}, ValueError, "pan: expected finite values, got NaN or infinity"),
        ({"ms": "inf"}, ValueError, "ms: expected finite values, got NaN or infinity"),
        ({"pan": "complex"}, TypeError, "pan: expected integers or real numbers, got complex64"),
        ({"ms": "bool"}, TypeError, "ms: expected integers or real numbers, got bool"),
        ({"ms": "tensor"}, TypeError, "pan and ms: expected two NumPy arrays or two tensors, got ndarray and Tensor"),
        ({"peak": 0}, ValueError, "peak: expected a positive number, got 0"),
        ({"precision": "int4"}, ValueError, "precision: expected one of auto, float32, bfloat16, got 'int4'"),
        ({"device": "abacus"}, ValueError, "device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        ({"device": "cuda:99"}, ValueError, "device: expected one of the . visible CUDA devices, got 'cuda:99'"),
        ({"tile": 100}, ValueError, "tile: expected a positive multiple of 16, got 100"),
    ],
)
def test_bad_input(change, error, message):
    pan, ms = (array.astype(np.float32) for array in pair())
    options = {"weights": LocalModel(), "pan": pan, "ms": ms, **change}
    match change.get("pan") or change.get("ms"):
        case "wrong ratio":
            options["pan"] = pan[:, :, ::2, ::2]
        case "3 bands":
            options["ms"] = ms[:, :3]
        case "nan":
            options["pan"] = np.where(pan < 110, np.nan, pan)
        case "inf":
            options["ms"] = np.where(ms < 110, np.inf, ms)
        case "complex":
            options["pan"] = pan.astype(np.complex64)
        case "bool":
            options["ms"] = ms > 500
        case "tensor":
            options["ms"] = torch.from_numpy(ms)
    with pytest.raises(error, match=message):
        pansharp_fast.sharpen(options.pop("pan"), options.pop("ms"), **options)


@pytest.mark.parametrize("padding", range(0, 260, 8))
def test_weights_of_any_header_length_are_read(tmp_path, padding):
    """The first byte of a safetensors file is part of a length, and may look like the start of a pickled file."""
    model = PANCrafter(preset("tiny", hidden_sizes=(4, 4), depth=(1, 1), attention_scales=(), num_heads=1))
    save_model(tmp_path / "model.safetensors", model, {"note": "x" * padding})
    assert load_model(tmp_path / "model.safetensors").config == model.config
