"""One training loop for every model; what differs between models is a `Recipe`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import options
from ..data.hdf5 import Epochs, PanCollection, Samples
from ..data.sensors import get_sensor
from ..files import atomic, check_folder
from ..nn.recompute import recomputing
from ..options import shortened
from .checkpoint import load_optimizer, load_state, optimizer_tensors, save_state
from .config import TrainConfig
from .logs import Logs

logger = logging.getLogger("pansharp_fast")

Batch = Mapping[str, Tensor]


class Recipe(Protocol):
    """How one model is trained. Built from a configuration; images are shares of the peak (`data.PanCollection`)."""

    #: Name on the command line.
    name: ClassVar[str]
    #: Class of the configuration.
    config_class: ClassVar[type[TrainConfig]]
    #: Whether samples must bring `lms`.
    needs_lms: ClassVar[bool]

    def __init__(self, config: Any) -> None: ...

    def build(self, bands: int, device: torch.device) -> nn.Module:
        """The module whose parameters are trained. Frozen helpers belong to the recipe, moved to `device` here."""
        ...

    def training_data(self, data: PanCollection) -> Samples:
        """What training samples are read from, called after `build`: `data`, or the same samples with more in them."""
        ...

    def loss(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars of one batch, each a mean over its samples. "loss" is minimised, the others are logged.

        `model` may be wrapped: call it, but do not use other attributes than `forward`.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sharpened images [B, C, 4h, 4w] as shares of the peak, from `ms`, `pan`, `lpan` and perhaps `lms`."""
        ...

    def save(self, path: Path, model: nn.Module, metadata: dict[str, Any]) -> None:
        """Write a checkpoint that inference reads."""
        ...


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step`, counted from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "step":
        return config.lr * 0.5 ** sum(step >= milestone for milestone in config.milestones)
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class _Batches:
    """Batch sampler: every epoch its own permutation, (epoch, index) pairs, from any step on, one share a process."""

    def __init__(self, length: int, config: TrainConfig, start: int, rank: int, world: int) -> None:
        self.length, self.config, self.start, self.rank, self.world = length, config, start, rank, world
        self.per_epoch = length // config.batch_size

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.config.batch_size
        epoch, order = -1, np.empty(0, dtype=int)
        for step in range(self.start, self.config.steps):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                order = np.random.default_rng([self.config.seed, epoch]).permutation(self.length)
            first = step % self.per_epoch * size
            yield [(epoch, int(index)) for index in order[first + self.rank : first + size : self.world]]


def quality(fused: Tensor, gt: Tensor) -> dict[str, float]:
    """Means over images of PSNR (dB, bands pooled), SAM (degrees) and ERGAS (ratio 4), all on shares of the peak."""
    fused, gt = fused.double().clamp(0, 1), gt.double()
    error = (fused - gt).square()
    psnr = -10 * torch.log10(error.mean((1, 2, 3)))
    ergas = 25 * (error.mean((2, 3)) / gt.mean((2, 3)).square()).mean(1).sqrt()
    cosine = nn.functional.cosine_similarity(fused, gt, dim=1).clamp(-1, 1)
    sam = torch.rad2deg(torch.acos(cosine)).mean((1, 2))
    return {"psnr": float(psnr.mean()), "sam": float(sam.mean()), "ergas": float(ergas.mean())}


class Trainer:
    """Trains `recipe` by its configuration; every process of a torchrun job builds one.

    Files in `config.out`: `last.safetensors` (the whole state, for `run(resume=True)`), `best.safetensors` (weights
    of the best validation, for inference), `log.csv`, `valid.csv`, TensorBoard events, `valid.png`, `config.json`.

    A run is a function of its configuration: order, orientation and dropout of a step follow from the seed and the
    step alone, so a run killed at any moment and resumed gives the same weights, on the CPU bit for bit.

    Raises:
        ValueError: files without gt, of other bands than each other, or a batch that the processes cannot share.
    """

    def __init__(self, recipe: Recipe, config: TrainConfig, *, progress: bool = True) -> None:
        self.recipe, self.config = recipe, config
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = options.device(config.device)
        if self.device == torch.device("cuda") and self.world > 1:
            self.device = options.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            torch.cuda.set_device(self.device)  # NCCL, and whatever else asks for the current one
        self.progress = progress and self.rank == 0
        if config.batch_size % self.world:
            raise ValueError(f"batch_size: expected a multiple of {self.world} processes, got {config.batch_size}")
        names = ("train", "valid", "init", "prior", "teacher")
        inputs = {name: [path] for name in names if (path := getattr(config, name, None))}
        check_folder("out", config.out, ("last.safetensors", "best.safetensors"), inputs)
        reading: dict[str, Any] = {"sensor": config.sensor, "peak": config.peak, "lms": recipe.needs_lms}
        self.train_data, self.valid_data = (
            PanCollection(config.train, **reading),
            PanCollection(config.valid, **reading),
        )
        for data in (self.train_data, self.valid_data):
            if not data.has_gt:
                raise ValueError(f"{data.path}: expected a data set gt, got none")
        if self.valid_data.bands != self.train_data.bands:
            raise ValueError(f"valid: expected {self.train_data.bands} bands as in train, got {self.valid_data.bands}")
        if len(self.train_data) < config.batch_size:
            raise ValueError(f"batch_size: expected at most {len(self.train_data)} samples, got {config.batch_size}")
        self.rgb = (2, 1, 0) if self.train_data.bands >= 3 else (0, 0, 0)
        if config.sensor is not None:
            self.rgb = get_sensor(config.sensor).rgb
        self.out = Path(config.out)
        torch.manual_seed(config.seed)
        self.model = recipe.build(self.train_data.bands, self.device).to(self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.average: dict[str, Tensor] = {}
        self.step, self.best = 0, -math.inf

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `last.safetensors`."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        meta = {"recipe": self.recipe.name, "step": self.step, "best": None if self.best == -math.inf else self.best}
        save_state(self.out / "last.safetensors", tensors, meta)

    def load(self) -> None:
        """Continue from `last.safetensors`.

        Raises:
            ValueError: the file is of another recipe or of other shapes.
            OSError: there is no such file.
        """
        path = self.out / "last.safetensors"
        tensors, meta = load_state(path)
        if meta.get("recipe") != self.recipe.name:
            raise ValueError(f"{path}: expected a state of recipe {self.recipe.name}, got {meta.get('recipe')!r}")
        step, best = meta.get("step"), meta.get("best")
        if not (isinstance(step, int) and step >= 0 and isinstance(best, float | None)):
            raise ValueError(f"{path}: expected a step and a best measure, got {step!r} and {best!r}")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        try:
            for name, value in tensors.items():
                part, rest = name.split(".", 1)
                parts[part][rest] = value
            self.model.load_state_dict(parts["model"])
            load_optimizer(self.optimizer, parts["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path}: expected the state of this configuration, got {shortened(error)}") from None
        self.average = {name: value.to(self.device) for name, value in parts["average"].items()}
        self.step = step
        self.best = -math.inf if best is None else best

    # -- one step ------------------------------------------------------------------------------------------------------

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return options.autocast(self.config.precision, self.device)

    def _to_device(self, batch: Batch) -> dict[str, Tensor]:
        form = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return {name: image.to(self.device, non_blocking=True, memory_format=form) for name, image in batch.items()}

    def _update(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Optimise on one batch; the scalars of the recipe, of this process."""
        seed = np.random.SeedSequence([self.config.seed, self.step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        with self._autocast(), recomputing(self.config.recompute):
            scalars = self.recipe.loss(model, self._to_device(batch), self.step)
        self.optimizer.zero_grad(set_to_none=True)
        scalars["loss"].backward()
        if self.config.clip > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.step += 1
        if self.config.ema > 0 and self.step >= self.config.ema_start:
            state = self.model.state_dict()
            if not self.average:
                self.average = {name: value.clone() for name, value in state.items()}
            for name, value in state.items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - self.config.ema)
                else:
                    self.average[name].copy_(value)
        return {name: value.detach() for name, value in scalars.items()}

    def _mean(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Mean over the processes."""
        values = torch.stack([value.float() for value in scalars.values()])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return dict(zip(scalars, values.tolist(), strict=True))

    # -- validation ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, with the moving average as its weights where there is one."""
        kept = None
        if self.average:
            kept = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.average)
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train()
            if kept is not None:
                self.model.load_state_dict(kept)

    @torch.no_grad()
    def validate(self) -> tuple[dict[str, float], tuple[Tensor, Tensor, Tensor]]:
        """Measures on the validation split, and (ms, result, gt) of its first sample."""
        pixels = self.train_data.size[0] * self.train_data.size[1] * self.config.batch_size
        size = max(1, pixels // (self.valid_data.size[0] * self.valid_data.size[1]))
        totals: dict[str, float] = {}
        first = None
        with self.averaged() as model:
            for batch in DataLoader(self.valid_data, size):
                batch = self._to_device(batch)
                with self._autocast():
                    fused = self.recipe.predict(model, batch)
                for name, value in quality(fused.float(), batch["gt"]).items():
                    totals[name] = totals.get(name, 0.0) + value * len(fused)
                if first is None:
                    first = (batch["ms"][0], fused[0], batch["gt"][0])
        assert first is not None  # PanCollection refuses empty files
        return {name: value / len(self.valid_data) for name, value in totals.items()}, first

    def _after_validation(self, logs: Logs) -> None:
        measures, images = self.validate()
        logs.validation(self.step, measures, images, self.rgb)
        score = measures[self.config.select] * (1 if self.config.select == "psnr" else -1)
        if score > self.best:
            self.best = score
            with self.averaged() as model:
                self.recipe.save(self.out / "best.safetensors", model, {"step": self.step, "validation": measures})

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> dict[str, float]:
        """Train to `config.steps`; with `resume`, from `last.safetensors` if there is one.

        Returns:
            Measures of the last validation.

        Raises:
            ValueError: the folder holds a run already and `resume` was not asked for.
        """
        state = self.out / "last.safetensors"
        if state.exists() and not resume:
            raise ValueError(f"out: expected a folder without a run, got {self.out} (resume it or choose another)")
        if resume and state.exists():
            self.load()
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        logs = None
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            with atomic(self.out / "config.json") as part:
                part.write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
            logs = Logs(self.out, self.config, self.step, self.progress)
        try:
            self._run(logs)
            measures = self.validate()[0] if self.rank == 0 else {}
        finally:
            if logs is not None:
                logs.close()
            if self.world > 1:
                dist.destroy_process_group()
        return measures

    def _run(self, logs: Logs | None) -> None:
        config = self.config
        model: nn.Module = self.model.train()
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(
                self.model, [self.device] if self.device.index is not None else None
            )
        data = Epochs(self.recipe.training_data(self.train_data), config.seed, config.augment)
        batches = _Batches(len(self.train_data), config, self.step, self.rank, self.world)
        loader = DataLoader(
            data, batch_sampler=batches, num_workers=config.workers, pin_memory=self.device.type == "cuda"
        )
        for batch in loader:
            scalars = self._update(model, batch)
            if self.step % config.log_every == 0 or self.step == config.steps:
                means = self._mean(scalars)
                if not math.isfinite(means["loss"]):
                    raise ValueError(f"loss: expected a finite number at step {self.step}, got {means['loss']}")
                if logs is not None:
                    logs.training(self.step, means, learning_rate(config, self.step - 1))
            if logs is None:
                continue
            logs.advance(self.step)
            if self.step % config.valid_every == 0 or self.step == config.steps:
                self._after_validation(logs)
            if self.step % config.save_every == 0 or self.step == config.steps:
                self.save()
