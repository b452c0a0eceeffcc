"""`universal` over whole pairs: any bands and ratio, tiles as the whole, from arrays."""

import pytest
import torch

import pansharp_fast
from pansharp_fast.data.observation import observe
from pansharp_fast.models import Universal, UniversalConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = Universal(UniversalConfig(band_width=8, trunk_width=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pair(bands, ratio, h, w):
    generator = torch.Generator().manual_seed(bands)
    noise = torch.rand(1, bands + 1, h * ratio, w * ratio, generator=generator, dtype=torch.float64)
    truth = 200 + 300 * (0.5 * noise[:, :1] + noise[:, 1:]) / 1.5
    ms = observe(truth, (h, w), gains=[0.3] * bands, ratio=ratio)
    return truth.mean(1, keepdim=True).float(), ms.float()


@pytest.mark.parametrize(("bands", "ratio"), [(1, 4), (3, 2), (5, 3), (8, 4), (4, 8)])
def test_any_bands_and_ratio(model, bands, ratio):
    pan, ms = pair(bands, ratio, 24, 20)
    out = pansharp_fast.sharpen(pan, ms, weights=model, register="off")
    assert out.shape == (1, bands, 24 * ratio, 20 * ratio)
    assert torch.isfinite(out).all()


def test_tiles_give_what_the_whole_gives(model):
    pan, ms = pair(3, 4, 96, 80)
    whole, tiled = (pansharp_fast.sharpen(pan, ms, weights=model, register="off", tile=t) for t in (None, 256))
    # Far tails of interpolation, which the overlap leaves out, hold some millionths of the contrast.
    assert (whole - tiled).abs().max() < 1e-4 * whole.std()


def test_what_the_weights_do_not_take_is_refused(model):
    pan, ms = pair(1, 9, 12, 12)
    with pytest.raises(ValueError, match=r"ratio: expected MS pixels 1\.9 to 8\.1 times"):
        pansharp_fast.sharpen(pan, ms, weights=model, register="off")
    pan, ms = pair(17, 2, 12, 12)
    with pytest.raises(ValueError, match="MS: expected up to 16 bands"):
        pansharp_fast.sharpen(pan, ms, weights=model, register="off")
