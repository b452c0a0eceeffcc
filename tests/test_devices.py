"""Networks, whole sharpening and measures on each device against what the CPU's reference operators give."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

import pansharp_fast
from pansharp_fast import classical, metrics
from pansharp_fast.models import FSAConfig, FSAStudent, PANCrafter, Universal, UniversalConfig, preset
from pansharp_fast.models.universal import scene_statistics
from pansharp_fast.nn import CM3A
from pansharp_fast.ops import use_backend
from tests.support.accuracy import error
from tests.support.backends import DEVICES

devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Convolutions of float32 in float32: cuDNN may take TF32 by default."""
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = usual


def filled(model: nn.Module) -> nn.Module:
    """`model` without the zeros that fresh networks end in."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def crafter() -> nn.Module:
    return filled(PANCrafter(preset("tiny", bands=4)))


def pair(side: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth scenes, PAN the mean of the bands."""
    truth = nn.functional.interpolate(torch.rand(1, 4, side // 8, side // 8), (side, side), mode="bicubic")
    truth = (200 + 1500 * truth + 50 * torch.rand(1, 1, side, side)).round()
    return truth.mean(1, keepdim=True), nn.functional.avg_pool2d(truth, 4)


def arguments() -> list[torch.Tensor]:
    return [torch.randn(2, 1, 32, 48), torch.randn(2, 1, 8, 12), torch.randn(2, 4, 8, 12), torch.tensor([1.0, 0.0])]


def result_and_gradients(model: nn.Module, given: list[torch.Tensor]) -> list[torch.Tensor]:
    out = model(*given)
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return [out, *torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)]


@devices
@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-4), ("bfloat16", 0.03)])
def test_pancrafter_and_its_gradients(device: str, precision: str, most: float) -> None:
    model, given = crafter(), arguments()
    with use_backend("reference"):
        exact = result_and_gradients(copy.deepcopy(model).double(), [each.double() for each in given])
    on = torch.device(device)
    with torch.autocast(on.type, torch.bfloat16, enabled=precision == "bfloat16"):
        actual = result_and_gradients(model.to(on), [each.to(on) for each in given])
    assert actual[0].device.type == device
    found = [(got, want) for got, want in zip(actual, exact, strict=True) if want is not None]
    flat = [torch.cat([each[part].detach().cpu().double().flatten() for each in found[1:]]) for part in (0, 1)]
    assert error(*found[0]) < most
    assert error(flat[0], flat[1]) < most


@devices
def test_compiled_attention(device: str) -> None:
    layer = CM3A(16, 2, pan_channel=4, ms_channel=4, pan_ks=1, ms_ks=1).to(device)
    given = [torch.randn(2, channels, 16, 24, device=device) for channels in (16, 4, 4, 4)]
    mode = torch.tensor([1.0, 0.0], device=device)

    def step(function: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        leaves = [each.detach().requires_grad_() for each in given]
        outputs = function(*leaves, mode)
        return [*outputs, *torch.autograd.grad([each.square().sum() for each in outputs], leaves)]

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for got, want in zip(step(compiled), step(layer), strict=True):
        assert error(got, want) < 1e-4


@devices
@pytest.mark.parametrize("method", [None, "brovey", "mtf-glp-hpm-r"])
def test_classical_sharpening(device: str, method: str | None) -> None:
    pan, ms = pair()
    expected = pansharp_fast.sharpen(pan.numpy(), ms.numpy(), method=method)
    actual = pansharp_fast.sharpen(pan.to(device), ms.to(device), method=method)
    assert actual.device.type == device
    np.testing.assert_array_equal(actual.cpu().numpy(), expected)


@devices
@pytest.mark.parametrize("kind", ["pancrafter", "universal", "uknow-student"])
def test_sharpening_by_networks(device: str, kind: str) -> None:
    options = {}
    if kind == "uknow-student":
        pytest.importorskip("diffusers")
        from pansharp_fast.diffusion import Sampling

        options = {"sampling": Sampling(steps=3, seed=1)}
    make = {
        "pancrafter": crafter,
        "universal": lambda: filled(Universal(UniversalConfig(band_width=8, trunk_width=16))),
        "uknow-student": lambda: filled(FSAStudent(FSAConfig.preset("tiny", bands=4, teacher=False))),
    }
    model, (pan, ms) = make[kind](), pair()
    shift = pansharp_fast.Registration.given((0.5, -0.25), 4)
    with use_backend("reference"):
        expected = pansharp_fast.sharpen(
            pan.numpy(), ms.numpy(), weights=copy.deepcopy(model), device="cpu", register=shift, **options
        )
    actual = pansharp_fast.sharpen(pan.to(device), ms.to(device), weights=model, register=shift, **options)
    assert actual.device.type == device
    assert error(actual, torch.from_numpy(expected)) < 1e-4


@devices
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shipped_weights(device: str, precision: str) -> None:
    pan, ms = pair()
    options = {"weights": "tiny", "register": "off"}
    expected = pansharp_fast.sharpen(pan, ms, device="cpu", **options)
    actual = pansharp_fast.sharpen(pan.numpy(), ms.numpy(), device=device, precision=precision, **options)
    assert error(torch.from_numpy(actual), expected) < (1e-4 if precision == "float32" else 1e-2)


def test_statistics_of_another_device() -> None:
    """A scene's are taken on the CPU, whatever the network's device is; "meta" stands for that here."""
    pan, ms = pair(64)
    options = {"gains": [0.3] * 4, "ratio": 4}
    statistics = scene_statistics(pan, ms, **options)
    model = Universal(UniversalConfig(band_width=8, trunk_width=16)).eval()
    out = model.to("meta").sharpen_registered(pan.to("meta"), ms.to("meta"), statistics=statistics, **options)
    assert out.shape == (1, 4, 64, 64)


@devices
def test_displaced_bands(device: str) -> None:
    pan, ms = pair(64)
    d = torch.tensor([[0.5, -0.25]] * 4, dtype=torch.float64)
    expected = classical.fuse("gsa", pan.double(), ms.double(), d=d)
    actual = classical.fuse("gsa", pan.double().to(device), ms.double().to(device), d=d.to(device))
    assert error(actual, expected) < 1e-9


@devices
def test_measures(device: str) -> None:
    pan, ms = pair()
    gt = nn.functional.interpolate(ms, scale_factor=4, mode="bilinear")
    fused = (gt + torch.randn_like(gt) * 20).to(device)
    for name in ("psnr", "sam", "ergas", "q", "q2n", "scc", "ssim"):
        measure = getattr(metrics, name)
        options = {"peak": 2047.0} if name in ("psnr", "ssim") else {}
        expected = measure(fused.cpu().numpy(), gt.numpy(), **options)
        np.testing.assert_allclose(measure(fused, gt.to(device), **options).cpu(), expected, rtol=1e-6)
    for name, given in (
        ("d_s", (fused, ms.to(device), pan.to(device))),
        ("laplacian_correlation", (fused, pan.to(device))),
    ):
        measure = getattr(metrics, name)
        expected = measure(*(each.cpu().numpy() for each in given))
        np.testing.assert_allclose(measure(*given).cpu(), expected, rtol=1e-6)
