"""Forwards of a network as CUDA graphs: launched as one, without Python between its kernels."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.plain import hooked
from ..ops._backends import recording, requested, tf32_allowed

#: Shapes whose graphs are held; a scene's tiles have up to four, borders included.
_MOST = 4


class Recorded:
    """Calls a network of tensors that gives one; from the second call of a shape on as a CUDA graph.

    The first call makes plans, workspaces and kernels. Where recording fails a warning says so, and the network is
    called from then on; so it is while one of its modules has hooks, which a graph would not call. Graphs read the
    weights where they lie: what changes them in place is seen, and where they are moved graphs are recorded anew. For
    one thread at a time.

    Args:
        network: in evaluation mode, on a CUDA device.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._modules, self._weights = list(network.modules()), [*network.parameters(), *network.buffers()]
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()  # None: called once
        self._pool: Any = None
        self._fails = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The network's result, without gradients, in memory that later calls leave alone."""
        if self._fails or any(map(hooked, self._modules)):
            return self.network(*inputs)
        key = self._key(inputs)
        if key not in self._graphs:
            self._graphs[key] = None
            if len(self._graphs) > _MOST:
                self._graphs.popitem(last=False)
            return self.network(*inputs)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None:
            try:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()  # graphs run one after the other: they share memory
                graph = self._graphs[key] = _Graph(self.network, inputs, self._pool)
            except Exception as error:  # of many kinds: what cannot be recorded, memory
                self._fails = True
                self._graphs.clear()
                line = str(error).split("\n")[0]
                warnings.warn(
                    f"CUDA graph: the network is called instead ({type(error).__name__}: {line})", stacklevel=2
                )
                return self.network(*inputs)
        return graph(*inputs)

    def _key(self, inputs: tuple[Tensor, ...]) -> Any:
        """Everything that a graph holds fixed."""
        device = inputs[0].device.type
        settings = requested()[0], tf32_allowed(), torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled(device)
        weights = tuple(weight.data_ptr() for weight in self._weights)
        return tuple((tensor.shape, tensor.dtype, tensor.stride()) for tensor in inputs), settings, weights


class _Graph:
    def __init__(self, network: nn.Module, inputs: tuple[Tensor, ...], pool: Any) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), recording(self.graph, pool):
            self.output = network(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self.output.clone()
