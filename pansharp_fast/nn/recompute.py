"""Training in less memory: what is cheap to compute is computed again in the backward pass instead of being held."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..ops._backends import requested, use_backend
from .plain import traced


class _Choice(threading.local):
    on = False


_choice = _Choice()


@contextlib.contextmanager
def recomputing(on: bool = True) -> Iterator[None]:
    """Whether networks of this thread, called inside the block, hold only what goes into their blocks' parts.

    Norms, activations, dropout and attention, with its projections and feed-forward layers, are computed again in the
    backward pass; the convolutions of residual blocks are not. Results and gradients are the same.
    """
    outer, _choice.on = _choice.on, on
    try:
        yield
    finally:
        _choice.on = outer


def recomputed(function: Callable[..., Tensor], *args: Any, random: bool = False) -> Tensor:
    """function(*args); inside `recomputing` only the args are held for the backward pass.

    The operation that ends it is not done twice. random: whether it draws numbers.
    """
    if traced() or not (_choice.on and torch.is_grad_enabled()):
        return function(*args)
    name = requested()[0]  # a thread's own choice, and the backward pass has its own threads

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        return contextlib.nullcontext(), use_backend(name)

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, context_fn=contexts)
