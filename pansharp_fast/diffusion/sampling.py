"""Sampling of residuals with the samplers of diffusers."""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..models.condition import Condition
from ..models.fsa import Prediction, Prepared
from ..nn.plain import hooked
from ..ops._backends import recording, requested, tf32_allowed
from ..options import SAMPLERS, expect
from .schedule import Schedule

if TYPE_CHECKING:
    from ..models import FSAStudent, FSATeacher


class Sample(NamedTuple):
    """Result of `sample`, each [B, C, H, W]; residual and drift in float32, or float64 from a network in float64.

    residual: x0, to be added to lms. variance: the teacher's uncertainty at the last step, else None. drift: standard
    deviation of the x0 estimates over the second half of the steps, a weaker sign of uncertainty that a student gives
    too. features: on request those of the last step (see `Prediction`).
    """

    residual: Tensor
    variance: Tensor | None
    drift: Tensor
    features: tuple[Tensor, ...] | None = None


def _scheduler(sampler: str, schedule: Schedule, steps: int) -> Any:
    """diffusers' scheduler, set to `steps` of the schedule's steps."""
    try:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    except ImportError as error:
        raise ImportError("diffusers is not installed; run: pip install 'pansharp_fast[diffusion]'") from error
    options: dict[str, Any] = {
        "num_train_timesteps": schedule.length,
        "trained_betas": schedule.betas.tolist(),
        "prediction_type": "sample",  # what a network says is turned into x0 first: self-conditioning needs it anyway
    }
    scheduler: Any
    if sampler == "ddim":  # the release's steps 0, T / steps, 2 T / steps, ...
        scheduler = DDIMScheduler(**options, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True)
    else:  # few steps must begin at the last time step, where x_t is noise
        scheduler = DPMSolverMultistepScheduler(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


def _records(x: Tensor) -> bool:
    return x.is_cuda


class _Recorded:
    """A model's step as a CUDA graph: launched as one, without Python between its kernels.

    What records it computes nothing; before it the model must have run once, which makes plans and workspaces. Recorded
    is the memory of the weights as they lie.
    """

    def __init__(self, model: Any, x: Tensor, time: Tensor, prepared: Prepared, pool: Any) -> None:
        self.inputs = x.clone(), time.clone(), x.clone()
        self.prepared: Prepared = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, prepared)
        self.graph = torch.cuda.CUDAGraph()
        with recording(self.graph, pool):
            self.output = model(*self.inputs[:2], self.prepared, self.inputs[2])

    def load(self, prepared: Prepared) -> None:
        """Serve another sampling run."""
        for static, given in zip(tree_leaves(self.prepared), tree_leaves(prepared), strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)

    def __call__(self, x: Tensor, time: Tensor, self_cond: Tensor | None) -> Prediction:
        for static, given in zip(self.inputs, (x, time, x if self_cond is None else self_cond), strict=True):
            static.copy_(given)
        self.graph.replay()
        out, variance, _ = self.output
        return Prediction(out.clone(), None if variance is None else variance.clone())  # the next replay writes there


class _Recordings:
    """A model's recorded steps, by everything that they hold fixed. They share memory: one runs at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.fails = False
        self.steps: OrderedDict[Any, _Recorded] = OrderedDict()

    @staticmethod
    def key(model: Any, x: Tensor, prepared: Prepared) -> Any:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        settings = requested()[0], tf32_allowed(), torch.backends.cudnn.allow_tf32, autocast, model.training
        memory = tuple(t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers()))
        leaves = tuple(
            (leaf.shape, leaf.dtype, leaf.stride()) if isinstance(leaf, Tensor) else leaf
            for leaf in tree_leaves(prepared)
        )
        return x.shape, x.dtype, x.device, leaves, settings, memory, tuple(map(id, model.modules()))

    def record(self, key: Any, model: Any, x: Tensor, time: Tensor, prepared: Prepared) -> _Recorded | None:
        """The step as a graph; None where it cannot be one, which is tried once."""
        if self.fails:
            return None
        try:
            self.steps[key] = recorded = _Recorded(model, x, time, prepared, self.pool)
        except Exception as error:  # of many kinds: what cannot be recorded, memory
            self.fails = True
            self.steps.clear()
            line = str(error).split("\n")[0]
            warnings.warn(f"CUDA graph: the model is called instead ({type(error).__name__}: {line})", stacklevel=4)
            return None
        if len(self.steps) > _MOST:
            self.steps.popitem(last=False)
        return recorded


#: Shapes whose steps are held; a scene's tiles have up to four, borders included.
_MOST = 4
#: Of models that no run is using at the moment.
_idle: WeakKeyDictionary[Any, _Recordings] = WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def _recordings(model: Any, wanted: bool) -> Iterator[_Recordings | None]:
    """The model's recordings, this run's alone until it ends; None where none are to be made or used."""
    if not wanted or any(map(hooked, model.modules())):  # a graph would not call hooks
        yield None
        return
    with _lock:
        own = _idle.pop(model, None)
    own = own or _Recordings()
    yield own
    with _lock:
        _idle[model] = own


@torch.no_grad()
def sample(
    model: FSAStudent | FSATeacher,
    cond: Condition | Prepared,
    *,
    steps: int = 25,
    sampler: str = "ddim",
    noise: Tensor | None = None,
    seed: int | None = None,
    released: bool = False,
    schedule: Schedule | None = None,
    return_features: bool = False,
    cuda_graph: bool = False,
) -> Sample:
    """Draw a residual; deterministic given the noise (or the seed and the device).

    Args:
        model: student or teacher of any floating dtype; should be in evaluation mode.
        cond: its condition, see `model.condition`, or the result of `model.prepare` for it, in the model's dtype.
        steps: of the sampler.
        sampler: "ddim" (eta 0) or "dpm++" (DPM-Solver++, second order: good with few steps).
        noise: start [B, C, H, W]; drawn on the condition's device where None.
        seed: of that draw; None uses torch's own generator.
        released: what the public release does: the network is told the sampler's step (steps - 1, ..., 0) instead of
            the diffusion time and gets x_t instead of its last estimate as self-condition.
        schedule: noise levels; the released one of 500 steps unless told otherwise.
        return_features: fill `Sample.features`.
        cuda_graph: record the second step as a CUDA graph and replay it from then on, in later runs on such images
            too; saves what launching the kernels costs. The model holds the graphs' memory while it lives. Not where
            one of its modules has hooks. Where recording fails a warning says so, and the model is called.

    Raises:
        ValueError: unknown sampler, steps outside 1..T, noise of another shape, a condition that does not fit,
            cuda_graph with tensors that are not on a CUDA device.
        ImportError: diffusers is not installed.
    """
    schedule = Schedule() if schedule is None else schedule
    expect("sampler", sampler, SAMPLERS)
    if not 1 <= steps <= schedule.length:
        raise ValueError(f"steps: expected 1 to {schedule.length} (the schedule's length), got {steps}")
    prepared = cond if isinstance(cond, Prepared) else model.prepare(cond)
    if noise is None:
        device = prepared.images.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        noise = torch.randn(prepared.shape, generator=generator, device=device)
    elif tuple(noise.shape) != prepared.shape:
        raise ValueError(f"noise: expected {list(prepared.shape)}, got {list(noise.shape)}")
    if cuda_graph and not _records(noise):
        raise ValueError(f"cuda_graph: expected tensors on a CUDA device, got {noise.device}")
    dtype = prepared.images.dtype  # the network's; between its steps float32 holds more than halves
    noise = noise.to(torch.promote_types(dtype, torch.float32))
    scheduler = _scheduler(sampler, schedule, steps)
    x, variance = noise, None
    x0: Tensor | None = None
    mean = squares = torch.zeros_like(noise)
    with _recordings(model, cuda_graph) as recordings:
        recorded: _Recorded | None = None
        key = None
        if recordings is not None:
            key = recordings.key(model, x.to(dtype), prepared)
            if recorded := recordings.steps.get(key):
                recorded.load(prepared)
        for number, time in enumerate(scheduler.timesteps.tolist()):
            told = torch.full((x.shape[0],), steps - 1 - number if released else time, device=x.device)
            wanted = return_features and number == steps - 1
            estimate = None if released else x0
            if recordings is not None and recorded is None and number == 1:
                recorded = recordings.record(key, model, x.to(dtype), told, prepared)
            if recorded is None or wanted:
                given = x.to(dtype), told, prepared, None if estimate is None else estimate.to(dtype)
                output = model(*given, return_features=wanted)
            else:
                output = recorded(x, told, estimate)
            times = torch.full_like(told, time)
            x0, variance = schedule.to_x0(output.out.to(x.dtype), x, times, model.config.prediction), output.variance
            x = scheduler.step(x0, time, x).prev_sample
            if number >= steps // 2:  # Welford's recurrence
                before = x0 - mean
                mean = mean + before / (number - steps // 2 + 1)
                squares = squares + before * (x0 - mean)
    return Sample(x, variance, (squares / (steps - steps // 2)).sqrt(), output.features)
