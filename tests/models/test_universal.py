"""`universal`: BT-H at the start, any bands and ratios, what must not matter does not."""

import pytest
import torch

from pansharp_fast.classical import Moments
from pansharp_fast.data.observation import observe, resample, upsample
from pansharp_fast.models import Universal, UniversalConfig, load_model, save_model
from pansharp_fast.models.universal import FACTS, PAN_GAIN, network_inputs, scene_statistics


def scene(bands=4, ratio=4, h=12, w=14, batch=1, seed=0):
    """PAN and MS with detail that they share, in digital numbers around 400, and displacements."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = (ratio * h, ratio * w)
    coarse = upsample(noise(batch, bands + 1, h, w).abs(), size, ratio=ratio)
    truth = 300 + 100 * coarse[:, :bands] + 60 * noise(batch, 1, *size).abs()
    pan = truth.mean(1, keepdim=True) * 0.8 + 50 * coarse[:, bands:]
    d = noise(bands, 2) * 0.5
    ms = observe(truth, (h, w), gains=[0.3] * bands, ratio=ratio, d=d)
    return pan, ms, d


def randomised(std=0.05, **changes):
    """A small network with no tensor left at zero, so that every part matters."""
    torch.manual_seed(1)
    model = Universal(UniversalConfig(**{"band_width": 8, "trunk_width": 16, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def run(model, pan, ms, d=None, ratio=4, **options):
    return model.sharpen_registered(pan, ms, ratio=ratio, d=d, gains=[0.3] * ms.shape[1], **options)


def close(a, b, tolerance=2e-5):
    """Equal to the rounding of float32, over the spread of the image."""
    assert a.shape == b.shape
    assert (a.double() - b.double()).abs().max() <= tolerance * (b.double().std() + b.double().abs().mean() / 100)


def test_fresh_network_is_bt_h():
    pan, ms, d = scene(bands=3, batch=2)
    result = run(Universal(UniversalConfig(band_width=8, trunk_width=16)), pan, ms, d)
    for i in range(2):
        up = upsample(ms[i : i + 1], (48, 56), ratio=4, d=d)[0]
        registered = resample(ms[i : i + 1], (12, 14), d / 4, 1)[0].flatten(1)
        low = observe(pan[i : i + 1], (12, 14), gains=[PAN_GAIN], ratio=4)[0].flatten()
        columns = torch.cat([registered.T, torch.ones(12 * 14, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(columns, low[:, None]).solution[:, 0]
        weights, offset = solution[:3], solution[3]
        assert (weights > 0).all()  # else haze is found otherwise
        value = columns @ solution
        matched = (pan[i, 0] - low.mean()) * value.std() / low.std() + value.mean()
        haze = ms[i].amin((1, 2))
        base = (weights * haze).sum() + offset
        intensity = torch.einsum("c,chw->hw", weights, up) + offset
        modulation = ((matched - base) / (intensity - base).clamp_min(0.05 * value.std())).clamp(0, 5)
        expected = (up - haze[:, None, None]) * modulation + haze[:, None, None]
        close(result[i], expected)


@pytest.mark.parametrize("bands", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
def test_any_bands_and_ratio(bands, ratio):
    pan, ms, d = scene(bands, ratio, h=7, w=9)
    out = run(randomised(), pan, ms, d, ratio)
    assert out.shape == (1, bands, 7 * ratio, 9 * ratio)
    assert torch.isfinite(out).all()
    assert (out - out.mean()).abs().max() > 0


def test_permuted_bands_give_permuted_results():
    pan, ms, d = scene(5)
    order, model = torch.tensor([3, 0, 4, 1, 2]), randomised()
    gains = [0.25, 0.3, 0.35, 0.28, 0.4]
    out = model.sharpen_registered(pan, ms, ratio=4, d=d, gains=gains)
    moved = model.sharpen_registered(pan, ms[:, order], ratio=4, d=d[order], gains=[gains[i] for i in order])
    close(moved, out[:, order])


@pytest.mark.parametrize(("factor", "offset"), [(0.01, 0.0), (37.0, 0.0), (1.0, 5000.0), (2.5, -3000.0)])
def test_scale_and_offset_of_pan_do_not_matter(factor, offset):
    pan, ms, d = scene()
    model = randomised()
    close(run(model, pan * factor + offset, ms, d), run(model, pan, ms, d))


@pytest.mark.parametrize(("factor", "offset"), [(1e-4, 0.0), (50.0, 0.0), (1.0, -800.0)])
def test_ms_and_result_scale_together(factor, offset):
    pan, ms, d = scene()
    model = randomised()
    close(run(model, pan, ms * factor + offset, d), run(model, pan, ms, d).double() * factor + offset)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_dtypes(dtype):
    pan, ms, d = scene()
    pan, ms = (pan * 0.3).round().clamp(0, 255), (ms * 0.3).round().clamp(0, 255)
    model = randomised()
    close(run(model, pan.to(dtype), ms.to(dtype), d), run(model, pan, ms, d))


def test_images_of_a_batch_do_not_see_each_other():
    pan, ms, d = scene(batch=2)
    model = randomised()
    both = run(model, pan, ms, d)
    close(both[1:], run(model, pan[1:], ms[1:], d))


def test_a_tile_gives_what_the_whole_gives():
    pan, ms, d = scene(h=72, w=20)
    model = randomised()
    statistics = scene_statistics(pan, ms, gains=[0.3] * 4, ratio=4, d=d)
    whole = run(model, pan, ms, d, statistics=statistics)
    start, margin = 20, -(-model.reach // 4)
    tile = run(model, pan[:, :, 4 * start :], ms[:, :, start:], d, statistics=statistics)
    # The far tails of interpolation, which the reach leaves out, hold some millionths of the contrast.
    close(tile[:, :, 4 * margin :], whole[:, :, 4 * (start + margin) :], 5e-5)
    assert (tile[:, :, :4] - whole[:, :, 4 * start : 4 * start + 4]).abs().max() > 1e-2  # the border does matter


def test_odd_sizes_are_padded():
    pan, ms, d = scene(ratio=3, h=7, w=9)
    assert run(randomised(), pan, ms, d, 3).shape == (1, 4, 21, 27)


def test_flat_images_stay_flat():
    pan, ms = torch.full((1, 1, 32, 32), 500.0), torch.full((1, 2, 8, 8), 100.0)
    out = run(randomised(), pan, ms)
    assert torch.isfinite(out).all()
    assert (out - 100).abs().max() < 1e-3


@pytest.mark.parametrize("attention", [True, False])
def test_gradients_reach_every_parameter(attention):
    pan, ms, d = scene()
    model = randomised(attention=attention)
    statistics = scene_statistics(pan, ms, gains=[0.3] * 4, ratio=4, d=d)
    inputs = network_inputs(pan, ms, statistics, gains=[0.3] * 4, ratio=4, d=d)
    assert inputs.facts.shape == (1, 4, FACTS)
    model(inputs).square().sum().backward()
    # In MS mode CM3A's query sees the bands' condition alone; a bias of keys alike for all neighbours changes nothing.
    silent = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    assert silent <= {"attend.attention.k_pan.bias", "attend.attention.kv_ms.bias"}


def test_checkpoint(tmp_path):
    model = randomised()
    save_model(tmp_path / "x.safetensors", model)
    pan, ms, d = scene(3)
    assert torch.equal(run(load_model(tmp_path / "x.safetensors", bands=3), pan, ms, d), run(model, pan, ms, d))


@pytest.mark.parametrize("changes", [{"bands": 4}, {"depth": (1,)}, {"trunk_width": 18}])
def test_configuration_out_of_range(changes):
    with pytest.raises(ValueError, match="expected"):
        UniversalConfig(**changes)


def test_wrong_statistics_are_refused():
    pan, ms, d = scene()
    found = scene_statistics(pan, ms, gains=[0.3] * 4, ratio=4, d=d)
    found.high = Moments(found.high.count, found.high.mean[:, :5], found.high.scatter[:, :5, :5])
    with pytest.raises(ValueError, match="statistics: expected PAN as each of 4 bands sees it"):
        run(randomised(), pan, ms, d, statistics=found)


def test_shapes_that_do_not_fit_are_refused():
    pan, ms, d = scene()
    with pytest.raises(ValueError, match="pan: expected shape"):
        run(randomised(), pan.expand(-1, 2, -1, -1), ms, d)
