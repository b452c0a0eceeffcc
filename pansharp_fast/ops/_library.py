"""Registers an operator half: schema, fake kernel, autograd and Triton twin, once for all devices.

Schemas stand in Python because a Triton-only or reference-only installation needs them too; the compiled libraries add
their implementations under the same names. `<name>` runs compiled code (CPU or CUDA by the tensors' device),
`<name>_triton` the Triton kernel with the same schema; both share the fake kernel and the gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "pansharp_fast"
# Dispatch keys that Python implementations are registered for.
DEVICES = ("CPU", "CUDA", "XPU")
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton_module: str | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    implementation: Callable[..., Any] | None = None,
) -> None:
    """Define `pansharp_fast::name` and, with `triton_module`, `pansharp_fast::name_triton`.

    Args:
        name: `<op>_fwd` or `<op>_bwd`.
        schema: arguments and results in torch's schema language, `"(Tensor x, int n) -> Tensor"`.
        fake: shape function; strides must equal those of every implementation.
        triton_module: module below `pansharp_fast.kernels` holding a function called `name`; imported on first use.
        setup_context, backward: as in `torch.library.register_autograd`; derivatives are refused without them. backward
            finds `ctx.backend`, to be handed to `call`, so that the gradient runs where the forward ran.
        implementation: for a half made of torch's operators and passes (`define_pass`), on every device:
            `implementation(passes, *arguments)`, where `passes` holds the passes as attributes, compiled ones or those
            of `triton_module`.
    """
    names = [name] if triton_module is None else [name, f"{name}_triton"]
    for each in names:
        _library.define(each + schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
        torch.library.register_fake(f"{NAMESPACE}::{each}", fake, lib=_library)
        setup = _setup_with_backend(setup_context, "compiled" if each == name else "triton")
        gradient = backward or functools.partial(_refuse, each)
        torch.library.register_autograd(f"{NAMESPACE}::{each}", gradient, setup_context=setup, lib=_library)
    if triton_module is not None:

        def call_triton(*args: Any) -> Any:
            module = importlib.import_module(f"pansharp_fast.kernels.{triton_module}")
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device_of(args[0]):
                return getattr(module, name)(*args) if implementation is None else implementation(module, *args)

        for key in DEVICES:
            _library.impl(f"{name}_triton", call_triton, key)
    if implementation is not None:

        def call_compiled(*args: Any) -> Any:
            return implementation(torch.ops.pansharp_fast, *args)

        for key in DEVICES:
            _library.impl(name, call_compiled, key)


def _refuse(name: str, ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(f"{name}: expected first derivatives only, got a derivative of it (backend reference has all)")


def _setup_with_backend(setup_context: Callable[..., None] | None, backend: str) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backend
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    return setup


def call(name: str, backend: str, *args: Any) -> Any:
    """Run operator half `name` on `ctx.backend` or a backend chosen by `select` (not "reference")."""
    return getattr(torch.ops.pansharp_fast, f"{name}_triton" if backend == "triton" else name)(*args)


def define_pass(schema: str) -> None:
    """Define `pansharp_fast::<schema>`, a step of an operator half that is itself implemented in Python.

    Compiled code implements it; called below autograd and tracing it needs neither a gradient nor a fake kernel.
    """
    _library.define(schema)
