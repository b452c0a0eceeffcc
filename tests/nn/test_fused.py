"""Inference on the CPU in joined operators and in strips: the values of the plain modules, and nothing else touched."""

import pytest
import torch

from pansharp_fast import use_backend
from pansharp_fast.models import FSAConfig, FSAStudent, FSATeacher
from pansharp_fast.nn import FrequencyAttention, WaveletAttention, fused

CL = torch.channels_last


def assert_near(actual, expected, tolerance=2e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=[1 << 24, 1 << 11], ids=["whole", "strips"])
def strip_bytes(request, monkeypatch):
    monkeypatch.setattr(fused, "_STRIP_BYTES", request.param)
    return request.param


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("height", [1, 5, 8, 31])
def test_strips_cover_every_row_once(strip_bytes, height):
    x = torch.zeros(2, 3, height, 6)
    for image, rows in fused.strips(x, 16):
        assert image.stop - image.start == 1
        assert rows.stop <= height
        x[image, :, rows] += 1
    assert (x == 1).all()


@pytest.mark.parametrize("size", [(33, 12), (4, 7), (1, 1)])
def test_feed_forward(strip_bytes, size):
    x = torch.randn(2, 8, *size).contiguous(memory_format=CL)
    first, second, bias = torch.randn(16, 8, 3, 3) * 0.1, torch.randn(8, 16, 3, 3) * 0.1, torch.randn(8)
    hidden = torch.nn.functional.silu(torch.nn.functional.conv2d(x.double(), first.double(), padding=1))
    expected = x + torch.nn.functional.conv2d(hidden, second.double(), bias.double(), padding=1)
    assert_near(fused.conv_silu_conv(x, first, second, bias), expected)


@pytest.mark.parametrize("out", [16, 24])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
@pytest.mark.parametrize("kind", ["frequency", "qk", "kv"])
def test_attention_blocks(strip_bytes, kind, layout, out):
    x = torch.randn(2, 16, 21, 14).contiguous(memory_format=layout)
    if kind == "frequency":
        # Rounding may move a phase over the cut; a smooth map has few that are near it.
        block, inputs = FrequencyAttention(16, 16, out, nheads=4), (x.cumsum(2) / 21,)
    else:
        block, inputs = WaveletAttention(7, 16, 16, out, kind, nheads=4), (x, torch.randn(2, 7, 21, 14))
    block.eval()
    with use_backend("reference"):
        expected = block(*inputs)
    before = [each.clone() for each in inputs]
    assert_near(block(*inputs), expected, 1e-3 if kind == "frequency" else 2e-5)
    for each, old in zip(inputs, before, strict=True):
        assert torch.equal(each, old)
    assert_near(block(*inputs, overwrite=True), expected, 1e-3 if kind == "frequency" else 2e-5)


@pytest.mark.parametrize("kind", ["qk", "kv"])
def test_prepared_once_and_by_either_way(strip_bytes, kind):
    block = WaveletAttention(7, 16, 16, 16, kind, nheads=4).eval()
    x, wavelets = torch.randn(2, 16, 9, 14), torch.randn(2, 7, 9, 14)
    with use_backend("reference"):
        prepared = block.prepare(wavelets)
        expected = block(x, wavelets)
        assert_near(block.attend(x, prepared), expected)
    assert_near(block.attend(x, prepared), expected)
    own = block.prepare(wavelets)
    assert_near(block.attend(x, own), expected)
    if kind == "kv":  # in the layout that every step takes, so that none copies
        assert all(each.is_contiguous(memory_format=CL) for each in own)
    with use_backend("reference"):
        assert_near(block.attend(x, own), expected)
    if kind == "kv":  # in the layout that every step takes, so that none copies
        assert all(each.is_contiguous(memory_format=CL) for each in own)


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_networks(strip_bytes, cls):
    config = FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher)
    model = cls(FSAConfig(**{**config.to_dict(), "inner_channel": 24})).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    lms, pan = torch.rand(2, 4, 64, 72), torch.rand(2, 1, 64, 72)
    x, time = torch.randn_like(lms), torch.tensor([3, 400])
    cond = model.condition(lms, pan)
    with use_backend("reference"):
        expected = model(x, time, cond)
    kept = x.clone()
    for given in (cond, model.prepare(cond)):
        result = model(x, time, given)
        for actual, wanted in zip(result[:2], expected[:2], strict=True):
            if wanted is not None:
                assert (actual - wanted).norm() <= (3e-2 if cls is FSATeacher else 1e-4) * wanted.norm()
    assert torch.equal(x, kept)


def test_only_where_nothing_else_is_wanted():
    block, x = torch.nn.Conv2d(1, 1, 1).eval(), torch.randn(1, 1, 8, 8)
    assert fused.fused(block, x)
    assert not fused.fused(block, x.double())
    assert not fused.fused(block.train(), x)
    block.eval()
    with torch.enable_grad():
        assert not fused.fused(block, x)
    with use_backend("reference"):
        assert not fused.fused(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.fused(block, x)
