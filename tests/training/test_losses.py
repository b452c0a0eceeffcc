"""Losses of U-Know-DiffPAN: the public release's values and the paper's equations."""

import numpy as np
import pytest
import torch

from pansharp_fast.training.losses import beta_nll_loss, distillation_loss, laplace_nll_loss


@pytest.fixture(scope="module")
def values(golden):
    with np.load(golden / "losses.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "config"}


def features(values, who):
    return [values[f"in/{who}_feat{number}"] for number in range(6)]


def arguments(values):
    return {key: values[f"in/{name}"] for key, name in (("target", "gt"), ("teacher", "teacher"), ("pred", "pred"))}


def test_golden(values):
    kd = distillation_loss(
        **arguments(values),
        teacher_features=features(values, "teacher"),
        student_features=features(values, "student"),
        variance=values["in/variance"],
        released=True,
    )
    torch.testing.assert_close(kd, values["out/kd"], rtol=1e-5, atol=0)
    for beta, key in ((0.0, "out/beta_nll_0"), (0.5, "out/beta_nll_05")):
        loss = beta_nll_loss(values["in/pred"], values["in/variance"], values["in/gt"], beta)
        torch.testing.assert_close(loss, values[key], rtol=1e-5, atol=1e-7)


def test_distrusted_teacher_is_left_out_unless_released():
    target, pred = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    theta = torch.full_like(target, 3.0)
    loss = distillation_loss(target, target, pred, [], [], theta)
    assert loss.item() == pytest.approx(4.0)
    assert distillation_loss(target, target, pred, [], [], theta, released=True).item() == pytest.approx(4.0 - 0.1 * 2)


def test_beta_weights_carry_no_gradient():
    variance = torch.tensor([2.0], requires_grad=True)
    beta_nll_loss(torch.zeros(1), variance, torch.ones(1), 0.5).backward()
    # d/ds (1/s + ln s)/2 at 2, times 2**0.5
    assert variance.grad.item() == pytest.approx(2**0.5 * 0.5 * (0.5 - 0.25))


def test_laplace_likelihood_is_least_where_theta_is_the_error():
    error = torch.full((1,), 0.3)
    theta = torch.linspace(0.05, 1, 96)
    losses = [laplace_nll_loss(error, t[None], torch.zeros(1)) for t in theta]
    assert theta[int(torch.stack(losses).argmin())].item() == pytest.approx(0.3, abs=0.01)
    assert laplace_nll_loss(error, torch.ones(1), torch.zeros(1)).item() == pytest.approx(0.15)


def test_bad_input(values):
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"variance: expected the shape of target \[1, 1, 2, 2\], got \[1, 1, 1, 2\]"):
        beta_nll_loss(x, x[:, :, :1], x, 0.5)
    with pytest.raises(ValueError, match="beta: expected a value >= 0, got -1"):
        beta_nll_loss(x, x, x, -1)
    with pytest.raises(ValueError, match="student_features: expected 1 maps, got 0"):
        distillation_loss(x, x, x, [x], [], x)
    with pytest.raises(ValueError, match=r"student_features\[0\]: expected the shape of teacher_features\[0\]"):
        distillation_loss(x, x, x, [x], [x[..., :1]], x)
