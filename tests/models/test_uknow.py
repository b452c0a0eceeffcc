"""Prior network, teacher and student: the public release's values, and behaviour on other inputs."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import pywt
import torch
from torch.nn import functional as F

from pansharp_fast import use_backend
from pansharp_fast.compat import from_official
from pansharp_fast.diffusion import Sampling, sharpen_by_sampling
from pansharp_fast.models import (
    Condition,
    FSAConfig,
    FSAStudent,
    FSATeacher,
    PriorConfig,
    PriorNet,
    load_model,
    save_model,
)
from pansharp_fast.models.condition import highpass, wavelet_condition
from tests.support.backends import needs_interpreter

CONDITION = tuple(field.name for field in dataclasses.fields(Condition))


def load(folder, name):
    """(official constructor's arguments, weights, inputs, outputs) of a golden file."""
    with np.load(folder / f"{name}.npz") as file:
        config = json.loads(str(file["config"]))
        tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}
    parts = ({k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in ("w/", "in/", "out/"))
    return config, *parts


def assert_near(actual, expected, tolerance):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def tiny(cls, bands=4, **changes):
    torch.manual_seed(1)
    config = FSAConfig.preset("tiny", bands=bands, teacher=cls is FSATeacher)
    model = cls(dataclasses.replace(config, **changes)).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    return model


def images(height, width, bands=4, batch=1):
    return torch.rand(batch, bands, height, width), torch.rand(batch, 1, height, width)


def test_prior_golden(golden):
    config, weights, inputs, outputs = load(golden, "prior")
    # The release's own state dict holds the residual units a second time.
    twins = {f"backbone.{int(key[3]) - 1}.{key[5:]}": value for key, value in weights.items() if key.startswith("res")}
    model = from_official("prior", config, weights | twins)
    with torch.no_grad():
        result = model(inputs["lms"], inputs["pan"])
    assert_near(result.out, outputs["out"], 1e-5)
    assert_near(result.variance, outputs["variance"], 1e-5)
    with pytest.raises(RuntimeError, match=r"backbone\.0"):
        from_official("prior", config, weights | {key: value + 1 for key, value in twins.items()})


@pytest.mark.parametrize("name", ["fsa_s", "fsa_t"])
@pytest.mark.parametrize("prepared", [False, True])
def test_golden(golden, name, prepared):
    config, weights, inputs, outputs = load(golden, name)
    model = from_official(name, config, weights)
    assert model.config.released_sampling
    with torch.no_grad():
        condition = Condition(**{key: inputs[key] for key in CONDITION if key in inputs})
        result = model(
            inputs["x"],
            inputs["time"],
            model.prepare(condition) if prepared else condition,
            inputs["self_cond"],
            return_features=True,
        )
    assert_near(result.out, outputs["out"], 1e-5)
    if "variance" in outputs:
        assert_near(result.variance, outputs["variance"], 1e-5)
    else:
        assert result.variance is None
    assert len(result.features) == 7
    for number, feature in enumerate(result.features):
        assert_near(feature, outputs[f"feat{number}"], 1e-5)


@pytest.mark.parametrize("bands", [4, 8])
def test_official_tensors_of_full_size(golden, bands):
    official = json.loads((golden / "official_state_dict_keys.json").read_text())
    with torch.device("meta"):
        teacher = FSAConfig.preset("released", bands=bands, teacher=True)
        models = {
            f"FSA_T(bands={bands}, res_blocks=3)": FSATeacher(dataclasses.replace(teacher, prior=None)),
            f"FSA_S(bands={bands}, res_blocks=2)": FSAStudent(FSAConfig.preset("released", bands=bands, teacher=False)),
            f"PanNet_variance(bands={bands})": PriorNet(PriorConfig.preset("released", bands=bands)),
        }
    for name, model in models.items():
        shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        assert shapes == {key: shape for key, shape in official[name].items() if "backbone" not in key}


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
@pytest.mark.parametrize("size", [(20, 16), (17, 9), (4, 4)])
def test_any_size_is_padded_and_cropped(cls, size):
    model = tiny(cls)
    lms, pan = images(*size)
    with torch.no_grad():
        result = model(torch.randn_like(lms), torch.tensor([3]), model.condition(lms, pan))
    assert result.out.shape == lms.shape
    assert result.out.isfinite().all()
    if cls is FSATeacher:
        assert result.variance.shape == lms.shape
        assert (result.variance > 0).all()


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_fresh_network_predicts_no_residual(cls):
    model = cls(FSAConfig.preset("tiny", bands=4, teacher=cls is FSATeacher))
    lms, pan = images(8, 8)
    assert not model(torch.randn_like(lms), torch.tensor([3]), model.condition(lms, pan)).out.any()
    torch.testing.assert_close(PriorNet(PriorConfig.preset("tiny", bands=4))(lms, pan).out, lms)


def test_padding_repeats_the_border():
    model = tiny(FSAStudent)
    lms, pan = images(10, 12)
    x = torch.randn_like(lms)
    pad = (0, 0, 0, 2)
    with torch.no_grad():
        small = model(x, torch.tensor([3]), Condition(lms, pan)).out
        whole = model(
            *(F.pad(x, pad, mode="replicate"), torch.tensor([3])),
            Condition(F.pad(lms, pad, mode="replicate"), F.pad(pan, pad, mode="replicate")),
        ).out
    torch.testing.assert_close(small, whole[:, :, :10])


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_every_parameter_gets_a_gradient(cls):
    model = tiny(cls).train()
    for module in model.modules():
        if hasattr(module, "drop_path_prob"):
            module.drop_path_prob = 0.0  # a dropped branch gets none
    lms, pan = images(16, 16, batch=2)
    result = model(torch.randn_like(lms), torch.tensor([3, 400]), model.condition(lms, pan), torch.randn_like(lms))
    (result.out.square().mean() + (0 if result.variance is None else result.variance.mean())).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    assert all(not p.requires_grad for name, p in model.named_parameters() if name.startswith("prior."))


def test_self_condition_falls_back_to_the_noisy_residual_and_can_be_absent():
    lms, pan = images(8, 8)
    x, time = torch.randn_like(lms), torch.tensor([7])
    with torch.no_grad():
        model = tiny(FSAStudent)
        without, given = (model(x, time, Condition(lms, pan), self_cond).out for self_cond in (None, x))
        other = model(x, time, Condition(lms, pan), x + 1).out
        torch.testing.assert_close(without, given)
        assert not torch.allclose(other, given)
        model = tiny(FSAStudent, self_condition=False)
        torch.testing.assert_close(
            model(x, time, Condition(lms, pan), x + 1).out, model(x, time, Condition(lms, pan)).out
        )


def test_wavelet_condition_is_that_of_pywavelets():
    lms, pan = images(12, 10)
    actual = wavelet_condition(lms, pan)
    [(low, _)] = pywt.swt2(lms.numpy(), "haar", 1)
    [(_, details)] = pywt.swt2(pan.numpy(), "haar", 1)
    torch.testing.assert_close(actual, torch.from_numpy(np.concatenate([low, *details], 1)))
    odd = wavelet_condition(lms[..., :11, :9], pan[..., :11, :9])
    assert odd.shape == (1, 7, 11, 9)
    torch.testing.assert_close(odd[..., :10, :8], actual[..., :10, :8])


def test_highpass_removes_the_mean_of_a_window():
    pan = torch.rand(1, 1, 9, 9)
    torch.testing.assert_close(highpass(pan)[0, 0, 4, 4], pan[0, 0, 4, 4] - pan[0, 0, 2:7, 2:7].mean())
    torch.testing.assert_close(highpass(torch.full((1, 1, 4, 4), 3.0)), torch.zeros(1, 1, 4, 4))


def test_released_preset_gives_high_passed_pan_but_wavelets_of_raw_pan():
    lms, pan = images(8, 8)
    with torch.no_grad():
        condition = tiny(FSATeacher, highpass_pan=True).condition(lms, pan)
    torch.testing.assert_close(condition.pan, highpass(pan))
    torch.testing.assert_close(condition.wavelets, wavelet_condition(lms, pan))


def test_configuration_survives_json():
    config = FSAConfig.preset("tiny", bands=4, teacher=True)
    assert FSAConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 0}, "bands: expected a whole number from 1 to 1024, got 0"),
        ({"inner_channel": 12}, "inner_channel: expected a positive multiple of 8, got 12"),
        ({"prediction": "x0"}, "prediction: expected one of sample, epsilon, v_prediction, got 'x0'"),
    ],
)
def test_bad_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        FSAConfig(**change)


def test_bad_official_configuration():
    for name, config, message in (
        ("fsa_s", {"in_channel": 4, "out_channel": 8}, "config: expected out_channel=4"),
        ("fsa_t", {"inner": 4}, r"expected arguments of the official constructor, got \['inner'\]"),
        ("prior", {"bands": 4}, r"config: expected arguments of the official constructor, got \['bands'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            from_official(name, config, {})


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
def test_checkpoint(tmp_path, cls):
    model = tiny(cls)
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors", bands=4)
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of"):
        FSAConfig.preset("huge", bands=4, teacher=False)
    with pytest.raises(ValueError, match="preset: expected one of"):
        PriorConfig.preset("huge", bands=4)


def test_bad_input():
    teacher = tiny(FSATeacher)
    lms, pan = images(8, 8)
    x, time = torch.zeros_like(lms), torch.tensor([1])
    condition = teacher.condition(lms, pan)
    cases = [
        (x, time, dataclasses.replace(condition, lms=lms[:, :3]), "lms: expected 4 bands, got 3"),
        (x, time, dataclasses.replace(condition, pan=pan[..., :4]), "pan: expected the size of lms, 8x8, got 8x4"),
        (x, time, dataclasses.replace(condition, wavelets=None), r"wavelets: expected \[1, 7, 8, 8\], got None"),
        (x, time, dataclasses.replace(condition, pre_out=lms[..., 1:]), r"pre_out: expected \[1, 4, 8, 8\]"),
        (x[..., 1:], time, condition, r"x: expected \[1, 4, 8, 8\]"),
        (x, torch.tensor([1, 2]), condition, r"time: expected \[1\]"),
    ]
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            teacher(*arguments)
    with pytest.raises(ValueError, match="self_cond: expected"):
        teacher(x, time, condition, x[:, :2])
    with pytest.raises(ValueError, match="pan: expected"):
        teacher.condition(lms, pan[..., :4])
    with pytest.raises(ValueError, match=r"config\.prior"):
        tiny(FSATeacher, prior=None).condition(lms, pan)


@pytest.mark.parametrize("cls", [FSAStudent, FSATeacher])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-5), (torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_other_dtypes(cls, dtype, share):
    """One step, forward and backward, and a sampling run; share: of the residual that rounding may take.

    The teacher's phases jump at their cut, which rounding decides.
    """
    if cls is FSATeacher and dtype != torch.float64:
        share *= 3
    model = tiny(cls)
    lms, pan = images(32, 24)
    x, time = torch.randn_like(lms), torch.tensor([17])
    exact = model(x, time, model.condition(lms, pan)).out.detach()
    other = copy.deepcopy(model).to(dtype)
    result = other(x.to(dtype), time, other.condition(lms.to(dtype), pan.to(dtype))).out
    assert result.dtype == dtype
    assert (result - exact).norm() <= share * exact.norm()
    result.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in other.parameters() if p.requires_grad)
    image, spread = sharpen_by_sampling(other, 2000 * pan, 2000 * lms[:, :, ::4, ::4], 2047, Sampling(steps=2))
    assert image.dtype == spread.dtype == torch.float32
    assert image.isfinite().all()


@needs_interpreter
def test_student_by_the_passes_of_gpus():
    """Features follow the layout of the weights; in channels_last norms and sums run by the Triton kernels."""
    model = FSAStudent(FSAConfig.preset("tiny", bands=4, teacher=False)).eval()
    torch.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
    x, time = torch.randn(2, 4, 12, 16), torch.tensor([3, 400])
    with torch.no_grad():
        condition = model.condition(torch.rand(2, 4, 12, 16), torch.rand(2, 1, 12, 16))
        with use_backend("reference"):
            expected = model(x, time, condition).out
        with use_backend("triton"), torch.profiler.profile() as trace:
            actual = model(x, time, condition).out
    assert sum(each.count for each in trace.key_averages() if each.key == "pansharp_fast::norm_fwd_triton") > 10
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
