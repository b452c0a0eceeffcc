"""Classical methods: GDAL's own Brovey, exact recovery where theory promises it, degenerate inputs."""

import pytest
import torch

from pansharp_fast import metrics
from pansharp_fast.baselines import BASELINES, brovey, bt_h, exp, gsa, mtf_glp_hpm
from pansharp_fast.data import degrade, interp23, mtf_filter


@pytest.fixture
def pair():
    """(pan, ms, gt) whose PAN is a fixed mixture of smooth bands: detail is shared, so every method can find it."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    detail = 1 + 0.3 * torch.sin(x / 2.1 + y / 7) * torch.cos(y / 2.7)
    bands = [(500 + 80 * torch.sin(x / (19 + 3 * b) + y / 31 + b)) * detail + 40 * b for b in range(4)]
    gt = torch.stack(bands)[None].double()
    pan = (gt * torch.tensor([0.1, 0.4, 0.3, 0.2]).view(1, 4, 1, 1)).sum(1, keepdim=True)
    return pan, degrade(gt, pan, "QB")[0], gt


@pytest.mark.parametrize("name", BASELINES)
def test_shape_dtype_and_batch(pair, name):
    pan, ms, _ = (image.float() for image in pair)
    batch = BASELINES[name](torch.cat([pan, pan.flip(-1) * 0.7]), torch.cat([ms, ms.flip(-1) * 0.7]), "QB")
    assert batch.shape == (2, 4, 128, 128)
    assert batch.dtype == torch.float32
    torch.testing.assert_close(batch[:1], BASELINES[name](pan, ms, "QB"))


@pytest.mark.parametrize("name", BASELINES)
def test_scale_of_the_values_does_not_matter(pair, name):
    pan, ms, _ = pair
    torch.testing.assert_close(BASELINES[name](8 * pan, 8 * ms, "QB"), 8 * BASELINES[name](pan, ms, "QB"))


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "EXP"])
def test_better_than_interpolation(pair, name):
    pan, ms, gt = pair
    fused, plain = BASELINES[name](pan, ms, "QB"), exp(pan, ms, "QB")
    assert float(metrics.ergas(fused, gt)) < 0.6 * float(metrics.ergas(plain, gt))
    assert float(metrics.scc(fused, gt)) > float(metrics.scc(plain, gt))


def test_exp_is_interp23(pair):
    pan, ms, _ = pair
    torch.testing.assert_close(exp(pan, ms), interp23(ms))


def test_brovey_keeps_ratios_and_intensity(pair):
    pan, ms, _ = pair
    weights = [0.1, 0.2, 0.3, 0.4]
    fused, expanded = brovey(pan, ms, weights=weights), interp23(ms)
    torch.testing.assert_close(fused[:, 1] * expanded[:, 0], fused[:, 0] * expanded[:, 1])
    torch.testing.assert_close(
        (fused * torch.tensor(weights).view(4, 1, 1)).sum(1, keepdim=True), pan, rtol=1e-6, atol=0
    )


def test_brovey_is_gdal_s(pair, tmp_path):
    """The upsampled bands given to GDAL's weighted Brovey: nothing but the formula is compared."""
    rasterio = pytest.importorskip("rasterio")
    pan, ms, _ = pair
    weights = [0.1, 0.2, 0.3, 0.4]
    for name, image in (("pan", pan), ("ms", interp23(ms))):
        profile = {"driver": "GTiff", "width": 128, "height": 128, "count": image.shape[1], "dtype": "float64"}
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", transform=rasterio.Affine(2, 0, 0, 0, -2, 0), **profile
        ) as file:
            file.write(image[0].numpy())

    def source(tag: str, name: str, band: int) -> str:
        place = f"<SourceFilename>{tmp_path / name}.tif</SourceFilename><SourceBand>{band}</SourceBand>"
        return f"<{tag}>{place}</{tag.split()[0]}>"

    bands = "".join(source(f'SpectralBand dstBand="{b}"', "ms", b) for b in range(1, 5))
    vrt = (
        '<VRTDataset subClass="VRTPansharpenedDataset"><PansharpeningOptions><Algorithm>WeightedBrovey</Algorithm>'
        f"<AlgorithmOptions><Weights>{','.join(map(str, weights))}</Weights></AlgorithmOptions>"
        f"<Resampling>Nearest</Resampling>{source('PanchroBand', 'pan', 1)}{bands}</PansharpeningOptions></VRTDataset>"
    )
    with rasterio.open(vrt) as file:
        expected = torch.from_numpy(file.read())[None]
    torch.testing.assert_close(brovey(pan, ms, weights=weights), expected, rtol=1e-12, atol=0)


def test_gsa_finds_the_mixture(pair):
    """Where PAN is a weighted sum of bands that share their detail, the injected detail is PAN's own, band by band."""
    pan, ms, _ = pair
    fused, expanded = gsa(pan, ms, "QB"), interp23(ms)
    change = (fused - expanded).flatten(2)
    correlation = torch.corrcoef(torch.cat([change[0], (pan - pan.mean()).flatten(2)[0]]))
    assert float(correlation[:4, :4].min()) > 1 - 1e-9  # one detail image for all bands
    torch.testing.assert_close(fused.mean((2, 3)), expanded.mean((2, 3)), rtol=0, atol=1e-6)


def test_mtf_glp_hpm_keeps_the_spectrum_at_low_frequency(pair):
    pan, ms, _ = pair
    fused = mtf_glp_hpm(pan, ms, "QB")
    low = mtf_filter(fused, "QB")[..., 2::4, 2::4]
    assert float((low - ms).abs().mean() / ms.mean()) < 0.01


def test_bt_h_takes_haze_out_of_the_modulation(pair):
    pan, ms, _ = pair
    haze = torch.tensor([300.0, 200.0, 100.0, 50.0]).view(1, 4, 1, 1)
    clear, hazy = bt_h(pan, ms, "QB"), bt_h(pan, ms + haze, "QB")
    torch.testing.assert_close(hazy - haze, clear)
    assert not torch.allclose(brovey(pan, ms + haze) - haze, brovey(pan, ms))


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("value", [0.0, 300.0])
def test_constant_images_stay(name, value):
    pan, ms = torch.full((1, 1, 64, 64), value), torch.full((1, 4, 16, 16), value)
    rtol = 2e-3 if name == "MTF-GLP-HPM" else 1e-6  # the unnormalised filter of the toolbox
    torch.testing.assert_close(BASELINES[name](pan, ms), torch.full((1, 4, 64, 64), value), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", BASELINES)
def test_nan_is_not_hidden(pair, name):
    pan, ms, _ = pair
    ms[0, 2, 3, 4] = torch.nan
    assert bool(BASELINES[name](pan, ms, "QB")[0, 2, 14, 18].isnan())


def test_bad_arguments(pair):
    pan, ms, _ = pair
    with pytest.raises(ValueError, match=r"pan: expected 4 times the size of ms .*, 128x128, got 127x128"):
        exp(pan[..., 1:, :], ms)
    with pytest.raises(ValueError, match="weights: expected 4, got 3"):
        brovey(pan, ms, weights=[1, 2, 3])
