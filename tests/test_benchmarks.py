"""How benchmarks take a GPU's time, on a simulated one."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from benchmarks import measure


class Gpu:
    """A queue in seconds: `host` is the clock of who asks, `free` when all that was asked is done."""

    def __init__(self):
        self.host = self.free = 0.0

    def launch(self, host, gpu):
        self.host += host
        self.free = max(self.free, self.host) + gpu

    def synchronize(self, device):
        self.host = max(self.host, self.free)

    def event(self, enable_timing):
        event = SimpleNamespace(elapsed_time=lambda other: (other.time - event.time) * 1e3)
        event.record = lambda: setattr(event, "time", max(self.free, self.host))
        return event


@pytest.mark.parametrize(("host", "gpu"), [(200e-6, 30e-6), (20e-6, 3e-3)])
def test_the_hosts_time_is_not_the_gpus(monkeypatch, host, gpu):
    machine = Gpu()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: machine.host))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: machine.launch(1e-6, cycles / 1.7e9))
    monkeypatch.setattr(torch.cuda, "Event", machine.event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=lambda: machine.launch(5e-6, 40e-6)))
    (time,) = measure.side_by_side([lambda: machine.launch(host, gpu)], torch.device("cuda"))
    assert time.seconds == pytest.approx(gpu, rel=1e-6)
    assert time.host == pytest.approx(host, rel=1e-6)
