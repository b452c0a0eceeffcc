"""Sharpening with diffusion models: noise by place, uncertainty, options, errors."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from click.testing import CliRunner

from pansharp_fast.cli import main
from pansharp_fast.data import interp23
from pansharp_fast.diffusion import Sampling, sample, scene_noise, sharpen_by_sampling, uncertainty_kind
from pansharp_fast.inference import sharpen, sharpen_scene, sharpen_with_uncertainty
from pansharp_fast.models import (
    Condition,
    FSAConfig,
    FSAStudent,
    FSATeacher,
    Prediction,
    PriorConfig,
    PriorNet,
    save_model,
)
from pansharp_fast.models.fsa import Prepared

from .local_model import LocalModel

pytest.importorskip("diffusers")


class PixelModel(torch.nn.Module):
    """A diffusion model that sees one pixel at a time, so that only the noise can make tiles disagree."""

    architecture = "uknow-student"
    config = SimpleNamespace(bands=4, released_sampling=False, prediction="sample")

    def __init__(self, variance=None):
        super().__init__()
        self.variance = variance

    def condition(self, lms, pan):
        return Condition(lms, pan)

    def prepare(self, cond):
        return Prepared(tuple(cond.lms.shape), torch.cat([cond.lms, cond.pan], 1), {}, {})

    def forward(self, x, time, cond, self_cond=None, return_features=False):
        variance = None if self.variance is None else torch.full_like(x, self.variance)
        return Prediction(0.05 * x.tanh() + 0.1 * cond.images[:, 4:], variance)


def random_model(cls):
    torch.manual_seed(0)
    model = cls(FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher))
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    return model


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "student.safetensors"
    save_model(path, random_model(FSAStudent))
    return path


def images(height=64, width=80):
    return torch.rand(1, 1, height, width) * 2047, torch.rand(1, 4, height // 4, width // 4) * 2047


def read(path):
    with rasterio.open(path) as file:
        return file.read(), file.dtypes[0]


def test_tiles_agree(scene):
    pan, ms = scene(200, 240, "float32")
    results = []
    for tile in (96, 256):
        out, unc = pan.parent / f"{tile}.tif", pan.parent / f"{tile}_unc.tif"
        options = {"sampling": Sampling(steps=4, samples=2), "uncertainty": unc}
        sharpen_scene(pan, ms, out, weights=PixelModel(), tile=tile, overlap=32, **options)
        results.append((read(out)[0], read(unc)[0]))
    # The interpolation of MS reaches over the margin of a tile by its last taps only.
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-4 * 2047)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-4 * 2047)
    assert results[0][1].std() > 0


def test_seed_and_samples():
    pan, ms = images()
    model = PixelModel()
    one, same, other = (sharpen(pan, ms, weights=model, sampling=Sampling(steps=3, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    draws = [
        sharpen_by_sampling(model, pan, ms, 2047, Sampling(steps=3, samples=count, seed=1))[0] for count in (1, 8, 64)
    ]
    errors = [(draw - draws[2]).square().mean() for draw in draws[:2]]
    assert errors[1] < errors[0] / 4


def test_uncertainty_is_the_spread_of_the_samples():
    pan, ms = images(16, 16)
    _, uncertainty = sharpen_by_sampling(PixelModel(), pan, ms, 2047, Sampling(steps=2, samples=3, seed=5))
    single = []
    for number in range(3):
        noise = scene_noise(4, 0, 0, 16, 16, seed=5, sample=number)[None]
        condition = Condition(torch.zeros(1, 4, 16, 16), pan / 2047)
        single.append(sample(PixelModel(), condition, steps=2, noise=noise).residual)
    torch.testing.assert_close(uncertainty, torch.stack(single).std(0) * 2047, rtol=1e-4, atol=1e-2)


def test_teachers_variance_and_spread_add_up():
    pan, ms = images(16, 16)
    sampling = Sampling(steps=2, samples=3)
    _, spread = sharpen_by_sampling(PixelModel(), pan, ms, 2047, sampling)
    _, total = sharpen_by_sampling(PixelModel(variance=0.01), pan, ms, 2047, sampling)
    torch.testing.assert_close(total, (spread.square() + 0.01 * 2047**2).sqrt())


def test_residual_is_added_to_the_interpolation():
    pan, ms = images(96, 96)
    pan = torch.zeros_like(pan)
    quiet = Sampling(steps=1, samples=400)
    result, _ = sharpen_by_sampling(PixelModel(), pan, ms, 2047, quiet)
    middle = (..., slice(44, 52), slice(44, 52))
    torch.testing.assert_close(result[middle], interp23(ms)[middle], rtol=0, atol=0.02 * 2047)


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_arrays(cls):
    model = random_model(cls)
    pan, ms = (image.numpy().astype(np.uint16) for image in images(24, 40))
    image, uncertainty = sharpen_with_uncertainty(pan, ms, weights=model, sampling=Sampling(steps=4))
    assert image.shape == uncertainty.shape == (1, 4, 24, 40)
    assert (image.dtype, uncertainty.dtype) == (np.uint16, np.float32)
    assert np.isfinite(uncertainty).all()
    assert (uncertainty > 0).any()


def test_command(scene, weights):
    pan, ms = scene(72, 100)
    out, unc = pan.parent / "out.tif", pan.parent / "unc.tif"
    arguments = ["sharpen", *map(str, (pan, ms, out)), "--weights", str(weights), "--quiet", "--tile", "64"]
    arguments += ["--overlap", "16", "--model", "uknow-student", "--steps", "4", "--samples", "1"]
    result = CliRunner().invoke(main, [*arguments, "--uncertainty", str(unc)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    image, dtype = read(out)
    assert (image.shape, dtype) == ((4, 72, 100), "uint16")
    uncertainty, dtype = read(unc)
    assert (uncertainty.shape, dtype) == ((4, 72, 100), "float32")
    assert (uncertainty > 0).all()
    with rasterio.open(unc) as file, rasterio.open(out) as reference:
        assert (file.transform, file.crs) == (reference.transform, reference.crs)
        assert "drift" in file.tags()["PANSHARP_UNCERTAINTY"]
        assert "is no standard deviation" in file.tags()["PANSHARP_UNCERTAINTY"]
        assert "PANSHARP_UNCERTAINTY" not in reference.tags()


def test_uncertainty_is_named_for_what_it_is():
    assert uncertainty_kind("uknow-student", 1).startswith("drift in DN")
    assert uncertainty_kind("uknow-student", 2).startswith("standard deviation in DN of the samples")
    assert uncertainty_kind("uknow-teacher", 1).startswith("standard deviation in DN by the teacher")
    assert all("not calibrated" in uncertainty_kind("uknow-teacher", n) for n in (1, 5))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "uknow-teacher"], 1, "weights: expected those of uknow-teacher, got uknow-student"),
        (["--steps", "501"], 1, "steps: expected 1 to 500"),
        (["--samples", "0"], 2, "0 is not in the range"),
        (["--sampler", "euler"], 2, "'euler' is not one of"),
        (["--uncertainty", "OUT"], 1, "uncertainty: expected another file than OUT"),
        (["--uncertainty", "PAN", "--overwrite"], 1, "uncertainty: expected another file than the input"),
    ],
)
def test_bad_options(scene, weights, arguments, code, message):
    pan, ms = scene(32, 32)
    out = pan.parent / "out.tif"
    arguments = [{"OUT": str(out), "PAN": str(pan)}.get(argument, argument) for argument in arguments]
    command = ["sharpen", *map(str, (pan, ms, out)), "--weights", str(weights), "--quiet", *arguments]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())
    assert not out.exists()


def test_models_that_do_not_sample(scene, tmp_path):
    pan, ms = scene(32, 32)
    with pytest.raises(ValueError, match="steps, samples and uncertainty: expected weights of uknow-student"):
        sharpen_scene(pan, ms, tmp_path / "out.tif", weights=LocalModel(), uncertainty=tmp_path / "unc.tif")
    with pytest.raises(ValueError, match="expected those of a model that sharpens by itself, got uknow-prior"):
        sharpen(*images(8, 8), weights=PriorNet(PriorConfig.preset("tiny", bands=4)))
    teacher = FSATeacher(dataclasses.replace(FSAConfig.preset("tiny", bands=4, teacher=True), prior=None))
    with pytest.raises(ValueError, match=r"config\.prior: expected the prior network's configuration"):
        sharpen(*images(8, 8), weights=teacher)
    assert list(tmp_path.glob("*unc*")) == []
