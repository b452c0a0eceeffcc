"""How U-Know-DiffPAN is trained: prior network, teacher, and the student that distils it (arXiv 2412.06243)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.hdf5 import PanCollection, Samples
from ..diffusion import Schedule, sample
from ..models import Condition, FSAConfig, FSAStudent, FSATeacher, PriorConfig, PriorNet, load_model, save_model
from ..models.condition import highpass
from ..options import PREDICTIONS, expect
from .config import PRECISION_HELP, TrainConfig, key
from .knowledge import TeacherKnowledge, make_knowledge, wait_for
from .loop import Batch
from .losses import beta_nll_loss, distillation_loss, laplace_nll_loss


@dataclass(kw_only=True)
class UKnowTrainConfig(TrainConfig):
    """Keys of `TrainConfig`, with the release's values, and these."""

    preset: str = key("network: released, paper or tiny", "paper")
    batch_size: int = key("samples of a step, over all processes", 32)
    weight_decay: float = key("of AdamW", 1e-4)
    warmup: int = key("steps over which the learning rate rises from 0", 0)
    schedule: str = key("of the learning rate after warm-up: cosine (to 0) or step", "step")
    milestones: tuple[int, ...] = key(
        "schedule step: the rate is halved at each of these steps", (100_000, 200_000, 350_000)
    )
    clip: float = key("largest norm of the gradient; 0: no clipping", 0.003)
    ema: float = key("decay of the weights' moving average, which is then validated and kept; 0: none", 0.995)
    ema_start: int = key("step at which the moving average begins", 20_000)
    precision: str = key(PRECISION_HELP, "float32")


@dataclass(kw_only=True)
class PriorTrainConfig(UKnowTrainConfig):
    """Keys of `train prior`. The publications do not say how long the prior network was trained."""

    steps: int = key("optimiser steps of the whole run", 100_000)


@dataclass(kw_only=True)
class DiffusionTrainConfig(UKnowTrainConfig):
    """Keys that teacher and student share."""

    sample_steps: int = key("DDIM steps of a validation", 25)
    prediction: str = key("what the network predicts: sample (x0), epsilon or v_prediction", "sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        expect("prediction", self.prediction, PREDICTIONS)


@dataclass(kw_only=True)
class TeacherTrainConfig(DiffusionTrainConfig):
    """Keys of `train teacher`."""

    steps: int = key("optimiser steps of the whole run", 400_000)
    prior: str = key("checkpoint of the prior network")
    loss: str = key("beta_nll (public release) or laplace (paper, eq. 4); empty: by preset", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in ("", "beta_nll", "laplace"):
            raise ValueError(f"loss: expected beta_nll or laplace, got {self.loss!r}")


@dataclass(kw_only=True)
class StudentTrainConfig(DiffusionTrainConfig):
    """Keys of `train student`."""

    steps: int = key("optimiser steps of the whole run", 300_000)
    teacher: str = key("checkpoint of the teacher")
    knowledge: str = key(
        "online (the teacher runs at the student's own time step), cached (sampled once over the training file) or "
        "released (cached by the release's sampling, weights of distrust not clamped)",
        "online",
    )
    cache: str = key("HDF5 file of cached knowledge, made where it does not exist; empty: teacher.h5 in out", "")
    cache_float16: bool = key("keep cached knowledge in half precision", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knowledge not in ("online", "cached", "released"):
            raise ValueError(f"knowledge: expected online, cached or released, got {self.knowledge!r}")
        if self.knowledge != "online" and self.augment:
            raise ValueError("augment: expected false, as cached maps cannot be turned with the images, got true")


class _Recipe:
    """What the three recipes share."""

    needs_lms: ClassVar[bool] = True

    def training_data(self, data: PanCollection) -> Samples:
        return data

    def save(self, path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        save_model(path, model, metadata)


class PriorRecipe(_Recipe):
    """`training.Recipe` of the prior network: beta-NLL, as for the released teacher."""

    name: ClassVar[str] = "prior"
    config_class: ClassVar[type[TrainConfig]] = PriorTrainConfig

    def __init__(self, config: PriorTrainConfig) -> None:
        self.config = config
        self.highpass = False

    def build(self, bands: int, device: torch.device) -> nn.Module:
        config = PriorConfig.preset(self.config.preset, bands=bands)
        self.highpass = config.highpass_pan
        return PriorNet(config)

    def _pan(self, batch: Batch) -> Tensor:
        return highpass(batch["pan"]) if self.highpass else batch["pan"]

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        out, variance = model(batch["lms"], self._pan(batch))
        loss = beta_nll_loss(out.float(), variance.float(), batch["gt"])
        return {"loss": loss, "l1": (out - batch["gt"]).abs().mean()}

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["lms"], self._pan(batch)).out


@dataclass(frozen=True)
class _Noisy:
    """A training batch of the diffusion: the truth x0, its noisy version x at time, an estimate of x0 or None."""

    x0: Tensor
    noise: Tensor
    x: Tensor
    time: Tensor
    estimate: Tensor | None


class _DiffusionRecipe(_Recipe):
    """What teacher and student share: `network` is the module being trained, unwrapped."""

    network: Any

    def __init__(self, config: Any) -> None:
        self.config = config
        self.schedule = Schedule()

    def _draw(self, model: nn.Module, batch: Batch, cond: Condition) -> _Noisy:
        """Noise at uniform times; half the time the network's own estimate as self-condition."""
        x0 = batch["gt"] - batch["lms"]
        noise = torch.randn_like(x0)
        time = torch.randint(self.schedule.length, (len(x0),), device=x0.device)
        x = self.schedule.add_noise(x0, noise, time)
        estimate = None
        if self.network.config.self_condition and torch.rand(()) < 0.5:
            with torch.no_grad():
                estimate = self._x0(model(x, time, cond).out, x, time)
        return _Noisy(x0, noise, x, time, estimate)

    def _x0(self, out: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return self.schedule.to_x0(out.float(), x, time, self.config.prediction)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        network: Any = model
        cond = network.condition(batch["lms"], batch["pan"])
        released = network.config.released_sampling
        result = sample(network, cond, steps=self.config.sample_steps, seed=self.config.seed, released=released)
        return batch["lms"] + result.residual


class TeacherRecipe(_DiffusionRecipe):
    """`training.Recipe` of the teacher, with a trained prior network."""

    name: ClassVar[str] = "teacher"
    config_class: ClassVar[type[TrainConfig]] = TeacherTrainConfig

    def build(self, bands: int, device: torch.device) -> nn.Module:
        prior = load_model(self.config.prior, bands=bands)
        if not isinstance(prior, PriorNet):
            raise ValueError(f"prior: expected weights of a prior network, got {prior.architecture}")
        preset = FSAConfig.preset(self.config.preset, bands=bands, teacher=True)
        if prior.config.highpass_pan != preset.highpass_pan:
            raise ValueError(
                f"prior: expected highpass_pan={preset.highpass_pan} as in preset {self.config.preset}, "
                f"got {prior.config.highpass_pan}"
            )
        changes = {"prior": prior.config, "prediction": self.config.prediction}
        self.network = FSATeacher(FSAConfig(**{**preset.to_dict(), **changes}))
        self.network.prior.load_state_dict(prior.state_dict())
        self.laplace = (self.config.loss or ("laplace" if self.config.preset == "paper" else "beta_nll")) == "laplace"
        return self.network

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        cond = self.network.condition(batch["lms"], batch["pan"])
        noisy = self._draw(model, batch, cond)
        out, variance, _ = model(noisy.x, noisy.time, cond, noisy.estimate)
        target = self.schedule.target(noisy.x0, noisy.noise, noisy.time, self.config.prediction)
        loss = laplace_nll_loss if self.laplace else beta_nll_loss
        return {"loss": loss(out.float(), variance, target), "l1": (out - target).abs().mean()}


class StudentRecipe(_DiffusionRecipe):
    """`training.Recipe` of the student."""

    name: ClassVar[str] = "student"
    config_class: ClassVar[type[TrainConfig]] = StudentTrainConfig

    def build(self, bands: int, device: torch.device) -> nn.Module:
        self.teacher = load_model(self.config.teacher, bands=bands, device=device)
        if not isinstance(self.teacher, FSATeacher):
            raise ValueError(f"teacher: expected weights of a teacher, got {self.teacher.architecture}")
        self.teacher.requires_grad_(False)
        preset = FSAConfig.preset(self.config.preset, bands=bands, teacher=False)
        for name in ("inner_channel", "channel_mults"):
            ours, theirs = getattr(preset, name), getattr(self.teacher.config, name)
            if ours != theirs:
                raise ValueError(f"teacher: expected {name}={ours} as in preset {self.config.preset}, got {theirs}")
        self.network = FSAStudent(FSAConfig(**{**preset.to_dict(), "prediction": self.config.prediction}))
        return self.network

    def training_data(self, data: PanCollection) -> Samples:
        if self.config.knowledge == "online":
            return data
        path = Path(self.config.cache or Path(self.config.out) / "teacher.h5")
        released = self.config.knowledge == "released"
        if int(os.environ.get("RANK", "0")) > 0:
            wait_for(path)
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make_knowledge(
                *(data, path, self.teacher),
                released=released,
                steps=self.config.sample_steps,
                float16=self.config.cache_float16,
                seed=self.config.seed,
            )
        return TeacherKnowledge(data, path, self.teacher, released)

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        cond = self.network.condition(batch["lms"], batch["pan"])
        noisy = self._draw(model, batch, cond)
        out, _, features = model(noisy.x, noisy.time, cond, noisy.estimate, return_features=True)
        if self.config.knowledge == "online":
            with torch.no_grad():
                told = self.teacher(
                    *(noisy.x, noisy.time, self.teacher.condition(batch["lms"], batch["pan"])), return_features=True
                )
                knowledge = self._teacher_x0(told.out, noisy), told.variance, told.features[1:]
        else:
            names = [f"teacher_feature{number}" for number in range(1, len(features))]
            knowledge = batch["teacher_out"], batch["teacher_variance"], [batch[name] for name in names]
        x0 = self._x0(out, noisy.x, noisy.time)
        loss = distillation_loss(
            *(noisy.x0, knowledge[0], x0, knowledge[2], features[1:], knowledge[1]),
            released=self.config.knowledge == "released",
        )
        return {"loss": loss, "l1": (x0 - noisy.x0).abs().mean()}

    def _teacher_x0(self, out: Tensor, noisy: _Noisy) -> Tensor:
        return self.schedule.to_x0(out.float(), noisy.x, noisy.time, self.teacher.config.prediction)
