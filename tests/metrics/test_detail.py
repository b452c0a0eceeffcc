"""Detail, mottle and halos: what was planted is found, what the eye does not mind is not."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, gaussian_filter

from pansharp_fast import metrics
from pansharp_fast.classical import fuse
from pansharp_fast.data.observation import upsample
from pansharp_fast.data.registration import register

RATIO = 4


@pytest.fixture(scope="module")
def scene():
    """(fused, MS in PAN's frame, pan) of flat ground, water, bright objects and fields; four bands of one detail."""
    rng = np.random.default_rng(3)
    pan = np.full((192, 192), 400.0) + gaussian_filter(rng.normal(size=(192, 192)), 20) * 800
    for top, left in rng.integers(10, 175, (14, 2)):
        pan[top : top + 8, left : left + 6] += 600
    pan[:, 128:] += gaussian_filter(rng.normal(size=(192, 64)), 1) * 150
    pan[150:, :40] = 100  # water: the darkest place, that of the haze
    tint = 1 + 0.2 * gaussian_filter(rng.normal(size=(4, 192, 192)), (0, 24, 24)) * 24
    bands = pan * tint * np.array([0.6, 0.9, 1.1, 1.5])[:, None, None] + 50
    ms = gaussian_filter(bands, (0, 3, 3))
    return tuple(torch.from_numpy(x)[None] for x in (bands, ms, pan[None]))


def noise(shape, sigma, strength):
    """Colour noise [1, C, H, W] without brightness, of a given deviation, nothing finer than `sigma` pixels."""
    rng = np.random.default_rng(5)
    grain = gaussian_filter(rng.normal(size=shape), (0, 0, sigma, sigma))
    grain -= grain.mean(1, keepdims=True)
    return torch.from_numpy(grain * strength / grain.std())


def test_laplacian_is_the_textbook_s(scene):
    fused, _, pan = scene
    kernel = -np.ones((3, 3))
    kernel[1, 1] = 8
    lap = [convolve(x, kernel)[1:-1, 1:-1] for x in (*fused[0].numpy(), pan[0, 0].numpy())]
    correlation = np.mean([np.corrcoef(x.ravel(), lap[-1].ravel())[0, 1] for x in lap[:-1]])
    relative = [x.std() / y.std() for x, y in zip(lap, (*fused[0].numpy(), pan[0, 0].numpy()), strict=True)]
    energy = np.mean(relative[:-1]) / relative[-1]
    np.testing.assert_allclose(metrics.laplacian_correlation(fused, pan), [correlation], rtol=1e-9)
    np.testing.assert_allclose(metrics.laplacian_energy(fused, pan), [energy], rtol=1e-9)


def test_detail_of_pan_itself_is_ideal_and_blur_is_seen(scene):
    fused, ms, pan = scene
    alike = pan * torch.tensor([0.5, 1, 2, 3]).view(4, 1, 1)
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(metrics.laplacian_correlation(alike, pan), one)
    torch.testing.assert_close(metrics.laplacian_energy(alike, pan), one)
    assert metrics.laplacian_energy(ms, pan) < 0.5 * metrics.laplacian_energy(fused, pan)
    assert metrics.laplacian_correlation(fused.roll(1, -1), pan) < 0.6


def test_mottle_is_found_where_it_was_planted(scene):
    fused, ms, pan = scene
    values = []
    for strength in (0, 4, 8, 16):
        spoilt = fused + noise(fused.shape, 1.5, strength)
        values.append(float(metrics.mottle(spoilt, fused, ms, pan, RATIO)))
    assert values[0] == 1
    assert values == sorted(values)
    assert values[-1] > 1.5
    # Detail of PAN, brightness alone, and colour that changes slowly are no mottle.
    haze = ms.amin((2, 3), keepdim=True)
    brighter = (fused - haze) * (1 + 0.1 * (noise(fused.shape, 1.5, 1)[:, :1])) + haze
    assert metrics.mottle(brighter, fused, ms, pan, RATIO) < 1.1
    slow = fused + noise(fused.shape, 25, 16)
    assert metrics.mottle(slow, fused, ms, pan, RATIO) < values[1]  # a fourth of that strength


def test_mottle_outside_flat_ground_does_not_count(scene):
    fused, ms, pan = scene
    spoilt = fused.clone()
    spoilt[..., 150:] += noise(fused.shape, 1.5, 30)[..., 150:]  # in the textured field
    assert metrics.mottle(spoilt, fused, ms, pan, RATIO) < 1.05


def test_halos_round_bright_objects_are_found(scene):
    fused, ms, pan = scene
    bright = (pan[0, 0].numpy() > 800).astype(float)
    ring = torch.from_numpy(gaussian_filter(bright, 2.5) * (1 - bright))
    colour = torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1).double()
    reference = fused + 100 * colour * ring
    values = [float(metrics.halo(fused + s * colour * ring, reference, ms, pan, RATIO)) for s in (0, 100, 200, 400)]
    assert values[0] < 0.5
    assert values[1] == 1
    assert values[1] < values[2] < values[3]
    # Brighter objects of the same colours have none.
    brighter = fused + 0.5 * (fused - ms.amin((2, 3), keepdim=True)) * torch.from_numpy(bright)
    assert metrics.halo(brighter, reference, ms, pan, RATIO) < 0.5
    # Nor are colours halos far from any edge.
    place = np.s_[..., 80:120, 44:84]
    plain = pan.clone()
    plain[place] = 400
    far = fused.clone()
    far[..., 96:104, 60:68] += 400 * colour
    same = metrics.halo(far, reference, ms, plain, RATIO) - metrics.halo(fused, reference, ms, plain, RATIO)
    assert same.abs() < 1e-12


@pytest.mark.parametrize("name", ["mottle", "halo"])
def test_scale_offset_and_batch(scene, name):
    fused, ms, pan = scene
    measure = getattr(metrics, name)
    spoilt = fused + noise(fused.shape, 1.5, 40)
    value = measure(spoilt, fused, ms, pan, RATIO)
    batch = [torch.cat([x, x.flip(-1)]) for x in (spoilt, fused, ms, pan)]
    both = measure(*batch, RATIO)
    torch.testing.assert_close(both, torch.cat([value, value]), rtol=1e-9, atol=0)
    torch.testing.assert_close(measure(*(0.1 * x for x in (spoilt, fused, ms, pan)), RATIO), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(measure(spoilt + 99, fused + 99, ms + 99, pan, RATIO), value, rtol=1e-6, atol=0)
    spoilt[0, 1, 90, 90] = torch.nan
    assert measure(spoilt, fused, ms, pan, RATIO).isnan().all()


def test_numpy_arrays_in_numpy_arrays_out(scene):
    fused, ms, pan = scene
    calls = {
        "psnr": lambda m, f, g, p: m(f, g, 2047),
        "ssim": lambda m, f, g, p: m(f, g, peak=2047),
        "sam": lambda m, f, g, p: m(f, g),
        "ergas": lambda m, f, g, p: m(fused=f, gt=g, cut=3),
        "scc": lambda m, f, g, p: m(f, g),
        "q": lambda m, f, g, p: m(f, g),
        "q2n": lambda m, f, g, p: m(f, g),
        "d_lambda": lambda m, f, g, p: m(f, g),
        "d_lambda_k": lambda m, f, g, p: m(f, g, "QB"),
        "d_s": lambda m, f, g, p: m(f, g, p),
        "hqnr": lambda m, f, g, p: m(f, g, p, "QB"),
        "qnr": lambda m, f, g, p: m(f, g, pan=p),
        "consistency": lambda m, f, g, p: m(f, g[..., ::4, ::4], "QB", d=[[0.5, 1]] * 4),
        "laplacian_correlation": lambda m, f, g, p: m(f, p),
        "laplacian_energy": lambda m, f, g, p: m(f, p),
        "mottle": lambda m, f, g, p: m(f, g, g, p),
        "halo": lambda m, f, g, p: m(f, f + 100, g, p),
    }
    assert set(calls) == set(metrics.__all__)
    images = [x.round() for x in (fused, ms, pan)]
    for name, call in calls.items():
        measure = getattr(metrics, name)
        expected = call(measure, *images)
        for dtype in ("float64", "uint16", ">i4"):
            value = call(measure, *(x.numpy().astype(dtype) for x in images))
            assert isinstance(value, np.ndarray), name
            np.testing.assert_array_equal(value, expected.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: metrics.sam(x, x.numpy()), TypeError, "images: expected all NumPy arrays or all tensors, got both"),
        (lambda x: metrics.sam(x.numpy() > 0, x.numpy()), TypeError, "images: expected integers or real numbers, got"),
        (lambda x: metrics.laplacian_energy(x, x), ValueError, r"fused, pan: expected \[B, C, H, W\] of one size"),
        (lambda x: metrics.mottle(x, x, x[..., :9], x[:, :1]), ValueError, "fused, reference, ms, pan: expected"),
        (lambda x: metrics.laplacian_energy(x, x[:, :1], 15), ValueError, "cut: expected 0 or more that leaves 3 pix"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.rand(1, 4, 32, 32))


@pytest.mark.parametrize(
    ("name", "sensor", "part"), [("qb", "QB", np.s_[..., 300:700, 300:700]), ("wv3", "WV3", np.s_[..., 8:-8, 8:-8])]
)
def test_ranking_of_the_eye(shared, name, sensor, part):
    """QuickBird's grass, WorldView-3's parked cars: two full steps of back-projection spoil what none leaves clean."""
    rasterio = pytest.importorskip("rasterio")
    images = []
    for kind in ("pan", "ms"):
        with rasterio.open(shared / "data" / "native" / f"{name}_{kind}.tif") as file:
            images.append(torch.from_numpy(file.read().astype(np.float64))[None])
    pan, ms = images
    d = register(pan, ms, sensor=sensor).d
    tried = (("gsa", 0), ("bt-h", 0), ("bt-h", 2))
    gsa, plain, two = (fuse(name, pan, ms, sensor=sensor, d=d, back_projection=k)[part] for name, k in tried)
    up = upsample(ms, (pan.shape[2], pan.shape[3]), ratio=4, d=d)[part]
    for measure, worse in ((metrics.mottle, 1.4), (metrics.halo, 3)):
        clean, spoilt = (float(measure(x, gsa, up, pan[part])) for x in (plain, two))
        assert clean < 1.1
        assert spoilt > 1.2
        assert spoilt > worse * clean
