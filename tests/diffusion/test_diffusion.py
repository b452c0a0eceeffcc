"""Schedule, samplers and scene noise."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from pansharp_fast.diffusion import Schedule, sample, sampling, scene_noise
from pansharp_fast.models import Condition, FSAConfig, FSAStudent, FSATeacher, Prediction
from pansharp_fast.models.fsa import Prepared
from tests.support.graphs import counted

pytest.importorskip("diffusers")


class Recorder(nn.Module):
    """A network that estimates `truth` up to an error growing with the noise, and notes what it was told."""

    def __init__(self, truth, kind="sample"):
        super().__init__()
        self.config = FSAConfig(bands=truth.shape[1], prediction=kind)
        self.truth, self.times, self.self_conditions = truth, [], []

    def prepare(self, cond):
        return Prepared(tuple(cond.lms.shape), cond.lms, {}, {})

    def forward(self, x, time, cond, self_cond=None, return_features=False):
        self.times.append(int(time[0]))
        self.self_conditions.append(self_cond)
        schedule = Schedule()
        signal, sigma = schedule.factors(time)
        noise = (x - signal * self.truth) / sigma
        return Prediction(schedule.target(self.truth, noise, time, self.config.prediction), torch.ones_like(x))


@pytest.fixture(scope="module")
def ddim(golden):
    with np.load(golden / "ddim25.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}


def pair(shape=(2, 4, 8, 8)):
    return Condition(torch.rand(shape), torch.rand(shape[0], 1, *shape[2:]))


def test_schedule_golden(ddim):
    schedule = Schedule(500, 0.008)
    torch.testing.assert_close(schedule.betas, ddim["out/betas"], rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), ddim["out/alphas_cumprod"], rtol=1e-6, atol=0)
    steps = ddim["out/timesteps"]
    torch.testing.assert_close(
        schedule.alphas_cumprod[steps].float(), ddim["out/respaced_alphas_cumprod"], rtol=1e-6, atol=0
    )


def test_released_sampling_golden(golden, ddim):
    with np.load(golden / "fsa_s.npz") as file:
        weights = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("w/")}
    model = FSAStudent(FSAConfig(bands=4, inner_channel=8, attn_res=(4,), res_blocks=1, image_size=32)).eval()
    model.load_state_dict(weights)
    condition = Condition(ddim["in/lms"], ddim["in/pan"])
    result = sample(model, condition, steps=25, noise=ddim["in/noise"], released=True)
    expected = ddim["out/residual"]
    assert (result.residual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert result.variance is None
    assert not torch.allclose(sample(model, condition, noise=ddim["in/noise"]).residual, expected, rtol=1e-2)


def test_default_feeds_true_time_and_last_estimate():
    truth = torch.randn(1, 4, 8, 8)
    model = Recorder(truth)
    result = sample(model, pair((1, 4, 8, 8)), steps=25, seed=0)
    assert model.times == [20 * k for k in range(24, -1, -1)]
    assert model.self_conditions[0] is None
    assert all(estimate is truth for estimate in model.self_conditions[1:])
    torch.testing.assert_close(result.residual, truth)
    torch.testing.assert_close(result.variance, torch.ones_like(truth))
    model = Recorder(truth)
    sample(model, pair((1, 4, 8, 8)), steps=25, seed=0, released=True)
    assert model.times == list(range(24, -1, -1))
    assert model.self_conditions == [None] * 25


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 7, 500])
def test_exact_network_is_recovered(sampler, kind, steps):
    truth = torch.randn(1, 2, 4, 4)
    result = sample(Recorder(truth, kind), pair((1, 2, 4, 4)), steps=steps, sampler=sampler, seed=0)
    torch.testing.assert_close(result.residual, truth, rtol=1e-2, atol=1e-2)


def test_few_steps_of_dpm_begin_at_pure_noise():
    model = Recorder(torch.zeros(1, 2, 4, 4))
    sample(model, pair((1, 2, 4, 4)), steps=5, sampler="dpm++", seed=0)
    assert model.times[0] == 499


def test_forward_and_inverse_agree():
    schedule = Schedule()
    x0, noise, time = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.tensor([0, 10, 250, 400])
    x = schedule.add_noise(x0, noise, time)
    for kind in ("sample", "epsilon", "v_prediction"):
        estimate = schedule.to_x0(schedule.target(x0, noise, time, kind), x, time, kind)
        torch.testing.assert_close(estimate, x0, rtol=1e-4, atol=1e-4)


def test_seed_decides():
    torch.manual_seed(3)
    model = FSAStudent(FSAConfig.preset("tiny", bands=4, teacher=False)).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    condition = pair()
    first, same, other = (sample(model, condition, steps=3, seed=seed).residual for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)


def test_drift_measures_the_estimates_of_the_second_half():
    class Moving(Recorder):
        def forward(self, x, time, cond, self_cond=None, return_features=False):
            super().forward(x, time, cond, self_cond)
            return Prediction(torch.full_like(x, float(len(self.times))))

    result = sample(Moving(torch.zeros(1, 2, 4, 4)), pair((1, 2, 4, 4)), steps=4, seed=0)
    torch.testing.assert_close(result.drift, torch.full((1, 2, 4, 4), 0.5))


def test_scene_noise_belongs_to_places():
    whole = scene_noise(3, 0, 0, 150, 200, seed=1)
    window = scene_noise(3, 50, 70, 90, 33, seed=1)
    assert torch.equal(window, whole[:, 50:140, 70:103])
    assert torch.equal(scene_noise(2, 0, 0, 150, 200, seed=1), whole[:2])
    for other in (scene_noise(3, 0, 0, 150, 200, seed=2), scene_noise(3, 0, 0, 150, 200, seed=1, sample=1)):
        assert abs(torch.corrcoef(torch.stack([other.flatten(), whole.flatten()]))[0, 1]) < 0.02
    assert abs(whole.mean()) < 0.02
    assert whole.std().item() == pytest.approx(1, abs=0.02)
    neighbour = torch.corrcoef(torch.stack([whole[:, :, 1:].flatten(), whole[:, :, :-1].flatten()]))[0, 1]
    assert abs(neighbour) < 4 / math.sqrt(whole.numel())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_recorded_step_is_the_step(cls, released):
    torch.manual_seed(3)
    model = cls(FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher)).cuda().eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    with torch.no_grad():
        condition = model.condition(torch.rand(2, 4, 32, 40).cuda(), torch.rand(2, 1, 32, 40).cuda())
    options = {"steps": 6, "seed": 5, "released": released, "return_features": True}
    plain, graphed = (sample(model, condition, cuda_graph=graph, **options) for graph in (False, True))
    # The teacher's phases jump at the cut: another order of sums moves its output.
    tolerance = 3e-2 if cls is FSATeacher else 1e-4
    for name in ("residual", "variance", "drift"):
        expected, actual = getattr(plain, name), getattr(graphed, name)
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert (actual - expected).norm() <= tolerance * expected.norm()
    assert len(graphed.features) == len(plain.features)


@pytest.mark.gpu
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_recordings_serve_later_runs(monkeypatch, cls, released):
    graphs = counted(monkeypatch)
    monkeypatch.setattr(sampling, "_records", lambda x: True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(3)
    model = cls(FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher)).to(device).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    tolerance = 3e-2 if cls is FSATeacher and device == "cuda" else 1e-4

    def run(model, width):
        with torch.no_grad():
            images = torch.rand(1, 4, 24, width, device=device), torch.rand(1, 1, 24, width, device=device)
            condition = model.condition(*images)
        plain, graphed = (
            sample(model, condition, cuda_graph=graph, steps=3, seed=len(graphs), released=released).residual
            for graph in (False, True)
        )
        assert (plain - graphed).norm() <= tolerance * plain.norm()

    run(model, 32)
    run(model, 32)
    assert len(graphs) == 1
    run(model, 40)
    assert len(graphs) == 2
    run(model, 32)
    assert len(graphs) == 2
    for parameter in model.parameters():
        parameter.data.mul_(0.9)  # seen where it lies
    run(model, 40)
    assert len(graphs) == 2
    for parameter in model.parameters():
        parameter.data = parameter.data.mul(0.9)
    run(model, 40)
    assert len(graphs) == 3
    seen = []
    handle = model.mid[0].register_forward_hook(lambda *call: seen.append(call))
    run(model, 40)
    assert len(seen) == 6
    handle.remove()
    copied = weakref.ref(model)
    del model, handle
    seen.clear()
    gc.collect()
    assert copied() is None


def test_what_cannot_be_recorded_is_called(monkeypatch):
    counted(monkeypatch)

    def fails(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    monkeypatch.setattr(sampling, "_records", lambda x: True)
    model = FSAStudent(FSAConfig.preset("tiny", bands=4, teacher=False)).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)
    with torch.no_grad():
        condition = model.condition(torch.rand(1, 4, 16, 16), torch.rand(1, 1, 16, 16))
    expected = sample(model, condition, steps=4, seed=1).residual
    with pytest.warns(UserWarning, match="CUDA graph: the model is called instead .RuntimeError: operation not perm"):
        actual = sample(model, condition, steps=4, seed=1, cuda_graph=True).residual
    assert torch.equal(actual, expected)
    assert torch.equal(sample(model, condition, steps=4, seed=1, cuda_graph=True).residual, expected)  # and no warning


def test_bad_input():
    model, condition = Recorder(torch.zeros(2, 4, 8, 8)), pair()
    with pytest.raises(ValueError, match=r"steps: expected 1 to 500 \(the schedule's length\), got 501"):
        sample(model, condition, steps=501)
    with pytest.raises(ValueError, match="steps: expected 1 to 500"):
        sample(model, condition, steps=0)
    with pytest.raises(ValueError, match="sampler: expected one of"):
        sample(model, condition, sampler="euler")
    with pytest.raises(ValueError, match=r"noise: expected \[2, 4, 8, 8\], got \[2, 4, 8, 4\]"):
        sample(model, condition, noise=torch.zeros(2, 4, 8, 4))
    with pytest.raises(ValueError, match="cuda_graph: expected tensors on a CUDA device, got cpu"):
        sample(model, condition, cuda_graph=True)
    with pytest.raises(ValueError, match="top: expected a value >= 0, got -1"):
        scene_noise(1, -1, 0, 4, 4, seed=0)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        Schedule(0)
