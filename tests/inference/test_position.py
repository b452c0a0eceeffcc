"""Where things lie: exact pairs through files whose grids are off each other by fractions of a pixel."""

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

from pansharp_fast import sharpen_scene
from pansharp_fast.data.observation import blur, observe

from .conftest import GRID

GAINS = (0.34, 0.32, 0.30, 0.22)
#: Sub-pixel offsets of MS's grid against PAN's, (rows, columns) in PAN pixels.
OFFSETS = [(round(0.37 * k % 1, 2), round(0.71 * k % 1, 2)) for k in range(1, 13)]
#: Rows and columns at PAN's border that are not looked at, and MS pixels beyond PAN.
CUT, BEYOND = 16, 4


def sharp(size: int) -> torch.Tensor:
    """[1, 1, size, size] float64 between 200 and 1200, detail at all scales."""
    rng = np.random.default_rng(3)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * frequency**-1.3).real
    return torch.from_numpy(700 + 150 * (field / field.std()).clip(-3.3, 3.3))[None, None]


def displacement(image: torch.Tensor, pan: torch.Tensor) -> torch.Tensor:
    """[C, 2], (dy, dx) by which bands show what PAN shows: least squares over PAN's slopes, to first order."""
    slopes = torch.gradient(pan[0, 0])
    inside = np.s_[CUT:-CUT, CUT:-CUT]
    model = torch.stack([part[inside].flatten() for part in (-slopes[0], -slopes[1], pan[0, 0])], 1)
    model = torch.cat([model, torch.ones_like(model[:, :1])], 1)
    bands = image[0][:, CUT:-CUT, CUT:-CUT].flatten(1).T
    solution = torch.linalg.lstsq(model, bands).solution
    return (solution[:2] / solution[2]).T


def at_scales(image: torch.Tensor, pan: torch.Tensor) -> torch.Tensor:
    """[scale, C, 2]: of fine detail, and of what MS itself shows."""
    return torch.stack(
        [displacement(blur(image, s) - blur(image, 3 * s), blur(pan, s) - blur(pan, 3 * s)) for s in (0.8, 2.5)]
    )


def run(raster, tmp_path, offset, told, method="auto", ratio=4, **options) -> torch.Tensor:
    """OUT of a pair whose MS lies `offset` PAN pixels off the next aligned grid and whose file says `told`."""
    size = 144
    pan = sharp(size)
    x = torch.cat([pan * a + 20 * b for b, a in enumerate((0.8, 1.0, 0.9, 1.3))], 1)
    begin = -BEYOND * ratio
    count = size // ratio + 2 * BEYOND
    phase = [begin + o + (ratio - 1) / 2 for o in offset]
    ms = observe(x, (count, count), gains=GAINS, ratio=ratio, phase=phase)
    place = GRID @ Affine.translation(begin + told[1], begin + told[0]) @ Affine.scale(ratio)
    files = [
        raster(f"{name}.tif", image[0].numpy().astype("float32"), transform=transform)
        for name, image, transform in (("pan", pan, GRID), ("ms", ms, place))
    ]
    out = tmp_path / "out.tif"
    sharpen_scene(*files, out, method=method, register="off", mtf=GAINS, overwrite=True, **options)
    with rasterio.open(out) as file:
        return at_scales(torch.from_numpy(file.read().astype(float))[None], pan)


@pytest.mark.parametrize(
    ("ratio", "offset"), [*((4, offset) for offset in OFFSETS), (2, OFFSETS[0]), (3, OFFSETS[1]), (6, OFFSETS[2])]
)
def test_details_lie_where_pan_s_do(raster, tmp_path, ratio, offset):
    for method, steps in (("auto", "auto"), ("auto", 0), ("gsa", 0), ("mtf-glp-fs", 0)):
        found = run(raster, tmp_path, offset, offset, method, ratio, back_projection=steps)
        assert float(found.abs().max()) < 0.03, method


def test_a_grid_that_is_wrong_is_seen(raster, tmp_path):
    """By the method whose result would otherwise lie exactly in place; MS is drawn up and left."""
    right, wrong = (
        run(raster, tmp_path, (0.6, 0.8), told, "mtf-glp-fs", back_projection=0) for told in ((0.6, 0.8), (0.5, 0.6))
    )
    assert float(right.abs().max()) < 1e-4
    dy, dx = wrong[1].T
    assert -0.1 < float(dy.min()) < float(dy.max()) < -0.05
    assert -0.2 < float(dx.min()) < float(dx.max()) < -0.1
