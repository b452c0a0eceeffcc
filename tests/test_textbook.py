"""The seven classical methods at the toolbox's settings: golden values, and the papers' equations in plain NumPy.

`python -m tests.test_textbook` writes the golden file anew, from those equations.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import scipy.ndimage
import scipy.special
import torch
from numpy.typing import NDArray
from rasterio.windows import Window

import pansharp_fast
from pansharp_fast import baselines, classical, metrics
from pansharp_fast.data import SENSORS, degrade

from .conftest import GOLDEN

Image = NDArray[np.float64]

FILE = "classical.npz"
#: Names in `classical`, and in `baselines`.
NAMES = {
    "exp": "EXP",
    "brovey": "Brovey",
    "gsa": "GSA",
    "bt-h": "BT-H",
    "mtf-glp-hpm": "MTF-GLP-HPM",
    "mtf-glp-fs": "MTF-GLP-FS",
    "mtf-glp-hpm-r": "MTF-GLP-HPM-R",
}
SENSOR = {4: "QB", 8: "WV3"}
#: Of the golden results, every so many rows and columns: every place within an MS pixel occurs.
EVERY = 5


def truth(bands: int, size: int) -> Image:
    """[bands, size, size], digital numbers: fields and roofs that the bands share in part, over haze."""
    rng = np.random.default_rng(bands)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = np.inf

    def texture(power: float) -> Image:
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * frequency**-power).real
        return field / field.std()

    shared, roofs = texture(1.2), scipy.ndimage.gaussian_filter(texture(1.0), 1) > 0.4
    return np.stack(
        [400 + 60 * b + 60 * shared * (1 + 0.1 * b) + (90 - 8 * b) * roofs + 12 * texture(1.4) for b in range(bands)]
    )


def pair(bands: int, size: int) -> tuple[Image, Image, Image]:
    """PAN [size, size], MS [bands, size/4, size/4], both whole numbers, and the truth."""
    gt = truth(bands, size)
    weights = np.linspace(1, 2, bands) / np.linspace(1, 2, bands).sum()
    pan = np.tensordot(weights, gt, 1) + np.random.default_rng(0).normal(0, 2, gt.shape[1:])
    ms, _ = degrade(torch.from_numpy(gt)[None], torch.from_numpy(pan)[None, None], SENSOR[bands])
    return pan.round(), ms[0].numpy().round(), gt


# The papers' equations. Images are [H, W], stacks of bands [C, H, W].


def expand(band: Image) -> Image:
    """Aiazzi et al. 2002: zeros between the samples, then the 23-tap kernel, twice; samples land at 4k + 2."""
    half = [0.5, 0.305334091185, 0, -0.072698593239, 0, 0.021809577942, 0, -0.005192756653, 0, 0.000807762146, 0]
    half.append(-0.000060081482)
    kernel = 2 * np.array(half[:0:-1] + half)
    for offset in (1, 0):
        wide = np.zeros([2 * length for length in band.shape])
        wide[offset::2, offset::2] = band
        for axis in (0, 1):
            wide = scipy.ndimage.convolve1d(wide, kernel, axis, mode="wrap")
        band = wide
    return band


def through_mtf(image: Image, gain: float) -> Image:
    """Aiazzi et al. 2006: 41 x 41 samples of a Gaussian response that is `gain` near a quarter of PAN's Nyquist."""
    n = 41
    k = np.arange(n) - n // 2
    spread = (n - 1) / 2 / 4 / np.sqrt(-2 * np.log(gain))
    line = np.cos(2 * np.pi * np.outer(k, k) / n) @ np.exp(-0.5 * (k / spread) ** 2) / n
    radius = np.hypot(k[:, None], k)
    at = np.minimum(np.floor(radius), n // 2)
    kaiser = [scipy.special.i0(0.5 * np.sqrt(np.maximum(1 - (r / (n // 2)) ** 2, 0))) for r in (at, at + 1)]
    window = (kaiser[0] + (kaiser[1] - kaiser[0]) * (radius - at)) / scipy.special.i0(0.5)
    window[radius > n // 2] = 0
    return scipy.ndimage.correlate(image, np.outer(line, line) * window, mode="nearest")


def blurred(pan: Image, gain: float) -> Image:
    """PAN as a band sees it, on PAN's grid again."""
    return expand(through_mtf(pan, gain)[2::4, 2::4])


def covariance(a: Image, b: Image) -> float:
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a.size - 1))


def regression(pan: Image, ms: Image, bands: int) -> tuple[Image, float]:
    """Weights and offset by which the bands make PAN at MS's resolution."""
    low = through_mtf(pan, SENSORS[SENSOR[bands]].mtf_pan)[2::4, 2::4]
    columns = np.stack([*(band.ravel() for band in ms), np.ones(low.size)], 1)
    solution = np.linalg.lstsq(columns, low.ravel())[0]
    return solution[:-1], float(solution[-1])


def independent_exp(pan: Image, ms: Image) -> Image:
    return np.stack([expand(band) for band in ms])


def independent_brovey(pan: Image, ms: Image) -> Image:
    up = independent_exp(pan, ms)
    return up * pan / up.mean(0)


def independent_gsa(pan: Image, ms: Image) -> Image:
    """Aiazzi et al. 2007, equations of GSA: detail is PAN less the intensity, both of mean 0."""
    up = independent_exp(pan, ms)
    weights, _ = regression(pan, ms, len(ms))
    intensity = np.tensordot(weights, up, 1)
    detail = (pan - pan.mean()) - (intensity - intensity.mean())
    return np.stack([band + covariance(band, intensity) / covariance(intensity, intensity) * detail for band in up])


def independent_bt_h(pan: Image, ms: Image) -> Image:
    """Lolli et al. 2017: (ms - haze) * (pan - haze of pan) / (intensity - haze of pan) + haze, with PAN equalised.

    In the darkest pixels the quotient is 0 / 0: it is held within 0 and 5, and 1 without a positive denominator.
    """
    up = independent_exp(pan, ms)
    weights, offset = regression(pan, ms, len(ms))
    haze = np.array([band.min() for band in ms])
    intensity = np.tensordot(weights, up, 1) + offset
    haze_pan = weights @ haze + offset
    low = through_mtf(pan, SENSORS[SENSOR[len(ms)]].mtf_pan)[2::4, 2::4]
    equal = (pan - pan.mean()) * intensity.std(ddof=1) / low.std(ddof=1) + intensity.mean()
    dark = intensity <= haze_pan
    ratio = np.where(dark, 1, (equal - haze_pan) / np.where(dark, 1, intensity - haze_pan)).clip(0, 5)
    return np.stack([(band - least) * ratio + least for band, least in zip(up, haze, strict=True)])


def independent_mtf_glp_hpm(pan: Image, ms: Image) -> Image:
    """Vivone et al. 2014: ms * pan / low, PAN first given the band's mean and its low-pass the band's deviation."""
    sensor = SENSORS[SENSOR[len(ms)]]
    sharpness = through_mtf(pan, sensor.mtf_pan).std(ddof=1)
    out = []
    for band, gain in zip(independent_exp(pan, ms), sensor.gains(len(ms)), strict=True):
        equal = (pan - pan.mean()) * band.std(ddof=1) / sharpness + band.mean()
        out.append(band * equal / blurred(equal, gain))
    return np.stack(out)


def independent_mtf_glp_fs(pan: Image, ms: Image) -> Image:
    """Vivone et al. 2018 (TIP): g = cov(ms, pan) / cov(low, pan)."""
    out = []
    for band, gain in zip(independent_exp(pan, ms), SENSORS[SENSOR[len(ms)]].gains(len(ms)), strict=True):
        low = blurred(pan, gain)
        out.append(band + covariance(band, pan) / covariance(low, pan) * (pan - low))
    return np.stack(out)


def independent_mtf_glp_hpm_r(pan: Image, ms: Image) -> Image:
    """Vivone et al. 2018 (TGRS): ms * (pan + c) / (low + c), c = mean(ms) * var(low) / cov(ms, low) - mean(pan)."""
    out = []
    for band, gain in zip(independent_exp(pan, ms), SENSORS[SENSOR[len(ms)]].gains(len(ms)), strict=True):
        low = blurred(pan, gain)
        c = band.mean() * covariance(low, low) / covariance(band, low) - pan.mean()
        out.append(band * (pan + c) / (low + c))
    return np.stack(out)


INDEPENDENT: dict[str, Callable[[Image, Image], Image]] = {
    name: globals()["independent_" + name.replace("-", "_")] for name in NAMES
}


def tensors(*images: Image) -> tuple[torch.Tensor, ...]:
    """[1, C, H, W] float64."""
    return tuple(torch.from_numpy(np.atleast_3d(x.T).T[None]) for x in images)


def textbook(name: str, pan: Image, ms: Image) -> Image:
    return baselines.BASELINES[NAMES[name]](*tensors(pan, ms), SENSOR[len(ms)])[0].numpy()


def test_all_methods_are_here():
    assert list(NAMES) == list(classical.METHODS)
    assert set(NAMES.values()) == set(baselines.BASELINES)


@pytest.mark.parametrize("bands", SENSOR)
@pytest.mark.parametrize("name", NAMES)
def test_golden_values(golden, name, bands):
    with np.load(golden / FILE) as stored:
        pan, ms, expected = (stored[f"{key}_{bands}"].astype(float) for key in ("pan", "ms", name))
    np.testing.assert_allclose(textbook(name, pan, ms)[:, ::EVERY, ::EVERY], expected, rtol=1e-9)


@pytest.mark.parametrize("bands", SENSOR)
@pytest.mark.parametrize("name", NAMES)
def test_independent_formulas(name, bands):
    pan, ms, _ = pair(bands, 64)
    np.testing.assert_allclose(textbook(name, pan, ms), INDEPENDENT[name](pan, ms), rtol=1e-9)


@pytest.fixture(scope="module")
def reduced() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pan, ms, gt) of a sample scene at reduced resolution, by the Wald protocol."""
    folder = Path(pansharp_fast.__file__).parent / "sample_scenes"
    images = []
    for part, size in (("pan", 592), ("ms", 148)):
        with rasterio.open(folder / f"scene1_{part}.tif") as file:
            images.append(torch.from_numpy(file.read(window=Window(0, 0, size, size)).astype(float))[None])
    ms, pan = degrade(images[1], images[0])
    return pan, ms, images[1]


@pytest.mark.parametrize("name", NAMES)
def test_sharpen_agrees(reduced, name):
    """Same grid, no extras. Left are the border (repeated, not circular) and, for brovey, GDAL's cubic interpolation.

    The toolbox's filter puts its gain at 40/41 of MS's Nyquist frequency; there it is gain^(41/40)^2.
    """
    pan, ms, gt = reduced
    sensor, power = SENSORS["default"], (41 / 40) ** 2
    true = replace(sensor, mtf_ms=(sensor.mtf_ms[0] ** power,), mtf_pan=sensor.mtf_pan**power)
    options = {"phase": 2, "register": "off", "back_projection": 0}
    result = pansharp_fast.sharpen(pan, ms, method=name, sensor=true, **options)
    expected = baselines.BASELINES[NAMES[name]](pan, ms)
    inside = np.s_[..., 16:-16, 16:-16]
    ours, theirs = (float(metrics.ergas(x[inside], gt[inside])) for x in (result, expected))
    assert ours == pytest.approx(theirs, rel=0.01 if name == "brovey" else 0.005)


@pytest.mark.parametrize(("ratio", "phase"), [(4, 2), (2.5, None)])
@pytest.mark.parametrize("name", NAMES)
def test_fuse_is_sharpen(name, ratio, phase):
    torch.manual_seed(1)
    ms = 300 + 100 * torch.rand(2, 4, 24, 28)
    pan = 300 + 100 * torch.rand(2, 1, int(24 * ratio), int(28 * ratio))
    place = {"sensor": "QB", "ratio": ratio, "phase": phase, "back_projection": 0}
    fused = classical.fuse(name, pan, ms, **place)
    torch.testing.assert_close(
        fused, pansharp_fast.sharpen(pan, ms, method=name, register="off", **place), rtol=2e-5, atol=5e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_fuse(name):
    """Displaced bands at a ratio between whole numbers, one step of back-projection."""
    torch.manual_seed(2)
    ms = (300 + 100 * torch.rand(1, 2, 4, 2, dtype=torch.float64)).requires_grad_()
    pan = (300 + 100 * torch.rand(1, 1, 10, 5, dtype=torch.float64)).requires_grad_()
    d = torch.tensor([[0.4, -0.3], [0.1, 0.7]])

    def fused(pan: torch.Tensor, ms: torch.Tensor) -> torch.Tensor:
        return classical.fuse(name, pan, ms, ratio=2.5, d=d, back_projection=1)

    assert torch.autograd.gradcheck(fused, (pan, ms), eps=1e-3, atol=1e-5, rtol=1e-3)


if __name__ == "__main__":
    arrays: dict[str, NDArray[np.generic]] = {}
    for bands in SENSOR:
        pan, ms, _ = pair(bands, 64)
        arrays |= {f"pan_{bands}": pan.astype(np.uint16), f"ms_{bands}": ms.astype(np.uint16)}
        arrays |= {f"{name}_{bands}": INDEPENDENT[name](pan, ms)[:, ::EVERY, ::EVERY] for name in NAMES}
    np.savez_compressed(GOLDEN / FILE, **arrays)
