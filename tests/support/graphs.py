"""A stand-in for CUDA graphs where there is no GPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: repeats the calls of operators with the tensors, and values, of the first."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            for static, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(static, torch.Tensor) and static.data_ptr() != new.data_ptr():
                    static.copy_(new)


def counted(monkeypatch):
    """The list of graphs that are recorded from now on; where there is no GPU they are `Recorder`s."""
    found = []
    if torch.cuda.is_available():
        plain = torch.cuda.graph
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: found.append(graph) or plain(graph, **kwargs))
        return found

    @contextlib.contextmanager
    def record(graph, pool, capture_error_mode):
        with graph:
            yield
        found.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return found
