"""The losses of PAN-Crafter's recipe, by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from pansharp_fast.training import load_config, recipe_class
from pansharp_fast.training.pancrafter import spectral_angle


class Constant(torch.nn.Module):
    """Answers 0.1 in PAN mode and 0.2 in MS mode, and remembers what it was asked."""

    def forward(self, pan, lpan, ms, mode):
        self.asked = pan, lpan, ms, mode
        return torch.where(mode == 1, 0.2, 0.1).view(-1, 1, 1, 1).expand(-1, ms.shape[1], *pan.shape[2:])


def recipe(**keys):
    cls = recipe_class("pancrafter")
    return cls(load_config(cls.config_class, None, train="a", valid="b", out="c", **keys))


@pytest.fixture
def batch():
    sizes = {"pan": (4, 1, 16, 16), "lpan": (4, 1, 4, 4), "ms": (4, 3, 4, 4), "gt": (4, 3, 16, 16)}
    return {name: torch.rand(size) for name, size in sizes.items()}


def test_both_modes_in_each_batch(batch):
    model = Constant()
    scalars = recipe(pan_weight=0.5).loss(model, batch, 0)
    pan, lpan, ms, mode = model.asked
    assert mode.tolist() == [1] * 4 + [0] * 4
    for given, name in ((pan, "pan"), (lpan, "lpan"), (ms, "ms")):
        torch.testing.assert_close(given, torch.cat([batch[name]] * 2) * 2 - 1)

    def up(image):
        return F.interpolate(image, scale_factor=4, mode="bicubic")

    # On the scale of [-1, 1]: equations 1 and 3, and their L1 distances (4).
    ms_loss = (up(2 * batch["ms"] - 1) + 0.2 - (2 * batch["gt"] - 1)).abs().mean()
    repeated = (2 * batch["pan"] - 1).repeat(1, 3, 1, 1)
    pan_loss = (up(2 * batch["lpan"] - 1).repeat(1, 3, 1, 1) + 0.1 - repeated).abs().mean()
    torch.testing.assert_close(scalars["ms"], ms_loss)
    torch.testing.assert_close(scalars["pan"], pan_loss)
    torch.testing.assert_close(scalars["loss"], ms_loss + 0.5 * pan_loss)


def test_share_of_the_pan_mode(batch):
    model = Constant()
    recipe(pan_share=0.25).loss(model, batch, 0)
    assert model.asked[3].tolist() == [1, 1, 1, 1, 0]
    torch.testing.assert_close(model.asked[0][4], model.asked[0][0])


def test_spectral_angle_counts_from_its_step(batch):
    keys = {"sam_weight": 2.0, "sam_start": 5}
    before, after = (recipe(**keys).loss(Constant(), batch, step) for step in (4, 5))
    torch.testing.assert_close(before["loss"], before["ms"] + before["pan"])
    torch.testing.assert_close(after["loss"], before["loss"] + 2 * before["sam"])
    fused = F.interpolate(2 * batch["ms"] - 1, scale_factor=4, mode="bicubic") + 0.2
    torch.testing.assert_close(before["sam"], spectral_angle((fused + 1) / 2, batch["gt"]))


def test_spectral_angle_of_a_known_rotation():
    gt = torch.tensor([0.3, 0.4]).view(1, 2, 1, 1).repeat(1, 1, 2, 2)
    angle = math.radians(2)
    c, s = math.cos(angle), math.sin(angle)
    fused = 1.7 * torch.stack([c * gt[:, 0] - s * gt[:, 1], s * gt[:, 0] + c * gt[:, 1]], 1)
    assert float(spectral_angle(fused, gt)) == pytest.approx(angle, rel=1e-3)
    same = gt.clone().requires_grad_()
    spectral_angle(same, gt).backward()
    assert bool(same.grad.isfinite().all())


def test_starting_from_weights(tmp_path):
    from pansharp_fast.models import PANCrafter, preset, save_model

    model = PANCrafter(preset("tiny", bands=4, num_heads=8))
    save_model(tmp_path / "w.safetensors", model)
    built = recipe(init=tmp_path / "w.safetensors", preset="paper").build(4, torch.device("cpu"))
    assert built.config == model.config
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="expected a model for 8 bands"):
        recipe(init=tmp_path / "w.safetensors").build(8, torch.device("cpu"))


def test_prediction_is_the_models_own_sharpening():
    """`predict` on shares of the peak and the model's `sharpen` on digital numbers are one function."""
    ours = recipe(preset="tiny")
    model = ours.build(4, torch.device("cpu")).eval()
    torch.nn.init.normal_(model.output[2].weight, std=0.1)  # zero in a fresh network
    from pansharp_fast.data import lpan

    pan, ms = torch.rand(2, 1, 32, 32), torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        predicted = ours.predict(model, {"pan": pan, "ms": ms, "lpan": lpan(pan)})
    torch.testing.assert_close(predicted * 1023, model.sharpen(pan * 1023, ms * 1023, 1023), rtol=1e-4, atol=1e-2)
