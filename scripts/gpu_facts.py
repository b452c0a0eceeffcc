"""Facts about the kernels on a device, the compiled operators called directly: are they right, how fast are they?

    python scripts/gpu_facts.py WHAT [--device cuda] [--seconds S] [--out FOLDER] [--tiny] [--alone]

WHAT     values      errors of the compiled kernels against float64 on the CPU, a line a case
         samples     the same for every sample of every operator by every backend of the device, Triton's included
         speed       device time of every kernel with the queue filled before it, its share of the rate of a plain copy
                     in the same run, and what a call costs the host
         network     whole networks: eager, as a CUDA graph, a training step; where the time goes
         selfcheck   the self-checks that decide whether a backend is used

A case stands alone: an exception is a line, not the end. The cases run in a process of their own; where one leaves the
device unusable, hangs or dies, the rest go on in a new process. FOLDER/WHAT.json is written after every case.
Exits 1 where a case failed or was not reached, or there was none.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

#: Exit status of a process whose device answers no more.
LOST = 3
#: Processes that cases of one group may cost before its rest is left out.
LOSSES = 3


@dataclass(frozen=True)
class Case:
    """A piece of work; `body` returns what it found: "ok" and "text", and numbers."""

    group: str
    name: str
    body: Callable[[], dict[str, Any]]


# ---- the process that runs the cases ---------------------------------------------------------------------------------
class Facts:
    """Cases of every kind on one device."""

    def __init__(self, device: str, tiny: bool) -> None:
        import torch

        self.torch, self.device, self.tiny = torch, torch.device(device), tiny
        self.cuda = self.device.type == "cuda"
        from pansharp_fast._extension import load_error

        library = "_C_cuda" if self.cuda else "_C"
        reason = load_error(library)
        if reason:
            sys.exit(f"gpu_facts: {library}: {reason}")
        from pansharp_fast import ops, reference
        from pansharp_fast.ops import _backends

        self.ops, self.reference, self.backends = ops, reference, _backends
        self.kernels = torch.ops.pansharp_fast
        if self.cuda:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._copy_rate: float | None = None

    def cases(self, what: str) -> Iterator[Case]:
        yield from getattr(self, what)()

    def random(self, *shapes: tuple[int, ...]) -> Iterator[Any]:
        generator = self.torch.Generator().manual_seed(1)
        return (self.torch.randn(shape, generator=generator) for shape in shapes)

    # -- values
    def compared(self, found: list[tuple[str, Any, Any]], limit: float) -> dict[str, Any]:
        """Norm of every result's deviation relative to the norm of the exact one; not finite or misshapen: infinity."""
        errors = {}
        for name, got, exact in found:
            got, exact = got.detach().double().cpu(), exact.detach().double().cpu()
            same = got.shape == exact.shape and bool(got.isfinite().all())
            errors[name] = float((got - exact).norm() / exact.norm().clamp_min(1e-300)) if same else float("inf")
        text = " ".join(f"{name}={error:.1e}" for name, error in errors.items())
        return {"ok": all(e <= limit for e in errors.values()), "text": f"{text} (limit {limit:.0e})", "errors": errors}

    def cm3a(self, shape, heads, window, learned, dtype, last, tf32=False) -> Case:  # type: ignore[no-untyped-def]
        torch, dim = self.torch, shape[1] // heads

        def body() -> dict[str, Any]:
            layout = torch.channels_last if last else torch.contiguous_format
            count = window**2
            factors = [(dim, count, window, window), (dim, count)] if learned else []
            drawn = list(self.random(*[shape] * 7, *factors))
            maps = [x.to(self.device, dtype).contiguous(memory_format=layout) for x in drawn[:7]]
            factor = [drawn[7].div(window).to(self.device), drawn[8].to(self.device)] if learned else [None, None]
            options = heads, window, dim**-0.5, last, tf32
            got = [
                *self.kernels.cm3a_fwd(*maps[:5], *factor, *options),
                *self.kernels.cm3a_bwd(*maps[5:], *maps[:5], *factor, *options),
            ]
            leaves = [None if x is None else x.cpu().double().requires_grad_() for x in (*maps[:5], *factor)]
            out = self.reference.cm3a(*leaves, num_heads=heads, window=window)
            taken = [x for x in leaves if x is not None]
            exact = [*out, *torch.autograd.grad(out, taken, [x.cpu().double() for x in maps[5:]])]
            names = ["out_pan", "out_ms", "q", "k_pan", "v_pan", "k_ms", "v_ms", "weight", "bias"]
            count = len(exact)  # a shift has no gradients of a factor
            return self.compared(list(zip(names[:count], got[:count], exact, strict=True)), limit)

        limit = {torch.float32: 2e-3 if tf32 else 3e-6}.get(dtype, 2e-2)
        kind = f"window {window} {'learned' if learned else 'shift'} {'NHWC' if last else 'NCHW'}"
        return Case("cm3a", f"cm3a {list(shape)} heads {heads} {kind} {_short(dtype)}{' tf32' if tf32 else ''}", body)

    def wavelet(self, shape, name, mode, dtype, dilation=1) -> Case:  # type: ignore[no-untyped-def]
        torch = self.torch
        from pansharp_fast.ops.wavelet import MODES, Level, _filters
        from pansharp_fast.reference import wavelet as reference

        def body() -> dict[str, Any]:
            (x,) = (x.to(self.device, dtype) for x in self.random(shape))
            taps, number = _filters(name, "dec"), MODES.index(mode)
            level = Level(taps, taps, number, number, dilation)
            exact = reference.analysis(x.double().cpu(), level.taps_y, level.taps_x, *level.modes, dilation)
            given = [band.to(self.device, dtype).contiguous() for band in exact.unbind(1)]
            doubles = [band.double().cpu() for band in given]
            back = reference.synthesis(doubles, level.taps_y, level.taps_x, *level.modes, dilation, *shape[1:])
            return self.compared(
                [
                    ("fwd", self.kernels.wavelet_fwd(x, *level), exact),
                    ("bands", torch.stack(list(self.kernels.wavelet_bands_fwd(x, *level)), 1), exact),
                    ("bwd", self.kernels.wavelet_bwd(*given, *level, *shape[1:]), back),
                ],
                limit,
            )

        limit = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        return Case("wavelet", f"wavelet {list(shape)} {name} {mode} dilation {dilation} {_short(dtype)}", body)

    def frequency(self, shape, heads, dtype) -> Case:  # type: ignore[no-untyped-def]
        torch = self.torch

        def body() -> dict[str, Any]:
            tensors = [x.to(self.device, dtype) for x in self.random(*[shape] * 4)]
            out, attention = self.kernels.frequency_attention_fwd(*tensors[:3], heads, 0.02, True)
            grads = self.kernels.frequency_attention_bwd(tensors[3], *tensors[:3], attention, heads, 0.02, True)
            leaves = [x.double().cpu().requires_grad_() for x in tensors[:3]]
            exact = self.reference.frequency_attention(*leaves, num_heads=heads, scale=0.02)
            wanted = torch.autograd.grad(exact, leaves, tensors[3].double().cpu())
            return self.compared(list(zip(("out", "q", "k", "v"), (out, *grads), (exact, *wanted), strict=True)), limit)

        limit = {torch.float64: 1e-9, torch.float32: 3e-4}.get(dtype, 5e-2)
        return Case("frequency_attention", f"frequency_attention {list(shape)} heads {heads} {_short(dtype)}", body)

    def values(self) -> Iterator[Case]:
        """Operators in turn, so that a cut-off run has seen each."""
        yield from _in_turn(self._cm3a_values(), self._wavelet_values(), self._frequency_values())

    def _cm3a_values(self) -> Iterator[Case]:
        f32, bf16, f16 = self.torch.float32, self.torch.bfloat16, self.torch.float16
        for dtype in (f32, bf16, f16):
            for last in (False, True):
                for window in (3, 5):
                    if not self.tiny:
                        yield self.cm3a((2, 32, 40, 72), 2, window, True, dtype, last)  # several tiles each way
                    # 17 channels a head: rounds of eight, the last one incomplete; an odd width.
                    yield self.cm3a((1, 34, 19, 37), 2, window, True, dtype, last)
                    yield self.cm3a((1, 32, 19, 37), 2, window, False, dtype, last)
        for last in (False, True):
            for window in (3, 5):
                shape = (1, 32, 19, 37) if self.tiny else (2, 32, 40, 72)
                yield self.cm3a(shape, 2, window, True, f32, last, True)

    def _wavelet_values(self) -> Iterator[Case]:
        t = self.torch
        if self.tiny:
            for dtype in (t.float32, t.bfloat16):
                for shape in ((2, 33, 65), (2, 32, 64)):  # two taps have paths of their own on the second one
                    for name in ("haar", "db2", "db4"):
                        yield self.wavelet(shape, name, "symmetric", dtype)
                yield self.wavelet((2, 32, 64), "haar", "stationary", dtype)
            return
        for dtype in (t.float32, t.float16, t.bfloat16, t.float64):
            for name in ("haar", "db2", "db4", "bior4.4", "db20"):
                modes = ["symmetric", "zero", "reflect", "periodization", "smooth", "antireflect", "stationary"]
                for mode in modes:
                    if (name, dtype) == ("db20", t.float16) and mode in ("smooth", "antireflect"):
                        continue  # beyond the range of float16
                    yield self.wavelet((2, 70, 402), name, mode, dtype)
            yield self.wavelet((2, 64, 96), "haar", "stationary", dtype, 4)
            yield self.wavelet((3, 33, 65), "db4", "constant", dtype)

    def _frequency_values(self) -> Iterator[Case]:
        t = self.torch
        shapes = (
            [((1, 16, 17, 20), 2), ((1, 48, 17, 20), 1), ((1, 128, 9, 8), 2)]
            if self.tiny
            else [((2, 16, 40, 52), 2), ((1, 32, 33, 31), 2), ((1, 64, 24, 24), 2), ((1, 96, 20, 22), 2)]
            + [((1, 128, 16, 18), 2)]
        )
        for dtype in (t.float32, t.bfloat16, t.float64):
            for shape, heads in shapes:
                if dtype != t.float64 or shape[1] // heads <= 48:
                    yield self.frequency(shape, heads, dtype)

    def samples(self) -> Iterator[Case]:
        """Every operator's own samples with every backend: results and gradients; nothing here depends on a verdict."""
        t = self.torch
        names = ("triton", "cuda") if self.cuda else ("cpu",)
        lists = []
        for operator in self.backends.OPERATORS.values():
            for backend in names:
                if operator.samples is None or backend not in operator.support:
                    continue
                self.backends._verdicts[operator.name, backend, self.device] = None
                dtypes = [x for x in (t.float32, t.bfloat16) if x in operator.support[backend].dtypes]
                lists.append(self._samples_of(operator, backend, dtypes[: 1 if self.tiny else 2]))
        yield from _in_turn(*lists)

    def _samples_of(self, operator: Any, backend: str, dtypes: list[Any]) -> Iterator[Case]:
        limits = {self.torch.float32: 1e-4, self.torch.bfloat16: 5e-2}
        for dtype in dtypes:
            for number, sample in enumerate(operator.samples(self.device, dtype)):
                if number >= (2 if self.tiny else 1000):
                    break
                yield self._sample(operator, backend, sample, limits[dtype], _short(dtype))

    def _sample(self, operator: Any, backend: str, sample: Any, limit: float, dtype: str) -> Case:
        torch = self.torch

        def results(leaves: list[Any], backend: str) -> list[Any]:
            out = sample.run(*leaves, backend=backend)
            if not any(x.requires_grad for x in out):
                return list(out)
            generator = torch.Generator().manual_seed(2)
            weights = [torch.randn(x.shape, generator=generator).to(x) for x in out]
            return [*out, *torch.autograd.grad(out, leaves, weights, allow_unused=True)]

        def body() -> dict[str, Any]:
            against = self.backends.reasons(operator, backend, sample.tensors, **sample.options)
            if against:
                return {"ok": True, "text": f"not taken: {'; '.join(against)}"}
            leaves = [x.detach().clone().requires_grad_() for x in sample.tensors]
            if self.backends.reasons(operator, backend, leaves, **sample.options):
                leaves = [x.detach() for x in leaves]  # an operator without gradients
            exact = results([x.detach().double().cpu().requires_grad_(x.requires_grad) for x in leaves], "reference")
            got = results(leaves, backend)
            pairs = [(f"r{i}", a, e) for i, (a, e) in enumerate(zip(got, exact, strict=True)) if e is not None]
            return self.compared(pairs, limit)

        return Case(f"{operator.name} {backend}", f"{operator.name} {backend} {sample.name} {dtype}", body)

    def selfcheck(self) -> Iterator[Case]:
        for operator in self.backends.OPERATORS.values():
            for backend in ("cuda", "triton") if self.cuda else ("cpu",):
                if backend in operator.support and operator.selfcheck is not None:
                    yield Case(
                        operator.name, f"selfcheck {operator.name} {backend}", self._selfcheck(operator, backend)
                    )

    def _selfcheck(self, operator: Any, backend: str) -> Callable[[], dict[str, Any]]:
        def body() -> dict[str, Any]:
            self.backends._verdicts[operator.name, backend, self.device] = None  # the check calls the operator
            self.backends._compare(operator, backend, self.device)
            return {"ok": True, "text": "agrees"}

        return body

    # -- speed
    def host_seconds(self, run: Callable[[], Any], count: int) -> float:
        """What a call costs the host while the device is busy with something else; calls must fit its queue."""
        self.synchronize()
        if self.cuda:
            self.torch.cuda._sleep(200_000_000)  # 0.1 s
        start = time.perf_counter()
        for _ in range(count):
            run()
        spent = time.perf_counter() - start
        self.synchronize()
        return spent / count

    def synchronize(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], host: float, count: int = 12) -> float:
        """Median device time of a call, caches emptied before it and all of it queued before the device comes to it."""
        if not self.cuda:
            return self.host_seconds(run, 2)
        waste, times = self.torch.empty(64 << 20, device=self.device), []
        for _ in range(count):
            waste.zero_()
            self.torch.cuda._sleep(int(4e9 * host) + 200_000)  # twice the host's time at 2 GHz
            first, last = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            self.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return sorted(times)[count // 2]

    def timed(self, run: Callable[[], Any], traffic: float = 0, flops: float = 0, calls: int = 10) -> dict[str, Any]:
        for _ in range(3):
            run()
        host = self.host_seconds(run, calls)
        seconds = self.seconds(run, host)
        found: dict[str, Any] = {"ok": True, "ms": seconds * 1e3, "host_us": host * 1e6}
        text = f"{seconds * 1e3:.4f} ms, host {host * 1e6:.0f} us"
        if traffic:
            found |= {"bytes": traffic, "copy_rate": self.copy_rate(), "share": traffic / seconds / self.copy_rate()}
            text += f", {traffic / seconds / 1e9:.0f} GB/s, {found['share']:.0%} of copy"
        if flops:
            found |= {"flops": flops}
            text += f", {flops / seconds / 1e12:.1f} TFLOP/s"
        return found | {"text": text}

    def copy_rate(self) -> float:
        """Bytes read and written a second by a plain copy in this process."""
        if self._copy_rate is None:
            source = self.torch.randn(128 << 20 if not self.tiny else 1 << 20, device=self.device)
            target = self.torch.empty_like(source)

            def run() -> None:
                target.copy_(source)

            run()
            self._copy_rate = 2 * source.numel() * 4 / self.seconds(run, 2e-5)
        return self._copy_rate

    def trust(self) -> None:
        """No self-checks: they compile kernels that nothing here times, which takes longer than all the timings."""
        for operator in self.backends.OPERATORS.values():
            for backend in operator.support:
                self.backends._verdicts[operator.name, backend, self.device] = None

    def speed(self) -> Iterator[Case]:
        t = self.torch
        self.trust()
        yield Case("copy", "plain copy", self._copy)
        yield Case("product", "matrix product bfloat16", self._product)
        f32, bf16 = t.float32, t.bfloat16
        large, small = ((8, 256), (1, 128)) if not self.tiny else ((1, 16),) * 2
        cm3a = (
            self._cm3a_speed(work, *size, dtype, tf32, last)
            for size, dtype, tf32, last in (
                *((large, dtype, tf32, last) for dtype, tf32 in ((f32, 0), (bf16, 0), (f32, 1)) for last in (0, 1)),
                *((small, dtype, 0, 0) for dtype in (f32, bf16)),
            )
            for work in ("forward", "backward", *["shift forward"] * (size == large and not tf32 and not last))
        )
        planes, image = ((128, 256, 256), (1, 4096, 4096)) if not self.tiny else ((2, 32, 32),) * 2
        named = [(name, "symmetric") for name in ("haar", "db4", "db2", "bior4.4")] + [("haar", "stationary")]
        wavelet = (
            self._wavelet_speed(work, name, mode, shape, dtype)
            for shape, dtype, kinds in ((planes, f32, named), (planes, bf16, named), (image, f32, named[:2]))
            for name, mode in kinds
            for work in ("analysis", "synthesis")
        )
        areas = (256, 512) if not self.tiny else (16, 16)
        frequency = (
            self._frequency_speed(work, heads, side)
            for heads, side in ((8, areas[0]), (8, areas[1]), (1, areas[1]))
            for work in ("gram", "apply", "forward", *["four FFTs"] * (heads == 8))
        )
        yield from _in_turn(cm3a, wavelet, frequency, self._norm_speed())

    def _copy(self) -> dict[str, Any]:
        rate = self.copy_rate()
        return {"ok": True, "text": f"{rate / 1e9:.0f} GB/s read and written", "copy_rate": rate}

    def _product(self) -> dict[str, Any]:
        size = 8192 if not self.tiny else 64
        a, b = (self.torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return self.timed(lambda: a @ b, flops=2 * size**3)

    def _cm3a_speed(self, work, batch, side, dtype, tf32, last) -> Case:  # type: ignore[no-untyped-def]
        t = self.torch

        def body() -> dict[str, Any]:
            layout = t.channels_last if last else t.contiguous_format
            shape = batch, 128, side, side
            maps = [t.randn(shape, device=self.device).to(dtype).contiguous(memory_format=layout) for _ in range(7)]
            factor = [t.randn(16, 9, 3, 3, device=self.device) / 3, t.randn(16, 9, device=self.device)]
            if work == "shift forward":
                factor = [None, None]
            options, one = (8, 3, 0.25, bool(last), bool(tf32)), maps[0].numel() * maps[0].element_size()
            if work == "backward":
                return self.timed(lambda: self.kernels.cm3a_bwd(*maps[5:], *maps[:5], *factor, *options), 12 * one)
            return self.timed(lambda: self.kernels.cm3a_fwd(*maps[:5], *factor, *options), 7 * one)

        kind = f"{'NHWC' if last else 'NCHW'} {_short(dtype)}{' tf32' if tf32 else ''}"
        return Case("cm3a", f"cm3a {work} [{batch},128,{side},{side}] {kind}", body)

    def _wavelet_speed(self, work, name, mode, shape, dtype) -> Case:  # type: ignore[no-untyped-def]
        from pansharp_fast.ops.wavelet import MODES, Level, _filters

        def body() -> dict[str, Any]:
            x = self.torch.randn(shape, device=self.device).to(dtype)
            taps, number = _filters(name, "dec"), MODES.index(mode)
            level = Level(taps, taps, number, number, 1)
            bands = self.kernels.wavelet_bands_fwd(x, *level)
            moved = (x.numel() + 4 * bands[0].numel()) * x.element_size()
            if work == "analysis":
                return self.timed(lambda: self.kernels.wavelet_bands_fwd(x, *level), moved)
            return self.timed(lambda: self.kernels.wavelet_bwd(*bands, *level, *shape[1:]), moved)

        return Case("wavelet", f"wavelet {work} {name} {mode} {list(shape)} {_short(dtype)}", body)

    def _frequency_speed(self, work, heads, side) -> Case:  # type: ignore[no-untyped-def]
        t = self.torch

        def body() -> dict[str, Any]:
            q, k, v = (t.randn(1, 64, side, side, device=self.device) for _ in range(3))
            spectra = [t.view_as_real(t.fft.rfft2(x)).contiguous() for x in (q, k, v)]
            attention = t.softmax(t.randn(1, heads, 2, 64 // heads, 64 // heads, device=self.device), -1)
            one = spectra[0].numel() * 4
            if work == "gram":
                return self.timed(lambda: self.kernels.frequency_attention_gram(*spectra[:2], heads, side), 2 * one)
            if work == "apply":
                run = lambda: self.kernels.frequency_attention_apply(spectra[2], attention, heads, side)  # noqa: E731
                return self.timed(run, 2 * one)
            if work == "forward":
                run = lambda: self.kernels.frequency_attention_fwd(q, k, v, heads, 0.1, True)  # noqa: E731
                return self.timed(run, 4 * q.numel() * 4)
            return self.timed(lambda: [t.fft.rfft2(q) for _ in range(4)], 4 * q.numel() * 4)

        return Case("frequency_attention", f"frequency_attention {work} [1,64,{side},{side}] heads {heads}", body)

    def _norm_speed(self) -> Iterator[Case]:
        """What the networks' residual blocks do, by the operators and by PyTorch's own."""
        t = self.torch
        for inputs in (128, 131, 136):
            for bias in (False, True):
                yield self._convolution(inputs, bias)
        yield self._convolution(128, False, benchmark=True)
        bf16, f32 = t.bfloat16, t.float32
        large, small = (1, 128, 256, 256), (1, 128, 64, 64)
        for shape, groups, dtype in (
            *((large, 32, bf16), (small, 32, bf16), ((8, *large[1:]), 32, bf16), ((1, 32, *large[2:]), 1, f32)),
            *((large, 32, f32), ((1, 256, *large[2:]), 32, bf16)),
        ):
            for work in ("group norm + SiLU", "layer norm", "residual + bias", "join with 8 channels"):
                for who in ("", "torch "):
                    yield self._norm(f"{who}{work}", shape if not self.tiny else (1, 32, 8, 8), groups, dtype)

    def _norm(self, work, shape, groups, dtype) -> Case:  # type: ignore[no-untyped-def]
        t, functional = self.torch, self.torch.nn.functional

        def body() -> dict[str, Any]:
            x, other = (t.randn(shape, device=self.device).to(dtype) for _ in range(2))
            x, other = (each.contiguous(memory_format=t.channels_last) for each in (x, other))
            scale, shift = (t.randn(shape[:2], device=self.device).to(dtype) for _ in range(2))
            weight, one = scale[0].contiguous(), x.numel() * x.element_size()
            wide = [each[:, :, None, None] for each in (scale, shift)]
            if work == "group norm + SiLU":
                options = {"offset": weight, "scale": scale, "shift": shift, "silu": True}
                return self.timed(lambda: self.ops.group_norm(x, groups, weight, weight, **options), 3 * one)
            if work == "torch group norm + SiLU":
                norm = lambda: functional.group_norm(x, groups, weight, weight)  # noqa: E731
                return self.timed(lambda: functional.silu(norm() * (1 + wide[0]) + wide[1]), 3 * one)
            if work == "layer norm":
                return self.timed(lambda: self.ops.layer_norm(x, weight, weight), 2 * one)
            if work == "torch layer norm":
                pixels = x.permute(0, 2, 3, 1)
                return self.timed(lambda: functional.layer_norm(pixels, shape[1:2], weight, weight), 2 * one)
            if work == "residual + bias":
                return self.timed(lambda: self.ops.gated_sum(x, other, bias_a=weight), 3 * one)
            if work == "torch residual + bias":
                return self.timed(lambda: (other + weight[:, None, None]) + x, 3 * one)
            more, moved = t.randn(shape[0], 8, *shape[2:], device=self.device).to(dtype), 2 * one + 16 * one // shape[1]
            if work == "join with 8 channels":
                return self.timed(lambda: self.ops.join(x, more), moved)
            both = [each.permute(0, 2, 3, 1) for each in (x, more)]
            return self.timed(lambda: t.cat(both, 3), moved)

        return Case("norm", f"{work} {list(shape)}, {groups} groups, {_short(dtype)}", body)

    def choosing(self, benchmark: bool) -> Any:
        """Context in which cuDNN tries its algorithms before it chooses one."""
        tf32 = self.torch.backends.cudnn.allow_tf32
        return self.torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, deterministic=False, allow_tf32=tf32)

    def _convolution(self, inputs: int, bias: bool, benchmark: bool = False) -> Case:
        t = self.torch
        side = 256 if not self.tiny else 8

        def body() -> dict[str, Any]:
            x = t.randn(1, inputs, side, side, device=self.device).bfloat16().contiguous(memory_format=t.channels_last)
            layer = t.nn.Conv2d(inputs, 128, 3, padding=1, bias=bias).to(self.device, t.bfloat16)
            layer.to(memory_format=t.channels_last)
            with t.no_grad(), self.choosing(benchmark):
                return self.timed(lambda: layer(x), flops=2 * 9 * 128 * inputs * side**2)

        name = f"convolution [1,{inputs},{side},{side}] to 128 bfloat16 {'with' if bias else 'without'} bias"
        name += ", the fastest of all" * benchmark
        return Case("convolution", name, body)

    # -- networks
    def network(self) -> Iterator[Case]:
        t = self.torch
        self.trust()
        side = 256 if not self.tiny else 32
        for dtype, batch in ((t.bfloat16, 1), (t.float32, 1), (t.bfloat16, 8)):
            name = f"PAN-Crafter released {side}² batch {batch} {_short(dtype)}"
            yield Case("pancrafter", f"{name} against reference", self._crafter(dtype, batch, side, "value"))
            yield Case("pancrafter", f"{name} eager", self._crafter(dtype, batch, side, "eager"))
            if self.cuda:
                yield Case("pancrafter graph", f"{name} CUDA graph", self._crafter(dtype, batch, side, "graph"))
                best = f"{name} CUDA graph, fastest convolutions"
                yield Case("pancrafter graph", best, self._crafter(dtype, batch, side, "best graph"))
                plain = f"{name} CUDA graph, PyTorch's norms"
                yield Case("pancrafter graph", plain, self._crafter(dtype, batch, side, "plain graph"))
        yield Case("profile", "profile of PAN-Crafter", self._crafter(t.bfloat16, 1, side, "profile"))
        for reference in (False, True):
            which = "reference" if reference else "ours"
            yield Case("training", f"PAN-Crafter training step, 96 patches, {which}", self._training(reference))
        step = "profile of a PAN-Crafter training step, 96 patches"
        yield Case("profile", step, self._training(False, profile=True))
        yield Case("universal", "universal", self._universal)
        for graph in (False, True) if self.cuda else (False,):
            for dtype in (t.float32, t.bfloat16):
                kind = f"{'graph' if graph else 'eager'}, {_short(dtype)}"
                yield Case("uknow", f"FSA-S, {kind}", self._student(graph, dtype))
        for dtype in (t.float32, t.bfloat16):
            step = f"profile of a step of FSA-S, {_short(dtype)}"
            yield Case("profile", step, self._student(False, dtype, profile=True))

    def _images(self, batch: int, side: int, dtype: Any) -> list[Any]:
        low = side // 4
        shapes = ((batch, 1, side, side), (batch, 1, low, low), (batch, 8, low, low))
        return [x.to(self.device, dtype) for x in self.random(*shapes)]

    def _model(self, dtype: Any) -> Any:
        from pansharp_fast.models import PANCrafter, preset

        self.torch.manual_seed(0)
        model = PANCrafter(preset("tiny" if self.tiny else "released", bands=8)).eval()
        with self.torch.no_grad():
            for parameter in model.parameters():  # a fresh head is zero
                parameter.add_(self.torch.randn_like(parameter) * 0.02)
        return model.to(self.device, dtype)

    def _crafter(self, dtype: Any, batch: int, side: int, work: str) -> Callable[[], dict[str, Any]]:
        t = self.torch

        def body() -> dict[str, Any]:
            model, images = self._model(dtype), self._images(batch, side, dtype)
            mode = t.ones(batch, device=self.device)
            with t.no_grad():
                if work == "value":
                    with self.ops.use_backend("reference"):
                        exact = self._model(t.float32)(*(x.float() for x in images), mode)
                    return self.compared([("out", model(*images, mode), exact)], 1e-3 if dtype == t.float32 else 5e-2)
                if work == "eager":
                    self.reset_peak()
                    found = self.timed(lambda: model(*images, mode), calls=1)
                    return found | {
                        "peak_bytes": self.peak(),
                        "text": f"{found['text']}, peak {self.peak() / 1e6:.0f} MB",
                    }
                if work == "graph":
                    return self._graphed(lambda: model(*images, mode))
                if work == "best graph":
                    with self.choosing(True):
                        return self._graphed(lambda: model(*images, mode))
                if work == "plain graph":  # the norms have no kernels of this name
                    with self.ops.use_backend("cuda"):
                        return self._graphed(lambda: model(*images, mode))
                return self._profile(lambda: model(*images, mode))

        return body

    def _graphed(self, run: Callable[[], Any]) -> dict[str, Any]:
        t = self.torch
        stream = t.cuda.Stream()
        stream.wait_stream(t.cuda.current_stream())
        with t.cuda.stream(stream):
            for _ in range(3):
                run()
        t.cuda.current_stream().wait_stream(stream)
        graph = t.cuda.CUDAGraph()
        with t.cuda.graph(graph):
            out = run()
        eager = run().clone()
        graph.replay()
        self.synchronize()
        found, same = self.timed(graph.replay, calls=2), self.compared([("graph", out, eager)], 1e-2)
        return found | {"ok": same["ok"], "errors": same["errors"], "text": f"{found['text']}, {same['text']}"}

    def _profile(self, run: Callable[[], Any], rows: int = 25) -> dict[str, Any]:
        """The kernels that take most of a call's device time."""
        kinds = self.torch.profiler.ProfilerActivity
        for _ in range(3):
            run()
        self.synchronize()
        with self.torch.profiler.profile(activities=[kinds.CUDA if self.cuda else kinds.CPU]) as trace:
            run()
            self.synchronize()
        by = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        # Annotations, as of an optimizer's step, span kernels that are listed, too.
        events = [each for each in trace.key_averages() if getattr(each, by) and not each.is_user_annotation]
        found = [{"name": each.key, "us": getattr(each, by), "calls": each.count} for each in events]
        found.sort(key=lambda each: -each["us"])
        total = sum(each["us"] for each in found)
        lines = [f"{total:.0f} us in {sum(each['calls'] for each in found)} calls"]
        for each in found[:rows]:
            share = each["us"] / max(total, 1e-9)
            lines.append(f"{each['us']:10.1f} us {share:6.1%} {each['calls']:5d} calls  {each['name'][:60]}")
        return {"ok": total > 0, "text": "\n".join(lines), "us": total, "kernels": found}

    def reset_peak(self) -> None:
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return self.torch.cuda.max_memory_allocated() if self.cuda else 0

    def _training(self, reference: bool, profile: bool = False) -> Callable[[], dict[str, Any]]:
        t = self.torch

        def body() -> dict[str, Any]:
            batch = 96 if not self.tiny else 1
            model = self._model(t.float32).train()
            images, mode = self._images(batch, 64, t.float32), t.ones(batch, device=self.device)
            optimizer = t.optim.AdamW(model.parameters(), 1e-4)

            def run() -> None:
                optimizer.zero_grad()
                with t.autocast(self.device.type, t.bfloat16):
                    loss = model(*images, mode).float().square().mean()
                loss.backward()
                optimizer.step()

            if profile:
                return self._profile(run)
            with self.ops.use_backend("reference" if reference else "auto"):
                run()  # makes the optimizer's state
                self.reset_peak()
                for _ in range(2):
                    run()
                peak = self.peak()
                self.synchronize()
                start = time.perf_counter()
                for _ in range(3):
                    run()
                self.synchronize()
            ms = (time.perf_counter() - start) / 3 * 1e3
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
            return {"ok": finite, "ms": ms, "peak_bytes": peak, "text": f"{ms:.1f} ms, peak {peak / 1e9:.2f} GB"}

        return body

    def _universal(self) -> dict[str, Any]:
        """`universal` on a pair, statistics and inputs included."""
        from pansharp_fast.models import load_model

        side = 1024 if not self.tiny else 64
        model = load_model("universal").to(self.device).eval()
        pan, ms = (x.to(self.device) for x in self.random((1, 1, side, side), (1, 8, side // 4, side // 4)))
        pan, ms = 500 + 50 * pan, 500 + 50 * ms
        run = lambda: model.sharpen_registered(pan, ms, ratio=4, gains=[0.3] * 8)  # noqa: E731
        found = self.timed(run, calls=1)
        finite = bool(run().isfinite().all())
        return found | {"ok": finite, "text": f"{side}² {found['text']}"}

    def _student(self, graph: bool, dtype: Any, profile: bool = False) -> Callable[[], dict[str, Any]]:
        t = self.torch

        def body() -> dict[str, Any]:
            from pansharp_fast.diffusion import sample
            from pansharp_fast.models import FSAConfig, FSAStudent

            large = not self.tiny
            side, steps = (256, 25) if large else (32, 2)
            t.manual_seed(0)
            config = FSAConfig.preset("released" if large else "tiny", bands=8, teacher=False)
            model = FSAStudent(config).to(self.device, dtype).eval()
            t.nn.init.normal_(model.final_conv.block[3].weight, std=0.1)  # zero in a fresh network
            lms, pan, noise = (
                x.to(self.device, dtype)
                for x in self.random((1, 8, side, side), (1, 1, side, side), (1, 8, side, side))
            )
            options = {"steps": steps, "noise": noise, "released": True}
            with t.no_grad():
                condition = model.condition(lms, pan)
                if profile:
                    prepared, time_step = model.prepare(condition), t.ones(1, device=self.device)
                    return self._profile(lambda: model(noise, time_step, prepared, noise))
                for _ in range(2):
                    got = sample(model, condition, cuda_graph=graph, **options).residual
                self.synchronize()
                start = time.perf_counter()
                sample(model, condition, cuda_graph=graph, **options)
                self.synchronize()
                ms = (time.perf_counter() - start) * 1e3
                with self.ops.use_backend("reference"):
                    model.float()
                    condition, options["noise"] = model.condition(lms.float(), pan.float()), noise.float()
                    plain = sample(model, condition, **options).residual
            same = self.compared([("residual", got, plain)], 2e-2 if dtype == t.float32 else 0.2)
            return same | {"ms": ms, "text": f"{side}², {steps} steps: {ms:.1f} ms, {same['text']}"}

        return body


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _in_turn(*lists: Iterator[Case]) -> Iterator[Case]:
    """One of each until all are through. What keeps a list from going on is a case that fails."""
    left = [iter(each) for each in lists]
    while left:
        for each in list(left):
            try:
                yield next(each)
            except StopIteration:
                left.remove(each)
            except Exception as error:
                left.remove(each)
                yield Case("cases", f"cases after {type(error).__name__}", functools.partial(_fail, error))


def _fail(error: Exception) -> dict[str, Any]:
    raise error


def run_cases(options: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> None:
    """Run the cases from `options.start` on, but for the groups `options.without`; a record before and after each."""
    facts = Facts(options.device, options.tiny)
    for number, case in enumerate(facts.cases(options.what)):
        if number < options.start or case.group in options.without:
            continue
        emit({"begin": number, "group": case.group, "name": case.name})
        begin = time.perf_counter()
        try:
            found = case.body()
        except Exception as error:
            found = {"ok": False, "text": f"{type(error).__name__}: {str(error)[:600]}"}
        try:
            facts.synchronize()
            lost = False
        except Exception as error:
            lost, found = True, {"ok": False, "text": f"device lost: {str(error)[:300]}; {found['text']}"}
        emit({"group": case.group, "name": case.name, **found, "seconds": time.perf_counter() - begin})
        if lost:
            sys.exit(LOST)
    emit({"end": True})


# ---- the process that watches ----------------------------------------------------------------------------------------
class Report:
    """Records as they come, on the output and in a file."""

    def __init__(self, what: str, folder: Path | None) -> None:
        self.what, self.records, self.began = what, [], time.monotonic()
        self.path = folder / f"{what}.json" if folder else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        print(f"{'ok  ' if record['ok'] else 'FAIL'} {record['name']}: {record['text']}", flush=True)
        if self.path:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(self.records, indent=1) + "\n")
            partial.rename(self.path)

    def close(self) -> int:
        failed = sum(not record["ok"] for record in self.records)
        spent = time.monotonic() - self.began
        print(f"{self.what}: {len(self.records)} cases, {failed} failed, {spent:.0f} s", flush=True)
        return 1 if failed or not self.records else 0


def watch(options: argparse.Namespace, report: Report) -> None:
    """Run the cases in processes of their own until they are through or the time is up."""
    end = time.monotonic() + options.seconds
    start, without, losses = 0, list[str](), Counter[str]()
    while True:
        read, write = os.pipe()
        command = [sys.executable, __file__, options.what, "--device", options.device, "--start", str(start)]
        command += ["--pipe", str(write), *["--tiny"] * options.tiny, *[f"--without={each}" for each in without]]
        child = subprocess.Popen(command, pass_fds=(write,))
        os.close(write)
        lines: queue.Queue[str | None] = queue.Queue()

        def pump(read: int = read, lines: queue.Queue[str | None] = lines) -> None:
            with os.fdopen(read) as pipe:
                for line in pipe:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        running: dict[str, Any] | None = None
        reason = ""
        while True:
            left = end - time.monotonic()
            try:
                line = lines.get(timeout=max(min(left, options.patience), 0.01))
            except queue.Empty:
                reason = "no time left" if left <= options.patience else f"no answer for {options.patience:.0f} s"
                child.kill()
                break
            if line is None:
                break
            record = json.loads(line)
            if "end" in record:
                child.wait()
                return
            if "begin" in record:
                running, start = record, record["begin"] + 1
            else:
                running = None
                report.add(record)
                last = record["group"]
        status = child.wait()
        if running is not None:
            last = running["group"]
            text = reason or f"the process ended with status {status}"
            report.add({"group": last, "name": running["name"], "ok": False, "text": text})
        elif status not in (LOST, 0):
            report.add({"group": "", "name": "process", "ok": False, "text": reason or f"exit status {status}"})
            return
        if time.monotonic() >= end:
            if running is None and not reason:
                report.add({"group": "", "name": "the rest", "ok": False, "text": "no time left"})
            return
        losses[last] += 1
        if losses[last] == LOSSES:
            without.append(last)
            report.add({"group": last, "name": last, "ok": False, "text": f"left out after {LOSSES} lost processes"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["values", "samples", "speed", "network", "selfcheck"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=80, help="no case is waited for longer")
    parser.add_argument("--patience", type=float, default=40, help="seconds without an answer that end a process")
    parser.add_argument("--out", type=Path, help="folder of WHAT.json")
    parser.add_argument("--tiny", action="store_true", help="the smallest shapes that reach every kernel")
    parser.add_argument("--alone", action="store_true", help="in this process, for a tool that watches it")
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pipe is not None:
        with os.fdopen(options.pipe, "w", buffering=1) as pipe:
            run_cases(options, lambda record: print(json.dumps(record), file=pipe, flush=True))
        return 0
    report = Report(options.what, options.out)
    if options.alone:
        run_cases(options, lambda record: report.add(record) if "ok" in record else None)
    else:
        watch(options, report)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
