"""Which implementation runs a call, and why not another one.

Every operator declares its backends once (`Operator`); dispatcher, tests, `explain` and `info` read that declaration.
A backend answers a call with a list of reasons against it; an empty list means yes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .._extension import load_error

logger = logging.getLogger("pansharp_fast")

#: Every backend, in the order in which "auto" tries those that serve the device.
BACKENDS = ("cuda", "triton", "cpu", "reference")
#: Environment variable that names a backend for the whole process.
VARIABLE = "PANSHARP_FAST_BACKEND"

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message lists every reason."""


@dataclass(frozen=True)
class Support:
    """What one backend of one operator takes.

    devices: torch device types. dtypes: of the tensors. check: further reasons against a call, from the operator's
    options (keyword arguments that the operator passes to `select`). kernel: operator half that the library must hold,
    as one that was built before it was written does not.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    check: Callable[..., list[str]] | None = None
    kernel: str | None = None


@dataclass(frozen=True)
class Sample:
    """A call to test an operator by.

    Attributes:
        name: what is special about it.
        run: `run(*tensors, backend=...)` gives the results, a tuple.
        tensors: what the results may be derived by.
        options: what the operator hands to `select`.
    """

    name: str
    run: Callable[..., tuple[torch.Tensor, ...]]
    tensors: tuple[torch.Tensor, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Operator:
    """Declaration of an operator.

    Attributes:
        name: as in `OPERATORS`.
        support: backend -> what it takes.
        selfcheck: `selfcheck(backend, device)` raises where a backend disagrees with the reference.
        samples: `samples(device, dtype)` gives calls that together reach every part of every backend, small ones first.
    """

    name: str
    support: Mapping[str, Support]
    selfcheck: Callable[[str, torch.device], None] | None = None
    samples: Callable[[torch.device, torch.dtype], Iterator[Sample]] | None = None


#: name -> declaration, filled by the operators' own modules.
OPERATORS: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Add `operator` to `OPERATORS`; every backend name must be one of `BACKENDS`."""
    unknown = set(operator.support) - set(BACKENDS)
    if unknown:
        raise ValueError(f"{operator.name}: backends: expected some of {BACKENDS}, got {sorted(unknown)}")
    OPERATORS[operator.name] = operator
    return operator


def interpreting() -> bool:
    """Whether Triton kernels run under the interpreter (TRITON_INTERPRET=1), so that they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_reason(interpret: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpret:
        return None
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # Triton raises several kinds where there is no driver
        return f"triton has no active driver ({type(error).__name__})"
    return None


@functools.cache
def _cuda_reason() -> str | None:
    """Asked once: every call wants to know, and torch asks the driver."""
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def traced_as_constant(function: Any) -> Any:
    """Decorator: torch.compile calls `function` while tracing and keeps the result.

    What `torch.compiler.assume_constant_result` does, without importing the compiler for that.
    """
    function._dynamo_marked_constant = True
    return function


@traced_as_constant
def tf32_allowed() -> bool:
    """Whether torch's own setting lets matrix products of float32 on a GPU use TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@traced_as_constant
def unavailable(backend: str) -> str | None:
    """Why `backend` cannot run anything in this process, or None."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return load_error("_C")
    if backend == "triton":
        return _triton_reason(interpreting())
    if backend == "cuda":
        return load_error("_C_cuda") or _cuda_reason()
    raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")


@traced_as_constant
def _holds(kernel: str, backend: str) -> bool:
    """Whether the loaded library of `backend` implements an operator half."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pansharp_fast::{kernel}", backend.upper())


def reasons(operator: Operator, backend: str, tensors: Sequence[torch.Tensor], **options: Any) -> list[str]:
    """Every reason against running `operator` on `backend` with these tensors; empty means it can run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    support = operator.support.get(backend)
    if support is None:
        return [f"{operator.name} has no {backend} kernel"]
    found = []
    missing = unavailable(backend)
    if missing is not None:
        found.append(missing)
    elif support.kernel is not None and not _holds(support.kernel, backend):
        found.append(f"the library was built before {support.kernel} was written (run `pip install .` again)")
    devices = support.devices + (("cpu",) if backend == "triton" and interpreting() else ())
    for tensor in tensors:
        if tensor.device.type not in devices:
            found.append(f"device: expected {' or '.join(devices)}, got {tensor.device.type}")
            break
    for tensor in tensors:
        if tensor.dtype not in support.dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in support.dtypes)
            found.append(f"dtype: expected one of {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
            break
    if support.check is not None:
        found.extend(support.check(*tensors, **options))
    if backend != "reference" and transformed():
        found.append("torch.func: expected no transform around the call (backend='reference' takes them all)")
    failure = _verdict(operator.name, backend, tensors[0].device)
    if failure is not None:
        found.append(failure)
    return found


def no_gradient(*tensors: torch.Tensor) -> list[str]:
    """`Support.check` of a kernel for inference."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return ["gradients: expected none to be wanted, got a tensor that requires one"] if wanted else []


def autocasting(tensor: torch.Tensor) -> bool:
    """Whether autocast is on where `tensor` lies."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


@contextlib.contextmanager
def recording(graph: Any, pool: Any) -> Iterator[None]:
    """Record the block into a CUDA graph of that pool, the casts that autocast makes of weights included."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # what autocast keeps of the weights is gone at its end
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def plainly(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context of a reference: autocast would take its products apart from those of the kernels, which keep a dtype."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasting(tensor) else contextlib.nullcontext()


def cast(tensors: Sequence[torch.Tensor], widest: bool = False) -> list[torch.Tensor]:
    """Tensors of several floating dtypes in one, where autocast is on: elsewhere the operators refuse a mixture.

    The one is that which autocast computes in, as for `scaled_dot_product_attention`, or, as for `cat`, the widest.
    Like those, float64 keeps out of it.
    """
    tensors = list(tensors)
    device, dtypes = tensors[0].device.type, {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 or torch.float64 in dtypes or not all(dtype.is_floating_point for dtype in dtypes):
        return tensors
    if not autocasting(tensors[0]):
        return tensors
    if widest:
        dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    else:
        dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]


@traced_as_constant
def transformed() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, hessian, vmap, ...) is around this call."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class _Choice(threading.local):
    """A thread's own choice. Not a ContextVar: torch.compile follows this one, and guards its graphs by it."""

    def __init__(self) -> None:
        self.backend: str | None = None


_choice = _Choice()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operator called inside the block on `backend` ("auto" lifts an outer choice or the variable).

    The choice is the thread's own: others do not see it.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend: expected auto or one of {BACKENDS}, got {backend!r}")
    outer, _choice.backend = _choice.backend, backend
    try:
        yield
    finally:
        _choice.backend = outer


def requested(backend: str | None = None) -> tuple[str, str]:
    """(backend or "auto", who asked): argument over context manager over environment variable."""
    if backend is not None:
        name, source = backend, "argument backend"
    elif _choice.backend is not None:
        name, source = _choice.backend, "use_backend"
    else:
        name, source = os.environ.get(VARIABLE) or "auto", f"environment variable {VARIABLE}"
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected auto or one of {BACKENDS}, got {name!r}")
    return name, source


def candidates(device: str) -> tuple[str, ...]:
    """Backends that "auto" tries for tensors on `device`, best first. The interpreter is never chosen by itself."""
    return ("cpu", "reference") if device == "cpu" else ("cuda", "triton", "reference")


_logged: set[tuple[str, str, str]] = set()


def select(operator: Operator, tensors: Sequence[torch.Tensor], backend: str | None = None, **options: Any) -> str:
    """Name of the backend that runs this call.

    Raises:
        BackendError: a backend was named (argument, context manager or variable) and cannot run the call.
        ValueError: the name is none of `BACKENDS`.
    """
    name, source = requested(backend)
    if name != "auto":
        against = reasons(operator, name, tensors, **options)
        if against:
            raise BackendError(f"{operator.name}: {source} asked for {name!r}, which cannot run: {'; '.join(against)}")
        failure = _selfcheck(operator, name, tensors[0].device)
        if failure is not None:
            raise BackendError(f"{operator.name}: {source} asked for {name!r}, which cannot run: {failure}")
        return name
    skipped: list[str] = []
    for candidate in candidates(tensors[0].device.type):
        against = reasons(operator, candidate, tensors, **options)
        if not against:
            failure = _selfcheck(operator, candidate, tensors[0].device)
            if failure is not None:
                warnings.warn(f"{operator.name}: backend {candidate} is not used: {failure}", stacklevel=3)
                against = [failure]
        if not against:
            if not torch.compiler.is_compiling():
                _log_once(operator.name, candidate, tensors[0].device.type, skipped)
            return candidate
        skipped.append(f"{candidate} ({'; '.join(against)})")
    raise BackendError(f"{operator.name}: no backend can run this call: {', '.join(skipped)}")


def _log_once(operator: str, backend: str, device: str, skipped: list[str]) -> None:
    key = (operator, backend, device)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s on %s runs on %s%s", operator, device, backend, f"; not {', '.join(skipped)}" * bool(skipped))


#: (operator, backend, device) -> why the backend is not to be trusted there, or None; what is absent was not compared.
_verdicts: dict[tuple[str, str, torch.device], str | None] = {}
#: Held while a backend is compared; other threads wait for the verdict.
_lock = threading.RLock()
_running: set[tuple[str, str, torch.device]] = set()  # being compared by the holder: the check calls the operator


@traced_as_constant
def _verdict(name: str, backend: str, device: torch.device) -> str | None:
    """What a comparison found; None also where there was none."""
    return _verdicts.get((name, backend, device))


def _selfcheck(operator: Operator, backend: str, device: torch.device) -> str | None:
    """Why a GPU backend may not be used: it is compared with the reference on a tiny input, once a device.

    A call that torch.compile traces has it compared as well, so programs that only compile have a verdict. While a CUDA
    graph records nothing is compared: the calls that warm it up are.
    """
    if operator.selfcheck is None or backend not in ("cuda", "triton") or device.type == "cpu":
        return None
    if torch.compiler.is_compiling():
        return _selfcheck_registered(operator.name, backend, device)
    return _selfcheck_now(operator, backend, device)


@traced_as_constant
def _selfcheck_registered(name: str, backend: str, device: torch.device) -> str | None:
    """`_selfcheck_now` that torch.compile runs instead of tracing it."""
    return _selfcheck_now(OPERATORS[name], backend, device)


def _selfcheck_now(operator: Operator, backend: str, device: torch.device) -> str | None:
    key = (operator.name, backend, device)
    if key in _verdicts:
        return _verdicts[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # another call decides; a graph cannot hold the comparison
    with _lock:
        if key in _running:
            return None
        if key not in _verdicts:
            _running.add(key)
            try:
                _compare(operator, backend, device)
                _verdicts[key] = None
            except Exception as error:  # whatever went wrong, the answer is the same: do not trust the kernel
                _verdicts[key] = f"self-check on {device} failed: {error}"
            finally:
                _running.discard(key)
        return _verdicts[key]


def _compare(operator: Operator, backend: str, device: torch.device) -> None:
    """The operator's self-check, which takes gradients and names its dtypes and devices, in whatever modes we are.

    Among the modes are those of dispatch: under FakeTensorMode there would be no values to compare.
    """
    assert operator.selfcheck is not None
    with contextlib.ExitStack() as modes:
        for mode in (_disable_current_modes(), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu")):
            modes.enter_context(mode)
        if torch.amp.is_autocast_available(device.type):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        operator.selfcheck(backend, device)


def explain(operator: str, *tensors: torch.Tensor, **options: Any) -> str:
    """Text: for each backend of `operator`, whether it can run a call with these tensors, and why not.

    Raises:
        KeyError: no operator of that name.
    """
    if operator not in OPERATORS:
        raise KeyError(f"operator: expected one of {sorted(OPERATORS)}, got {operator!r}")
    declaration = OPERATORS[operator]
    lines = []
    for backend in BACKENDS:
        if tensors:
            against = reasons(declaration, backend, tensors, **options)
        elif backend not in declaration.support:
            against = [f"{operator} has no {backend} kernel"]
        else:
            missing = unavailable(backend)
            against = [missing] if missing else []
        lines.append(f"{operator} {backend}: {'available' if not against else 'not available: ' + '; '.join(against)}")
    return "\n".join(lines)
