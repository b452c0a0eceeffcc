"""The table of measures: every one can be taken, and says rightly which direction is better."""

import math

import pytest
import torch

from pansharp_fast.classical import fuse
from pansharp_fast.data import get_sensor
from pansharp_fast.data.observation import blur, move, observe
from pansharp_fast.metrics.measures import FULL, MEASURES, REDUCED, SHIFTED, Result

D = torch.tensor([[0.5, -1.0], [0.6, -0.8], [0.4, -0.9], [1.2, 0.3]])


@pytest.fixture(scope="module")
def results():
    """(good, bad) at reduced and at full resolution, by name of the protocol."""
    rng = torch.Generator().manual_seed(2)
    detail = blur(torch.rand(1, 1, 192, 192, generator=rng, dtype=torch.float64), 1.0)
    slow = blur(torch.rand(1, 4, 192, 192, generator=rng, dtype=torch.float64), 8.0)
    scene = 600 + 2500 * (detail - detail.mean() + slow - slow.mean())
    pan, sensor = scene.mean(1, keepdim=True), get_sensor("QB")
    known = {"ratio": 4, "phase": 1.5, "d": D}
    ms = observe(scene, (48, 48), gains=sensor.gains(4), **known)
    gsa = fuse("gsa", pan, ms, sensor=sensor, **known)
    grain = blur(torch.randn(1, 4, 192, 192, generator=rng, dtype=torch.float64), 1.5)
    bad = scene + 400 * grain
    rest = {"pan": pan, "ms": ms, "sensor": sensor, "peak": 2047, "ratio": 4, "phase": 1.5}
    frames = [move(x, D) for x in (scene + 0.1 * grain, bad)]
    return {
        "reduced": [Result(x, gt=move(scene, D), cut=8, **rest) for x in frames],
        "full": [Result(x, d=D, reference=gsa, **rest) for x in (scene, bad)],
    }


@pytest.mark.parametrize("name", [*REDUCED, "sharpness", *FULL])
def test_direction(results, name):
    measure = MEASURES[name]
    good, bad = (float(measure.function(r)) for r in results["full" if name in FULL else "reduced"])
    assert math.isfinite(good)
    assert math.isfinite(bad)
    if measure.larger is None:
        assert abs(good - 1) < abs(bad - 1)
    else:
        # D_s compares likeness to PAN, which noise changes either way; the textbook's take the displacement for a flaw.
        assert (good > bad) == measure.larger or name in ("D_s registered", "D_lambda", "D_s", "QNR", "HQNR")


def test_table():
    assert set(MEASURES) == {*REDUCED, *SHIFTED, *FULL}
    assert MEASURES["PSNR"].heading == "PSNR [dB] ↑"
    assert MEASURES["SAM"].heading == "SAM [°] ↓"
    assert MEASURES["Laplacian energy"].heading == "Laplacian energy"
    assert MEASURES["ERGAS"].text(1.23456) == "1.235"


def test_what_is_missing_is_said(results):
    with pytest.raises(ValueError, match="gt: expected a ground truth"):
        MEASURES["PSNR"].function(results["full"][0])
    with pytest.raises(ValueError, match="reference: expected registered GSA"):
        MEASURES["halo"].function(results["reduced"][0])
