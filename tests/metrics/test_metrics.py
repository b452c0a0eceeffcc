"""Metrics against values of the reference toolbox, against other libraries, and laws they must obey."""

import json

import numpy as np
import pytest
import torch

from pansharp_fast import metrics
from pansharp_fast.data import get_sensor, interp23
from pansharp_fast.data.observation import blur, observe
from pansharp_fast.metrics.reduced import _product_table

REDUCED = {"Q2n": "q2n", "Q_avg": "q", "SAM": "sam", "ERGAS": "ergas", "SCC": "scc"}
#: Value of a perfect image.
IDEAL = {"psnr": float("inf"), "ssim": 1, "sam": 0, "ergas": 0, "scc": 1, "q": 1, "q2n": 1}


def reduced(name: str, fused, gt, **options) -> torch.Tensor:
    extra = {"peak": 2047} if name in ("psnr", "ssim") else {}
    return getattr(metrics, name)(fused, gt, **extra, **options)


def assert_golden(actual, expected) -> None:
    expected = float("nan") if expected is None else expected
    np.testing.assert_allclose(actual.numpy(), [expected], rtol=0, atol=1e-9)


def synthetic(case: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(fused, gt) [1, C, H, W] of a case in metrics_dev.json, by the recipe given there."""
    b, y, x = np.ogrid[tuple(slice(n) for n in shape)]
    gt = ((37 * y + 53 * x + 101 * b + 5 * ((y * x) % 97) + 13 * (y // 8) * (x // 8)) % 1500 + 100 + 20 * b).astype(
        float
    )
    fused = gt + (71 * y + 113 * x + 31 * b) % 401 - 200
    corner = np.s_[:, :32, :32]
    if case == "zeros4":
        gt[:, 40:44, 50:60] = 0
        fused[:, 80:84, 3:9] = 0
    elif case.startswith("flat_equal"):
        gt[corner] = fused[corner] = 300
    elif case == "flat_offset4":
        gt[corner], fused[corner] = 300, 310
    elif case == "flat_gt4":
        gt[corner] = 300
    elif case == "flat_fused4":
        fused[:, 32:64, :32] = 300
    elif case == "zero_block4":
        gt[corner] = fused[corner] = 0
    elif case == "half_negative_saturate4":
        fused -= 0.5
        fused[:, 10:20, 10:20] -= 500
        fused[0, 0, 0] = 70000
    else:
        assert case.startswith("plain"), case
    return torch.from_numpy(fused)[None], torch.from_numpy(gt)[None]


def golden_cases(kind: str) -> list[dict]:
    from tests.conftest import GOLDEN

    recorded = json.loads((GOLDEN / "metrics_dev.json").read_text())
    if kind == "synthetic":
        return recorded["synthetic"]
    return [entry for entry in recorded["entries"] if entry["kind"] == kind]


@pytest.mark.parametrize("case", golden_cases("synthetic"), ids=lambda case: case["case"])
def test_synthetic_golden(case):
    fused, gt = synthetic(case["case"], case["shape"])
    for key, name in REDUCED.items():
        assert_golden(reduced(name, fused, gt), case[key])


def read(shared, entry: dict) -> dict[str, torch.Tensor]:
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared / "data" / entry["file"]) as file:
        return {key: torch.from_numpy(file[key][:1].astype(np.float64)) for key in file}


def case_id(entry: dict) -> str:
    return f"{entry['file'].split('/')[1][:-3]}-{entry['image']}-{entry['cut']}"


@pytest.mark.parametrize("entry", golden_cases("reduced"), ids=case_id)
def test_reduced_golden(shared, entry):
    data = read(shared, entry)
    gt = data["gt"]
    b, y, x = np.ogrid[tuple(slice(n) for n in gt.shape[1:])]
    wave = torch.from_numpy(0.03 * entry["max"] * np.sin(0.37 * y + 0.53 * x + b))
    fused = {"exp": data["lms"], "noisy": (gt + wave).clamp(0, entry["max"]), "shifted": gt.roll(1, -1)}[entry["image"]]
    for key, name in REDUCED.items():
        assert_golden(reduced(name, fused, gt, cut=entry["cut"]), entry[key])


@pytest.mark.parametrize("entry", golden_cases("full"), ids=case_id)
def test_full_golden(shared, entry):
    data = read(shared, entry)
    lms, pan, sensor = data["lms"], data["pan"], entry["sensor"]
    if entry["crop"]:
        height, width = entry["crop"]
        lms, pan = lms[..., :height, :width], pan[..., :height, :width]
    fused = lms if entry["image"] == "lms" else lms * pan / (lms.mean(1, keepdim=True) + 1e-6)
    assert_golden(spectral := metrics.d_lambda_k(fused, lms, sensor), entry["D_lambda_K"])
    assert_golden(spatial := metrics.d_s(fused, lms, pan), entry["D_S"])
    assert_golden((1 - spectral) * (1 - spatial), entry["HQNR"])
    assert_golden(metrics.d_lambda(fused, lms), entry["D_lambda_QNR"])
    if fused.shape[-1] <= 256:
        assert_golden(metrics.hqnr(fused, lms, pan, sensor), entry["HQNR"])
        assert_golden(metrics.qnr(fused, lms, pan), entry["QNR"])


# ---- laws ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    gt = torch.randint(50, 2000, (3, 5, 64, 48)).double()
    return gt + torch.randint(-40, 40, gt.shape), gt


@pytest.mark.parametrize("name", IDEAL)
def test_perfect_image(pair, name):
    gt = pair[1]
    value = reduced(name, gt, gt)
    assert value.shape == (3,)
    assert value.dtype == torch.float64
    torch.testing.assert_close(
        value, torch.full_like(value, IDEAL[name]), rtol=0, atol=1e-6 if name == "sam" else 1e-12
    )


@pytest.mark.parametrize("name", IDEAL)
def test_images_of_a_batch_do_not_mix(pair, name):
    fused, gt = pair
    together = reduced(name, fused, gt)
    alone = torch.cat([reduced(name, f[None], g[None]) for f, g in zip(fused, gt, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", IDEAL)
def test_band_order_does_not_matter(pair, name):
    fused, gt = pair
    order = [1, 0, 2, 3, 4] if name == "q2n" else [3, 1, 4, 0, 2]
    change = reduced(name, fused[:, order], gt[:, order]) - reduced(name, fused, gt)
    # Q2n multiplies hypercomplex numbers, whose modulus keeps only roughly under a permutation.
    assert float(change.abs().max()) < (5e-3 if name == "q2n" else 1e-10)


@pytest.mark.parametrize("name", ["sam", "ergas", "scc", "q", "q2n"])
def test_scale_does_not_matter(pair, name):
    fused, gt = pair
    torch.testing.assert_close(reduced(name, 4 * fused, 4 * gt), reduced(name, fused, gt), rtol=0, atol=1e-9)


def test_peak_scales_with_the_values(pair):
    fused, gt = pair
    for metric in (metrics.psnr, metrics.ssim):
        torch.testing.assert_close(metric(fused / 8, gt / 8, 2047 / 8), metric(fused, gt, 2047), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", IDEAL)
def test_cut_is_the_toolbox_s(pair, name):
    fused, gt = pair
    torch.testing.assert_close(
        reduced(name, fused, gt, cut=6), reduced(name, fused[..., 5:-6, 5:-6], gt[..., 5:-6, 5:-6])
    )


@pytest.mark.parametrize("name", IDEAL)
def test_nan_is_not_hidden(pair, name):
    fused, gt = pair
    fused[1, 2, 40, 7] = torch.nan
    assert reduced(name, fused, gt).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_computed_in_float64(pair, dtype):
    fused, gt = ((image / 8).round().to(dtype) for image in pair)
    for name in IDEAL:
        torch.testing.assert_close(
            reduced(name, fused, gt), reduced(name, fused.double(), gt.double()), rtol=0, atol=0, msg=name
        )


@pytest.mark.parametrize("name", ["sam", "ergas", "scc"])
def test_zeros_are_undefined(name):
    zeros = torch.zeros(1, 4, 32, 32)
    assert bool(reduced(name, zeros, zeros).isnan())


def test_constant_images():
    gt = torch.full((1, 4, 32, 32), 300.0)
    fused = gt + 10
    bias = 2 * 300 * 310 / (300**2 + 310**2)
    torch.testing.assert_close(metrics.q(fused, gt), torch.tensor([bias], dtype=torch.float64))
    assert float(metrics.q2n(gt, gt)) == 1
    assert float(metrics.q2n(fused, gt)) < 1e-9
    assert abs(float(metrics.psnr(fused, gt, 2047)) - 20 * np.log10(204.7)) < 1e-12


def test_small_sides(pair):
    fused, gt = (image[..., :17, :40] for image in pair)
    assert bool(metrics.q(fused, gt).isnan().all())
    assert bool(metrics.q2n(fused, gt).isfinite().all())
    with pytest.raises(ValueError, match=r"fused: expected sides of at least 16 pixels, got \(15, 40\)"):
        metrics.q2n(fused[..., :15, :], gt[..., :15, :])


# ---- Q2n -------------------------------------------------------------------------------------------------------------


def cayley_dickson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Product of hypercomplex numbers, by the textbook's halves."""
    if len(x) == 1:
        return x * y
    half = len(x) // 2
    a, b, c, d = x[:half], x[half:], y[:half], y[half:]

    def conj(v):
        return np.concatenate([v[:1], -v[1:]])

    first = cayley_dickson(a, c) - cayley_dickson(conj(d), b)
    return np.concatenate([first, cayley_dickson(d, a) + cayley_dickson(b, conj(c))])


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_product_table(size):
    sign, target = _product_table(size)
    for i, j in np.ndindex(size, size):
        conj = np.eye(size)[j] * (1 if j == 0 else -1)
        expected = cayley_dickson(np.eye(size)[i], conj)
        assert expected[target[i, j]] == sign[i, j]


def test_q2n_of_one_band_is_block_uqi(pair):
    fused, gt = (image[:1, :1, :, :32] for image in pair)
    x, y = (image[0, 0].reshape(2, -1) for image in (gt, fused))
    std = x.std(1, keepdim=True)
    x, y = (x - (mean := x.mean(1, keepdim=True))) / std + 1, (y - mean) / std + 1
    covariance = ((x - 1) * (y - y.mean(1, keepdim=True))).sum(1) / 1023
    expected = (
        4 * covariance.abs() * y.mean(1).abs() / (1 + y.var(1)) / (1 + y.mean(1) ** 2)
    ).mean()  # var(x) = mean(x) = 1
    torch.testing.assert_close(metrics.q2n(fused, gt), expected[None], rtol=0, atol=1e-12)


# ---- other libraries -------------------------------------------------------------------------------------------------


def test_torchmetrics_agrees_where_definitions_coincide(pair):
    tm = pytest.importorskip("torchmetrics.functional.image")
    fused, gt = pair
    options = {"data_range": 2047.0, "sigma": 1.5, "reduction": "none", "return_full_image": True}
    windows = tm.structural_similarity_index_measure(fused, gt, **options)[1]
    expected = windows[..., 5:-5, 5:-5].mean((1, 2, 3))  # those that lie inside the image
    torch.testing.assert_close(metrics.ssim(fused, gt, 2047), expected, rtol=0, atol=1e-6)
    expected = tm.peak_signal_noise_ratio(fused, gt, data_range=2047.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(metrics.psnr(fused, gt, 2047), expected, rtol=0, atol=1e-6)
    expected = torch.rad2deg(tm.spectral_angle_mapper(fused, gt, reduction="none").mean((1, 2)))
    torch.testing.assert_close(metrics.sam(fused, gt), expected, rtol=0, atol=1e-6)
    expected = tm.error_relative_global_dimensionless_synthesis(fused, gt, ratio=4, reduction="none")
    torch.testing.assert_close(metrics.ergas(fused, gt), expected, rtol=0, atol=1e-6)


def test_scikit_image_agrees(pair):
    skimage = pytest.importorskip("skimage.metrics")
    fused, gt = (image[0].numpy() for image in pair)
    options = {"channel_axis": 0, "data_range": 2047, "gaussian_weights": True, "use_sample_covariance": False}
    expected = skimage.structural_similarity(gt, fused, **options)
    assert abs(float(metrics.ssim(pair[0], pair[1], 2047)[0]) - expected) < 1e-6
    expected = skimage.peak_signal_noise_ratio(gt, fused, data_range=2047)
    assert abs(float(metrics.psnr(pair[0], pair[1], 2047)[0]) - expected) < 1e-6


# ---- full resolution -------------------------------------------------------------------------------------------------


@pytest.fixture
def scene():
    ms = torch.randint(50, 2000, (2, 4, 16, 24)).double()
    return interp23(ms) + torch.randn(2, 4, 64, 96, dtype=torch.float64), ms, torch.rand(2, 1, 64, 96).double() * 2000


def test_ms_at_either_size(scene):
    fused, ms, pan = scene
    for metric in (metrics.d_lambda, metrics.qnr, metrics.d_s):
        arguments = [(), (pan,)][metric is not metrics.d_lambda]
        torch.testing.assert_close(metric(fused, ms, *arguments), metric(fused, interp23(ms), *arguments))
    value = metrics.hqnr(fused, ms, pan, "QB")
    expected = (1 - metrics.d_lambda_k(fused, ms, "QB")) * (1 - metrics.d_s(fused, ms, pan))
    torch.testing.assert_close(value, expected)
    assert value.shape == (2,)
    assert value.dtype == torch.float64


def test_unchanged_ms_has_no_spectral_distortion(scene):
    _, ms, _ = scene
    torch.testing.assert_close(metrics.d_lambda(interp23(ms), ms), torch.zeros(2, dtype=torch.float64))


def test_flat_and_nan_images_are_undefined(scene):
    fused, ms, pan = scene
    fused[0], ms[0], pan[0] = 5, 5, 5
    assert metrics.hqnr(fused, ms, pan, "QB").isnan().tolist() == [True, False]
    fused[1, 0, 0, 0] = torch.nan
    assert bool(metrics.d_lambda_k(fused, ms, "QB").isnan()[1])


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.psnr(x, x[:, :2], 1), r"fused, gt: expected two equal shapes \[B, C, H, W\], got"),
        (lambda x: metrics.sam(x[0], x[0]), r"fused, gt: expected two equal shapes \[B, C, H, W\], got"),
        (lambda x: metrics.sam(x[:, :0], x[:, :0]), "fused, gt: expected at least one band"),
        (lambda x: metrics.psnr(x, x, 0), "peak: expected a number above 0, got 0"),
        (lambda x: metrics.ergas(x, x, ratio=0), "ratio: expected a number above 0, got 0"),
        (
            lambda x: metrics.scc(x, x, cut=17),
            "cut: expected 0 or more that leaves something of 32 x 48 pixels, got 17",
        ),
        (lambda x: metrics.d_s(x[..., :32], x[..., :32], x), r"pan: expected \(1, 1, 32, 32\), got"),
        (lambda x: metrics.d_lambda(x, x), "fused: expected sides that are multiples of 32, got 32 x 48"),
        (lambda x: metrics.d_lambda(x[..., :32], x[..., :9]), "ms: expected 32/4 x 32/4 pixels, got"),
        (lambda x: metrics.d_lambda_k(x[..., :32], x[..., :32], "WV3"), "sensor WV3: expected 8 bands, got 4"),
        (lambda x: metrics.ssim(x[..., :10], x[..., :10], 1), "fused: expected sides of at least 11 pixels"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(1, 4, 32, 48))


# ---- registered ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "phase"), [(4, 1.5), (4, 2), (2, 0), (3, 1), (6, (2.5, 3))])
def test_registered_measures_know_displacement_and_phase(ratio, phase):
    """An image, moved and sampled by the model of observation, is its own MS; nothing else is."""
    d = torch.tensor([[2.2, -2.1], [0.4, 1.3], [-1.7, 0.6], [0.0, 3.0]])
    rng = torch.Generator().manual_seed(5)
    scene = blur(torch.rand(2, 4, 192, 192, generator=rng, dtype=torch.float64) * 2000, 1.0)
    options = {"gains": (0.34, 0.32, 0.30, 0.22), "ratio": ratio, "phase": phase, "d": d}
    ms = observe(scene, (192 // ratio, 192 // ratio), **options)
    pan = scene.mean(1, keepdim=True)
    values = {}
    for name, given in {"right": d, "none": None, "off": d + ratio / 3}.items():
        known = {"phase": phase, "d": given}
        values[name] = [
            metrics.consistency(scene, ms, "QB", ratio, **known, cut=2),
            metrics.d_lambda_k(scene, ms, "QB", ratio, **known),
            metrics.d_s(scene, ms, pan, ratio, **known),
        ]
    assert values["right"][0].max() < 1e-12
    for k in (0, 1):
        assert (values["right"][k] < 0.5 * values["none"][k]).all()
        assert (values["right"][k] < 0.5 * values["off"][k]).all()
    product = (1 - values["right"][1]) * (1 - values["right"][2])
    torch.testing.assert_close(metrics.hqnr(scene, ms, pan, "QB", ratio, phase=phase, d=d.tolist()), product)
    per_image = metrics.d_lambda_k(scene, ms, "QB", ratio, phase=phase, d=d.expand(2, 4, 2).numpy())
    torch.testing.assert_close(per_image, values["right"][1])


def test_registered_at_the_toolbox_s_phase_without_displacement_is_the_textbook(scene):
    _, ms, pan = scene
    smooth = interp23(ms)
    known = metrics.d_lambda_k(smooth, ms, "QB", phase=2)
    assert (known - metrics.d_lambda_k(smooth, ms, "QB")).abs().max() < 0.01  # borders and a sum of .999 differ
    values = metrics.d_s(smooth, ms, pan, phase=2), metrics.d_s(smooth, ms, pan)
    assert (values[0] - values[1]).abs().max() < 0.02


@pytest.mark.parametrize("bands", [("Blue", "green", "RED", "nir1"), (2, 3, 5, 7), ("blue", 3, 5, "NIR1")])
def test_band_subsets(scene, bands):
    fused, ms, pan = scene
    part = get_sensor("WV3").select([2, 3, 5, 7])
    assert part.band_names == ("blue", "green", "red", "NIR1")
    assert part.mtf_ms == (0.355, 0.36, 0.365, 0.335)
    assert part.rgb == (2, 1, 0)
    for options in ({}, {"phase": 1.5}):
        torch.testing.assert_close(
            metrics.d_lambda_k(fused, ms, "WV3", bands=bands, **options),
            metrics.d_lambda_k(fused, ms, part, **options),
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(
            metrics.hqnr(fused, ms, pan, "WV3", bands=bands, **options),
            metrics.hqnr(fused, ms, pan, part, **options),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        (("blue", "purple"), "bands: expected some of coastal, blue, .* or numbers from 1, got 'purple'"),
        ((0,), "bands: expected some of coastal, .*, got 0"),
        ((9,), "bands: expected some of coastal, .*, got 9"),
        ((), "bands: expected at least one, got none"),
        ((1, 2, 3), "sensor WV3: expected 3 bands, got 4"),
    ],
)
def test_bad_bands(scene, bands, message):
    with pytest.raises(ValueError, match=message):
        metrics.d_lambda_k(scene[0], scene[1], "WV3", bands=bands)
