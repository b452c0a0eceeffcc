"""Whether a layer is exactly what its class makes of it, so that its tensors may be read instead of calling it.

Faster forms of a computation ask this first. Whatever users attach to a layer or put in its place (hooks, adapters,
parametrizations, other activations or padding, quantisation) makes it not plain, and the layer is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: tuple[Any, ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def hooked(module: nn.Module) -> bool:
    """Whether a call of `module` runs a hook, one of every module's included."""
    return any(getattr(module, name) for name in _HOOKS) or any(_GLOBAL_HOOKS)


def is_plain(module: nn.Module, *kinds: type[nn.Module], **settings: Any) -> bool:
    """Whether calling `module` does what the class says, one of `kinds` exactly, with these attributes.

    A dropout that drops is not plain.
    """
    return (
        type(module) in kinds
        and not hooked(module)
        and "forward" not in vars(module)
        and "_conv_forward" not in vars(module)
        and all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None)
        and all(getattr(module, name) == value for name, value in settings.items())
        and not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
    )


def pads_with_zeros(conv: nn.Conv2d, size: int, groups: int = 1) -> bool:
    """Whether a convolution has this kernel size, stride 1 and a border of zeros that keeps the image's size."""
    return (
        conv.kernel_size == (size, size)
        and conv.padding == (size // 2, size // 2)
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == groups
    )


def is_plain_conv(module: nn.Module, size: int, *, groups: int = 1, bias: bool | None = None) -> bool:
    """Whether `module` is a plain convolution as in `pads_with_zeros`; bias: whether it must have one, or must not."""
    from .convolution import Conv3x3

    return (
        is_plain(module, nn.Conv2d, Conv3x3)
        and isinstance(module, nn.Conv2d)
        and pads_with_zeros(module, size, groups)
        and (bias is None or (module.bias is not None) == bias)
    )


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a plain `nn.Sequential`, none of anything else."""
    return list(module) if is_plain(module, nn.Sequential) else []  # type: ignore[call-overload]


def traced() -> bool:
    """Whether calls are being recorded, for which the plain form is the one to see."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
