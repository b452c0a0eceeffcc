"""Time, peak memory, and the rates of the device that bound both."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Numbers of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Time(NamedTuple):
    """Of one call: seconds that it takes, and on a GPU those of them that the host needs to ask for the work."""

    seconds: float
    host: float | None = None


def side_by_side(runs: Sequence[Callable[[], Any]], device: torch.device, budget: float = 1.5) -> list[Time]:
    """Median times of calls after two of warm-up.

    On a CPU in rounds, so that a slow spell meets all of them: three, or as many as the budget of seconds holds for the
    slowest. Each has its turn with several calls, the first one unmeasured, because memory that others used last is not
    as a program finds it that goes on with its work; calls of more than 0.2 s have one each. On a GPU one after the
    other, see `_on_gpu`.
    """
    for run in runs:
        for _ in range(2):
            run()
    if device.type == "cuda":
        return [_on_gpu(run, device, budget / 3) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    rounds = 0
    while rounds < 3 or (max(map(sum, times)) < budget and rounds < 50):
        rounds += 1
        for run, own in zip(runs, times, strict=True):
            quick = not own or own[-1] <= 0.2
            if quick:
                run()
            for _ in range(4 if quick else 1):
                start = time.perf_counter()
                run()
                own.append(time.perf_counter() - start)
    return [Time(statistics.median(own)) for own in times]


def _on_gpu(run: Callable[[], Any], device: torch.device, budget: float) -> Time:
    """The GPU's own time: events around a call that is queued while the GPU still waits, its L2 cache emptied.

    A call that waits for the GPU, or launches more than the queue holds (some thousand kernels), has its host's time in
    it. At least 5 calls, or as many as the budget of seconds holds, up to 200.
    """
    waste = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def between(work: Callable[[], Any], wait: int) -> tuple[float, float]:
        """Seconds of the GPU and of the host for `work`, queued behind so many cycles."""
        synchronize(device)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(wait)
        waste.zero_()
        start.record()
        began = time.perf_counter()
        work()
        host = time.perf_counter() - began
        stop.record()
        synchronize(device)
        return start.elapsed_time(stop) / 1e3, host

    with torch.cuda.device(device):
        rate = 1_000_000 / between(lambda: torch.cuda._sleep(1_000_000), 1)[0]  # cycles a second
        host = between(run, 1)[1]
        found: list[tuple[float, float]] = []
        while len(found) < 5 or (len(found) < 200 and sum(map(sum, found)) < budget):
            found.append(between(run, int(rate * (2 * host + 1e-4))))
            host = max(own for _, own in found)
    gpu, own = (statistics.median(values) for values in zip(*found, strict=True))
    return Time(gpu, own)


def seconds(run: Callable[[], Any], device: torch.device, budget: float = 1.5) -> float:
    """Median time of a call, see `side_by_side`."""
    return side_by_side([run], device, budget)[0].seconds


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call holds at its peak beyond what was held before, results included; None where not known.

    On a CPU it is resident memory, measured while no large block comes out of a hole that earlier calls left in the
    heap and all of them go back when freed: what such holes add depends on the calls before.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    with _no_holes():
        clear.write_text("5")  # the peak starts again at what is resident now
        before = _resident(status, "VmRSS")
        run()
        return max(_resident(status, "VmHWM") - before, 0)


class _Mallinfo2(ctypes.Structure):
    """Of glibc's malloc.h; only the number of blocks that have a mapping of their own is used."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks")]
    _fields_ += [("others", ctypes.c_size_t * 6)]


@contextlib.contextmanager
def _no_holes() -> Iterator[None]:
    """Keeps the free parts of glibc's heap taken, without touching them; blocks of 1 MiB and more are then mapped."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        yield
        return
    libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = _Mallinfo2, ctypes.c_void_p, [ctypes.c_void_p]
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)  # what is free is no longer resident
    taken: list[int] = []
    for size in (1 << power for power in range(28, 19, -1)):
        while True:
            mapped = libc.mallinfo2().hblks
            block = libc.malloc(size)
            if libc.mallinfo2().hblks > mapped:
                libc.free(block)
                break
            taken.append(block)
    try:
        yield
    finally:
        for block in taken:
            libc.free(block)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaptation ends
        libc.mallopt(_TRIM_THRESHOLD, 64 << 20)


def _resident(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by `Tensor.copy_` of 256 MiB."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product in `dtype`."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / seconds(lambda: a @ a, device)
