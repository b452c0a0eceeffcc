"""What every operator promises on every backend, by the samples that its declaration gives. Laws of one stand apart."""

from __future__ import annotations

import functools
import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pansharp_fast.ops import OPERATORS, BackendError, use_backend
from pansharp_fast.ops._backends import Operator, Sample, reasons, select
from tests.support.accuracy import BACKWARD, FORWARD, assert_accurate, error
from tests.support.backends import device_of, parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: In units of rounding, what is luck forward and backward: sums over few values, sums of large terms that cancel.
FLOORS = {
    "cm3a": (2.0, 2.0),
    "frequency_attention": (1.0, 4.0),
    "hold_chroma": (0.25, 0.25),
    "norm": (2.0, 2.0),
    "resample": (0.25, 0.25),
    "wavelet": (0.25, 0.375),
}
#: Of Winograd's transforms, where plain PyTorch multiplies: in float32 whatever the dtype.
WINOGRAD = 25 * torch.finfo(torch.float32).eps


@functools.cache
def samples(operator: str, backend: str, dtype: torch.dtype) -> list[Sample]:
    declaration = OPERATORS[operator]
    assert declaration.samples is not None
    every = list(declaration.samples(torch.device(device_of(backend)), dtype))
    return [each for each in every if not against(declaration, backend, each)]


def against(operator: Operator, backend: str, sample: Sample) -> list[str]:
    return reasons(operator, backend, sample.tensors, **sample.options)


def kernels(*dtypes: torch.dtype, small: bool = False) -> pytest.MarkDecorator:
    """Parameters operator, backend, dtype and the number of the sample; `small`: of the first two samples only."""
    found = []
    for name, operator in OPERATORS.items():
        for dtype in dtypes:
            for parameter in parameters(operator, dtype):
                (backend,) = parameter.values
                if backend == "reference":
                    continue
                # Where there is no GPU its samples are those of the CPU, and skipped.
                runs_here = not parameter.marks or all(mark.name != "skip" for mark in parameter.marks)
                count = len(samples(name, backend if runs_here else "cpu", dtype)) if runs_here else 1
                for index in range(min(count, 2) if small else count):
                    identity = f"{name}-{backend}-{str(dtype).removeprefix('torch.')}-{index}"
                    found.append(pytest.param(name, backend, dtype, index, marks=parameter.marks, id=identity))
    return pytest.mark.parametrize(("operator", "backend", "dtype", "index"), found)


small = kernels(torch.float32, small=True)


def differentiable(operator: str, backend: str, sample: Sample) -> bool:
    leaves = [each.detach().requires_grad_() for each in sample.tensors]
    return not reasons(OPERATORS[operator], backend, leaves, **sample.options)


def cotangents(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=generator).to(each) for each in outputs]


def evaluate(
    sample: Sample, backend: str | None, gradient: bool, tensors: tuple[torch.Tensor, ...] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Results and, if asked, the gradients of all tensors for random gradients of the results."""
    leaves = [each.detach().requires_grad_(gradient) for each in tensors or sample.tensors]
    with torch.set_grad_enabled(gradient):
        outputs = sample.run(*leaves, backend=backend)
    gradients = torch.autograd.grad(outputs, leaves, cotangents(outputs)) if gradient else ()
    return [each.detach() for each in outputs], list(gradients)


def flat(results: tuple[list[torch.Tensor], list[torch.Tensor]]) -> list[torch.Tensor]:
    return [*results[0], *results[1]]


def disturbed(sample: Sample, count: int = 8) -> Iterator[tuple[torch.Tensor, ...]]:
    """The sample's tensors, every value one unit of rounding up or down."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        signs = [2 * torch.randint(2, each.shape, generator=generator).to(each) - 1 for each in sample.tensors]
        yield tuple(
            each * (1 + torch.finfo(each.dtype).eps * sign) for each, sign in zip(sample.tensors, signs, strict=True)
        )


def judge(
    operator: str, sample: Sample, actual: tuple[list, list], gradient: bool, tensor_cores: bool | None = None
) -> None:
    """By the rule of accuracy: `actual` are results of the sample on some backend, by default that of its device."""
    dtype = sample.tensors[0].dtype
    yardstick = torch.float32 if dtype == torch.float64 else dtype
    exact = evaluate(sample, "reference", gradient, tuple(each.double() for each in sample.tensors))
    plain = evaluate(sample, "reference", gradient, tuple(each.to(yardstick) for each in sample.tensors))
    more = operator == "cm3a" and (sample.tensors[0].is_cuda if tensor_cores is None else tensor_cores)
    runs = [plain]
    if more and dtype == torch.float32 and sample.tensors[0].shape[-2:].numel() == 1:
        # The gradients of one pixel are a few sums that may cancel: plain PyTorch's roundings may be lucky there,
        # truncation, always to one side, is not. What one unit in every input does to them stands beside.
        runs += [evaluate(sample, "reference", gradient, each) for each in disturbed(sample)]
    winograd = WINOGRAD / torch.finfo(actual[0][0].dtype).eps
    floors = FLOORS.get(operator, (winograd, winograd))
    for part, (got, want, factor, floor) in enumerate(zip(actual, exact, (FORWARD, BACKWARD), floors, strict=True)):
        usual = [
            max(each, key=lambda result, want=value: error(result, want))
            for value, *each in zip(want, *(run[part] for run in runs[: None if part else 1]), strict=True)
        ]
        # Tensor cores truncate their sums: three TF32 products make up to 2.1 times the error of float32, and up to 4
        # roundings in the few values of one pixel, where plain PyTorch may make none.
        floor += 2 * more
        # Plain PyTorch's error in float32, which stands for that in float64, is another draw.
        floor += dtype == torch.float64
        assert_accurate(got, usual, want, factor=factor + more, floor=floor)


@pytest.mark.values
@kernels(*DTYPES)
def test_values_and_gradients(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    actual = evaluate(sample, backend, gradient)
    assert all(each.dtype == dtype or each.dtype == torch.float32 for each in actual[0])
    judge(operator, sample, actual, gradient)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous().mT


def sliced(x: torch.Tensor) -> torch.Tensor:
    """Every second column of the right half of a larger tensor, with NaN around."""
    larger = x.new_full((*x.shape[:-1], 4 * x.shape[-1]), math.nan)
    larger[..., 2 * x.shape[-1] :: 2] = x
    return larger[..., 2 * x.shape[-1] :: 2]


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand_as(x)


@pytest.mark.values
@pytest.mark.parametrize("layout", [transposed, sliced, expanded])
@small
def test_any_strides(
    operator: str, backend: str, dtype: torch.dtype, index: int, layout: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    tensors = tuple(layout(each) if each.dim() > 2 else each for each in sample.tensors)
    dense = Sample(sample.name, sample.run, tuple(each.contiguous() for each in tensors), sample.options)
    judge(operator, dense, evaluate(sample, backend, gradient, tensors), gradient)


@small
def test_empty_batch(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    batch = len(sample.tensors[0])
    tensors = tuple(each[:0] if len(each) == batch else each for each in sample.tensors)
    results = {name: evaluate(sample, name, gradient, tensors) for name in (backend, "reference")}
    for ours, wanted in zip(*results.values(), strict=True):
        assert [each.shape for each in ours] == [each.shape for each in wanted]
        assert all(not each.any() for each in ours)


@small
def test_same_bits_and_nothing_uninitialised(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    """Memory that torch.empty has filled with NaN leaves no trace."""
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    first = flat(evaluate(sample, backend, gradient))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        second = flat(evaluate(sample, backend, gradient))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Recorder(TorchDispatchMode):
    """Notes the calls of the package's own operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "pansharp_fast":
            self.calls.setdefault(function, args)
        return function(*args, **(kwargs or {}))


@small
def test_opcheck(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    with Recorder() as recorder:
        evaluate(sample, backend, gradient)
    assert recorder.calls
    for function, arguments in recorder.calls.items():
        # Derivatives of derivatives are the wavelets' alone.
        wanted = gradient and (operator == "wavelet" or "_fwd" in function.name())
        leaves = [
            each.detach().requires_grad_(wanted) if isinstance(each, torch.Tensor) else each for each in arguments
        ]
        utilities = (
            "test_schema",
            "test_faketensor",
            *(("test_autograd_registration", "test_aot_dispatch_dynamic") * wanted),
        )
        torch.library.opcheck(function, tuple(leaves), test_utils=utilities)


@small
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("named", [False, True])
def test_compiles_as_one_graph(operator: str, backend: str, dtype: torch.dtype, index: int, named: bool) -> None:
    sample = samples(operator, backend, dtype)[index]
    gradient = differentiable(operator, backend, sample)
    asked = backend if named else None
    torch.compiler.reset()
    compiled = torch.compile(lambda *tensors: sample.run(*tensors, backend=asked), fullgraph=True, backend="aot_eager")
    again = Sample(sample.name, lambda *tensors, backend: compiled(*tensors), sample.tensors)
    torch.testing.assert_close(evaluate(again, None, gradient), evaluate(sample, asked, gradient))


# ---- Transforms of torch.func, autocast, tracing ---------------------------------------------------------------------


def scalar(sample: Sample, backend: str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of the sample's first tensor that is not linear."""

    def function(x: torch.Tensor) -> torch.Tensor:
        outputs = sample.run(x, *(each.to(x.dtype) for each in sample.tensors[1:]), backend=backend)
        return sum((each.sin().sum() for each in outputs), torch.zeros(()))

    return function


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_transforms_of_torch_func(operator: str, index: int) -> None:
    sample = samples(operator, "reference", torch.float64)[index]
    x, function = sample.tensors[0], scalar(sample)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(scalar(sample, "reference")(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(function)(x), expected)
    value, pull = torch.func.vjp(function, x)
    torch.testing.assert_close(pull(torch.ones_like(value))[0], expected)
    tangent = torch.randn_like(x)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (tangent,))[1], (expected * tangent).sum())
    several = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(function)(several), torch.stack([function(each) for each in several]))
    per_sample = torch.vmap(torch.func.grad(function))(several)
    torch.testing.assert_close(per_sample, torch.stack([torch.func.grad(function)(each) for each in several]))
    row = torch.func.hessian(lambda part: function(x + part * tangent))(torch.zeros((), dtype=x.dtype))
    wanted = torch.autograd.functional.hessian(
        lambda part: scalar(sample, "reference")(x + part * tangent), torch.zeros((), dtype=x.dtype)
    )
    torch.testing.assert_close(row, wanted)


@small
def test_kernels_name_the_way_out_of_torch_func(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    sample = samples(operator, backend, dtype)[index]
    for transform in (torch.func.grad, torch.vmap):
        x = sample.tensors[0] if transform is torch.func.grad else sample.tensors[0][None]
        with pytest.raises(BackendError, match=r"torch\.func: .*backend='reference'"):
            transform(scalar(sample, backend))(x)


@contextmanager
def autocast(sample: Sample) -> Iterator[None]:
    with torch.autocast(sample.tensors[0].device.type, torch.bfloat16):
        yield


@pytest.mark.parametrize("reference", [False, True])
@small
def test_autocast_changes_nothing_of_one_dtype(
    operator: str, backend: str, dtype: torch.dtype, index: int, reference: bool
) -> None:
    sample = samples(operator, backend, dtype)[index]
    asked = "reference" if reference else backend
    expected = evaluate(sample, asked, False)
    with autocast(sample):
        actual = evaluate(sample, asked, False)
    assert all(torch.equal(a, b) for a, b in zip(actual[0], expected[0], strict=True))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("operator", ["cm3a", "frequency_attention"])
def test_autocast_takes_a_mixture(operator: str, backend: str | None) -> None:
    """As `scaled_dot_product_attention` does; without autocast it is refused."""
    sample = samples(operator, "cpu", torch.float32)[0]
    mixture = (sample.tensors[0].bfloat16(), *sample.tensors[1:])
    with autocast(sample):
        computed = torch.nn.functional.scaled_dot_product_attention(*mixture[:3]).dtype
        assert computed == torch.bfloat16
        actual = evaluate(Sample("", sample.run, mixture), backend, True)
    assert [each.dtype for each in actual[0]] == [computed] * len(actual[0])
    assert [each.dtype for each in actual[1]] == [each.dtype for each in mixture]
    maps = 5 if operator == "cm3a" else len(mixture)
    cast = (*(each.to(computed) for each in mixture[:maps]), *mixture[maps:])
    torch.testing.assert_close(actual[0], evaluate(Sample("", sample.run, cast), backend, True)[0])
    with pytest.raises(ValueError, match="expected"):
        evaluate(Sample("", sample.run, mixture), backend, False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@small
def test_traces(operator: str, backend: str, dtype: torch.dtype, index: int) -> None:
    sample = samples(operator, backend, dtype)[index]
    traced = torch.jit.trace(lambda *tensors: sample.run(*tensors, backend=backend), sample.tensors, check_trace=False)
    other = tuple(each.flip(-1).contiguous() for each in sample.tensors)
    for got, want in zip(traced(*other), sample.run(*other, backend=backend), strict=True):
        torch.testing.assert_close(got, want)


# ---- Several at once -------------------------------------------------------------------------------------------------


def everything(backend: str | None) -> list[torch.Tensor]:
    """Results and gradients of small samples of every operator."""
    found = []
    for name in OPERATORS:
        for sample in samples(name, "cpu", torch.float32)[:2]:
            found += flat(evaluate(sample, backend, backend is None))
    return found


def test_threads_at_once() -> None:
    """Eight threads, each with a backend of its own choice."""
    expected = {"reference": everything("reference"), None: everything(None)}
    failures: list[str] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for _ in range(5):
                if number % 2:
                    with use_backend("reference"):
                        chosen = select(OPERATORS["cm3a"], samples("cm3a", "cpu", torch.float32)[0].tensors)
                        assert chosen == "reference"
                        got = everything("reference")
                else:
                    got = everything(None)
                wanted = expected["reference" if number % 2 else None]
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def _worker(queue: Any) -> None:
    torch.set_num_threads(1)  # as a DataLoader's worker: after a fork torch itself waits for threads that are gone
    queue.put([each.numpy().tobytes() for each in everything(None)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    """As a DataLoader's: with fork after the parent has used its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    everything(None)
    torch.set_num_threads(1)
    expected = [each.numpy().tobytes() for each in everything(None)]
    torch.set_num_threads(threads)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(queue,), daemon=True) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert queue.get(timeout=300) == expected
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0


# ---- On a machine with a GPU -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_was_built_is_selected(operator: str) -> None:
    """Tensors on a GPU go to the first backend that the operator declares for it."""
    declaration = OPERATORS[operator]
    assert declaration.samples is not None
    best = next(name for name in ("cuda", "triton", "reference") if name in declaration.support)
    for sample in declaration.samples(torch.device("cuda"), torch.float32):
        assert select(declaration, sample.tensors, **sample.options) == best, sample.name
