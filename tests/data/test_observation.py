"""The observation model: interp23 and the toolbox's MTF as special cases, displacement, adjoint sizes, gradients."""

import math

import pytest
import torch

from pansharp_fast.data import decimate, interp23, mtf_filter, shift
from pansharp_fast.data.observation import back_project, move, mtf_sigma, observe, resample, upsample

GAINS = (0.34, 0.32, 0.30, 0.22)


@pytest.fixture
def smooth() -> torch.Tensor:
    """[1, 4, 128, 128] float64, band-limited and not periodic."""
    y, x = torch.meshgrid(*[torch.arange(128.0, dtype=torch.float64)] * 2, indexing="ij")
    return torch.stack([torch.sin(x / (5 + b) + y / 9) + torch.cos(y / (6 + b) - x / 11) for b in range(4)])[None]


def wave(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A continuous image, well below the Nyquist frequency of a pixel."""
    return torch.sin(0.31 * x + 0.17 * y) + torch.cos(0.23 * y - 0.11 * x)


def sampled(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return wave(rows[:, None], columns)[None, None]


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_upsampling_is_interp23_at_the_toolbox_s_phase(ratio):
    x = torch.rand(1, 2, 40, 44, dtype=torch.float64)
    inner = slice(12 * ratio, -12 * ratio)  # interp23's border is circular
    ours = upsample(x, (40 * ratio, 44 * ratio), ratio=ratio, phase=ratio / 2)
    torch.testing.assert_close(ours[..., inner, inner], interp23(x, ratio)[..., inner, inner], rtol=0, atol=1e-8)


@pytest.mark.parametrize("phase", [0.0, 1.5, 2.0, (0.7, -3.1)])
@pytest.mark.parametrize("ratio", [1.5, 2, 3, 4.3, (3.9, 4.1), 16])
def test_upsampling_lands_where_ratio_phase_and_d_say(ratio, phase):
    ratios = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    phases = phase if isinstance(phase, tuple) else (phase, phase)
    d = torch.tensor([[0.8, -1.3]], dtype=torch.float64)
    # MS sample k shows, at PAN position phase + ratio k, what PAN shows d before; units of MS pixels.
    k = torch.arange(48.0, dtype=torch.float64)
    rows, columns = ((phases[i] + ratios[i] * k - d[0, i]) / ratios[i] for i in (0, 1))
    size = tuple(int(40 * r) for r in ratios)
    out = upsample(sampled(rows, columns), size, ratio=ratio, phase=phase, d=d)
    rows, columns = (torch.arange(float(n), dtype=torch.float64) / r for n, r in zip(size, ratios, strict=True))
    inner = tuple(slice(int(14 * r), int(30 * r)) for r in ratios)
    expected = sampled(rows, columns)
    torch.testing.assert_close(out[..., inner[0], inner[1]], expected[..., inner[0], inner[1]], rtol=0, atol=2e-4)


def test_observation_is_the_toolbox_s_mtf_but_for_its_sum(smooth):
    ours = observe(smooth, (32, 32), gains=GAINS, ratio=4, phase=2)
    theirs = decimate(mtf_filter(smooth, "QB", 4), 4)
    # Its window takes .1 % off the sum and changes the response to a wave by a few tenths of a percent.
    assert float((ours * 0.9988 - theirs).abs().max()) < 0.004 * float(smooth.max() - smooth.min())


def test_observation_of_a_displaced_scene(smooth):
    d = torch.tensor([[0.3, -0.7], [1.25, 0.0], [2.0, 2.0], [-1.0, 1.4]])
    moved = torch.cat([shift(smooth[:, b : b + 1], *map(float, d[b])) for b in range(4)], 1)
    inner = slice(8, -8)
    torch.testing.assert_close(
        observe(smooth, (32, 32), gains=GAINS, ratio=4, phase=2, d=d)[..., inner, inner],
        observe(moved, (32, 32), gains=GAINS, ratio=4, phase=2)[..., inner, inner],
        rtol=0,
        atol=1e-4,  # of a shift by Fourier transform, whose mirrored border has a kink
    )


def test_mtf_gain_is_met():
    """A wave at MS's Nyquist frequency comes through with the gain asked for."""
    for ratio, gain in ((2, 0.3), (4, 0.22), (6, 0.4)):
        x = torch.cos(math.pi / ratio * torch.arange(40.0 * ratio, dtype=torch.float64)).expand(1, 1, 8, -1)
        seen = observe(x, (8, 40), gains=[gain], ratio=(1.5, ratio), phase=(0, 0))
        assert float(seen[..., 10:-10].abs().max()) == pytest.approx(gain, rel=1e-3)
    with pytest.raises(ValueError, match=r"gains: expected numbers between 0 and 1, got 1\.2"):
        mtf_sigma(1.2, 4)


def test_moving_there_and_back(smooth):
    d = torch.tensor([[0.4, -0.3], [1.5, 0.25], [0, 0], [2, -3]])
    there_and_back = move(move(smooth, d), -d)
    inner = slice(20, -20)
    torch.testing.assert_close(there_and_back[..., inner, inner], smooth[..., inner, inner], rtol=0, atol=1e-3)
    torch.testing.assert_close(move(smooth, d)[:, 3, 2:, :-3], smooth[:, 3, :-2, 3:])


def test_a_batch_has_displacements_of_its_own(smooth):
    d = torch.tensor([[[0.5, 1.0]] * 4, [[-1.0, 0.25]] * 4])
    both = upsample(smooth.expand(2, -1, -1, -1), (256, 256), ratio=2, d=d)
    for image in (0, 1):
        torch.testing.assert_close(both[image : image + 1], upsample(smooth, (256, 256), ratio=2, d=d[image]))


@pytest.mark.parametrize("steps", [1, 3, "auto"])
def test_back_projection_comes_closer_to_ms(smooth, steps):
    d = torch.tensor([[0.3, -0.7]] * 4)
    options = {"gains": GAINS, "ratio": 4, "phase": 1.5, "d": d}
    ms = observe(smooth, (32, 32), **options)
    start = upsample(ms, (128, 128), ratio=4, phase=1.5, d=d)
    closer = back_project(start, ms, **options, steps=steps)
    before, after = (float((ms - observe(x, (32, 32), **options)).square().mean()) for x in (start, closer))
    assert after < 0.7 * before
    torch.testing.assert_close(back_project(smooth, ms, **options, steps=steps), smooth, rtol=0, atol=1e-9)


def test_gradients():
    ms = torch.rand(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    x = torch.rand(1, 2, 18, 15, dtype=torch.float64, requires_grad=True)
    d = torch.tensor([[0.4, -0.2], [1.1, 0.6]])
    options = {"ratio": 3, "d": d}
    assert torch.autograd.gradcheck(lambda m: upsample(m, (18, 15), **options), ms)
    assert torch.autograd.gradcheck(lambda p: observe(p, (6, 5), gains=(0.3, 0.2), **options), x)
    assert torch.autograd.gradcheck(lambda p, m: back_project(p, m, gains=(0.3, 0.2), **options, steps=2), (x, ms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(smooth, dtype):
    out = upsample(smooth.to(dtype), (256, 256), ratio=2)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), upsample(smooth, (256, 256), ratio=2), rtol=0, atol=0.05)


def test_bad_arguments(smooth):
    with pytest.raises(ValueError, match=r"ratio: expected MS pixels 1.5 to 16 times .*, got 1 x 1"):
        upsample(smooth, (128, 128), ratio=1)
    with pytest.raises(ValueError, match=r"d: expected \[4, 2\] or \[B, 4, 2\], got \(3, 2\)"):
        upsample(smooth, (128, 128), ratio=2, d=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="gains: expected 4, got 3"):
        observe(smooth, (32, 32), gains=(0.3,) * 3, ratio=4)
    with pytest.raises(ValueError, match="back_projection: expected auto or a number from 0, got -1"):
        back_project(smooth, smooth, gains=GAINS, ratio=4, steps=-1)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor"):
        resample(smooth.int(), (4, 4), None, 1)
