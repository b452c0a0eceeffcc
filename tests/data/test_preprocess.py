"""MTF filters, interpolation and reduction against values of the reference toolbox, and laws they must obey."""

import numpy as np
import pytest
import torch

from pansharp_fast.data import (
    SENSORS,
    Sensor,
    decimate,
    degrade,
    get_sensor,
    imresize,
    interp23,
    lpan,
    mtf_filter,
    mtf_kernel,
    shift,
)


def image(array) -> torch.Tensor:
    """[B, C, H, W] in float64 from an array with fewer dimensions."""
    x = torch.from_numpy(np.asarray(array, dtype=np.float64))
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def assert_near(actual, expected) -> None:
    torch.testing.assert_close(actual, image(expected), rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def committed(golden):
    return np.load(golden / "preprocess.npz")


@pytest.fixture(scope="module")
def full(shared):
    return np.load(shared / "golden" / "preprocess_dev.npz")


@pytest.fixture(scope="module")
def scene(shared):
    h5py = pytest.importorskip("h5py")

    def read(name: str) -> dict[str, torch.Tensor]:
        with h5py.File(shared / "data" / name) as file:
            return {key: image(file[key][:1]) for key in file}

    return read


# ---- sensors ---------------------------------------------------------------------------------------------------------


def test_sensor_names_are_forgiving():
    assert get_sensor("WorldView-3") is get_sensor("wv3") is SENSORS["WV3"]
    assert get_sensor("geoeye_1") is SENSORS["GeoEye1"]
    assert get_sensor(SENSORS["QB"]) is SENSORS["QB"]
    with pytest.raises(ValueError, match=r"sensor: expected one of .* got 'WV9'"):
        get_sensor("WV9")


@pytest.mark.parametrize("sensor", SENSORS.values(), ids=SENSORS)
def test_sensor_facts_fit_together(sensor):
    bands = sensor.bands or 5
    assert len(sensor.gains(bands)) == bands
    assert all(0 < gain < 1 for gain in (*sensor.mtf_ms, sensor.mtf_pan))
    assert all(0 <= band < bands for band in sensor.rgb)
    if sensor.band_names:
        assert [sensor.band_names[band] for band in sensor.rgb] == ["red", "green", "blue"]


def test_peaks_are_those_of_the_papers():
    assert {name: SENSORS[name].peak for name in ("WV3", "QB", "GF2", "WV2")} == {
        "WV3": 2047,
        "QB": 2047,
        "GF2": 1023,
        "WV2": 2047,
    }


# ---- MTF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GF2", "GeoEye1", "IKONOS", "QB", "WV2", "WV3"])
def test_ms_kernels(committed, name):
    expected = committed[f"kernel_ms_{name}"]
    actual = mtf_kernel(SENSORS[name].gains(expected.shape[0]))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["GeoEye1", "IKONOS", "QB", "WV2", "WV3", "none"])
def test_pan_kernels(committed, name):
    actual = mtf_kernel([get_sensor(name).mtf_pan])[0]
    np.testing.assert_allclose(actual.numpy(), committed[f"kernel_pan_{name}"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_mtf_filter_is_the_correlation_with_its_kernel(ratio):
    x = torch.randn(2, 3, 9, 50, dtype=torch.float64)  # smaller than the kernel in one direction
    padded = torch.nn.functional.pad(x, (20,) * 4, mode="replicate")
    kernel = mtf_kernel([0.3] * 3, ratio)[:, None]
    expected = torch.nn.functional.conv2d(padded, kernel, groups=3)
    torch.testing.assert_close(mtf_filter(x, "default", ratio), expected, rtol=0, atol=1e-13)


def test_mtf_has_the_sensor_s_gain_at_nyquist():
    wave = torch.cos(torch.arange(256, dtype=torch.float64) * torch.pi / 4).expand(1, 1, 256, 256)
    blurred = mtf_filter(wave, Sensor("x", (0.3,), 0.15, 11, (), (0, 0, 0)))
    inner = blurred[0, 0, 128, 64:192]
    # The definition counts 40 intervals where there are 41 samples, so the cut-off lies at 40/41 of Nyquist.
    assert abs(float(inner.max()) - 0.3 ** (41 / 40) ** 2) < 1e-3


def test_golden_filters(full):
    pan = image(full["pan64"])
    for name in ("GeoEye1", "IKONOS", "QB", "WV2", "WV3", "none"):
        assert_near(mtf_filter(pan, name, pan=True), full[f"pan64_mtf_pan_{name}"])
    assert_near(decimate(mtf_filter(pan, "WV2", pan=True)), full["pan64_mtf_pan_WV2_dec"])


@pytest.mark.parametrize(("name", "sensor"), [("WV3/wv3_rr_256", "WV3"), ("GF2/gf2_rr_256", "GF2")])
def test_golden_degradation(full, scene, name, sensor):
    data, key = scene(f"{name}.h5"), name.split("/")[1]
    ms, pan = degrade(data["gt"], data["pan"], sensor)
    assert_near(ms, full[f"{key}_ms"])
    assert_near(pan, full[f"{key}_pan_imresize"])
    assert_near(ms, data["ms"])  # the published file itself
    assert_near(mtf_filter(data["gt"], sensor)[..., :64, :64], full[f"{key}_mtf_corner"])


def test_degraded_pan_by_its_mtf():
    pan = torch.rand(1, 1, 32, 32, dtype=torch.float64)
    ms, low = degrade(torch.rand(1, 4, 8, 8, dtype=torch.float64), pan, "QB", pan_filter="mtf")
    assert ms.shape == (1, 4, 2, 2)
    torch.testing.assert_close(low, decimate(mtf_filter(pan, "QB", pan=True)))


# ---- interpolation and reduction -------------------------------------------------------------------------------------


def test_imresize_synthetic(committed):
    syn = image(committed["syn"])
    assert_near(imresize(syn, 1 / 4), committed["syn_imresize_quarter"])
    assert_near(imresize(syn, 1 / 2), committed["syn_imresize_half"])
    assert_near(imresize(syn[..., :10, :14], 4), committed["syn_imresize_x4"])


def test_golden_interpolation(full):
    assert_near(interp23(image(full["small_ms"]), 4), full["small_interp23_x4"])
    assert_near(interp23(image(full["small_ms"]), 2), full["small_interp23_x2"])
    assert_near(interp23(image(full["small8_ms"]), 4), full["small8_interp23_x4"])
    assert_near(imresize(image(full["small_ms"]), 4), full["small_imresize_x4"])
    assert_near(imresize(image(full["pan64"]), 1 / 4), full["pan64_imresize"])
    assert_near(interp23(imresize(image(full["pan64"]), 1 / 4)), full["pan64_lp_interp23"])


@pytest.mark.parametrize("name", ["WV3/wv3_rr_256", "GF2/gf2_rr_256"])
def test_stored_images_follow_the_recipes(scene, name):
    data, extra = scene(f"{name}.h5"), scene(f"{name}_pan.h5")
    torch.testing.assert_close(interp23(data["ms"]), data["lms"], rtol=0, atol=1e-3)
    torch.testing.assert_close(lpan(data["pan"]), extra["lpan"], rtol=0, atol=1e-3)  # stored as float32


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_interp23_keeps_samples_on_their_grid(ratio):
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    up = interp23(x, ratio)
    assert up.shape == (2, 3, 5 * ratio, 7 * ratio)
    torch.testing.assert_close(decimate(up, ratio), x, rtol=0, atol=0)
    rolled = interp23(x.roll(1, -1), ratio)  # circular: a shift of the input shifts the output
    torch.testing.assert_close(rolled, up.roll(ratio, -1), rtol=0, atol=1e-13)


def test_lpan_is_the_gaussian_of_its_definition():
    pan = torch.randn(2, 1, 24, 40, dtype=torch.float64)
    offsets = torch.arange(-20, 21, dtype=torch.float64)
    taps = torch.exp(-(offsets**2) / (2 * 1.98**2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    padded = torch.nn.functional.pad(pan, (20,) * 4, mode="replicate")
    expected = torch.nn.functional.conv2d(padded, kernel[None, None])[..., 2::4, 2::4]
    torch.testing.assert_close(lpan(pan), expected, rtol=0, atol=1e-13)


FUNCTIONS = {
    "mtf_filter": lambda x: mtf_filter(x, "default"),
    "interp23": interp23,
    "imresize": lambda x: imresize(x, 0.25),
    "imresize up": lambda x: imresize(x, 2.5),
    "lpan": lpan,
    "degrade": lambda x: degrade(x, x[:, :1])[0],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_linear_batched_and_differentiable(function):
    x, y = torch.randn(2, 2, 2, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(function(2 * x + y), 2 * function(x) + function(y), rtol=0, atol=1e-12)
    torch.testing.assert_close(function(x)[1:], function(x[1:]), rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(function, x[:1, :1].clone().requires_grad_(), fast_mode=True)
    single = function(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), function(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [interp23, lpan, lambda x: imresize(x, 0.5)], ids=["interp23", "lpan", "imresize"])
def test_constants_stay_constant(function):
    out = function(torch.full((1, 2, 16, 8), 7.0, dtype=torch.float64))
    torch.testing.assert_close(out, torch.full_like(out, 7), rtol=2e-9, atol=0)  # 23 taps have 12 decimals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: interp23(x[0]), r"x: expected \[B, C, H, W\], got shape"),
        (lambda x: interp23(x, 3), "ratio: expected a power of two above 1, got 3"),
        (lambda x: lpan(x[..., 1:]), "pan: expected sides divisible by 4, got 8 x 11"),
        (lambda x: imresize(x, 0), "scale: expected a number above 0, got 0"),
        (lambda x: mtf_filter(x, "WV3"), "sensor WV3: expected 8 bands, got 4"),
        (lambda x: decimate(x, 8), "x: expected sides divisible by 8, got 8 x 12"),
        (lambda x: degrade(x, x, pan_filter="box"), "pan_filter: expected imresize or mtf, got 'box'"),
        (lambda x: mtf_kernel([1.0]), r"gains: expected numbers between 0 and 1, got \(1.0,\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 4, 8, 12))


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        interp23(torch.zeros(1, 1, 4, 4, dtype=torch.long))


# ---- shifts ----------------------------------------------------------------------------------------------------------


def test_shift_by_whole_pixels_is_exact():
    x = torch.randn(2, 3, 16, 21, dtype=torch.float64)
    moved = shift(x, 3, -5)
    torch.testing.assert_close(moved[..., 3:, :-5], x[..., :-3, 5:], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[..., :3, :-5], x[..., :3, 5:].flip(2), rtol=0, atol=1e-12)  # the mirror image


def test_shift_moves_a_wave_by_its_fraction():
    position = torch.arange(64, dtype=torch.float64) + 0.5
    for distance in (0.25, 1.5):
        for frequency in (3, 20):  # half periods over the image, so that the mirrored wave is smooth

            def wave(x, frequency=frequency):
                return torch.cos(torch.pi * frequency * x / 64).expand(1, 1, 64, 64)

            torch.testing.assert_close(
                shift(wave(position), 0, distance), wave(position - distance), rtol=0, atol=1e-12
            )
            down = shift(wave(position).mT, distance, 0)
            torch.testing.assert_close(down, wave(position - distance).mT, rtol=0, atol=1e-12)


def test_shift_is_differentiable():
    x = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift(x, 0.3, -1.2), x, fast_mode=True)
