"""Choice of a backend: order of the requests, reasons, errors, self-check."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

import pansharp_fast
from pansharp_fast import ops
from pansharp_fast.ops import BackendError, Operator, Support, explain, select, use_backend
from pansharp_fast.ops import _backends as backends
from tests.support import backends as support

FLOAT = (torch.float32,)


@pytest.fixture
def operator() -> Operator:
    """An operator with an imaginary CUDA kernel, not registered."""
    return Operator("imaginary", {"cuda": Support(("cuda",), FLOAT), "reference": Support(("cpu", "meta"), FLOAT)})


def test_argument_over_context_over_variable(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    monkeypatch.setenv(backends.VARIABLE, "cuda")
    with pytest.raises(BackendError, match="environment variable PANSHARP_FAST_BACKEND asked for 'cuda'"):
        select(operator, [x])
    with use_backend("reference"):
        assert select(operator, [x]) == "reference"
        with pytest.raises(BackendError, match="argument backend asked for 'cuda'"):
            select(operator, [x], "cuda")
        with use_backend("auto"):
            assert select(operator, [x]) == "reference"
    with pytest.raises(BackendError):
        select(operator, [x])
    monkeypatch.delenv(backends.VARIABLE)
    assert select(operator, [x]) == "reference"


def test_an_explicit_request_lists_every_reason(operator: Operator) -> None:
    with pytest.raises(BackendError) as error:
        select(operator, [torch.zeros(1, dtype=torch.float16)], "cuda")
    assert "device: expected cuda, got cpu" in str(error.value)
    assert "dtype: expected one of float32, got float16" in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_without_a_candidate_says_why(operator: Operator) -> None:
    with pytest.raises(BackendError, match=r"no backend can run .*reference .dtype: expected one of float32"):
        select(operator, [torch.zeros(1, dtype=torch.float16)])


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_unknown_names_are_refused(operator: Operator, name: str) -> None:
    with pytest.raises(ValueError, match="expected"), use_backend(name):
        pass
    with pytest.raises(ValueError, match="expected auto or one of"):
        select(operator, [torch.zeros(1)], name)


def test_use_backend_is_undone_by_an_error(operator: Operator) -> None:
    with pytest.raises(KeyError), use_backend("cuda"):
        raise KeyError
    assert select(operator, [torch.zeros(1)]) == "reference"


def test_auto_logs_once(operator: Operator, caplog: pytest.LogCaptureFixture) -> None:
    backends._logged.clear()
    with caplog.at_level(logging.INFO, "pansharp_fast"):
        select(operator, [torch.zeros(1)])
        select(operator, [torch.zeros(1)])
    assert [record.getMessage() for record in caplog.records] == [
        "imaginary on cpu runs on reference; not cpu (imaginary has no cpu kernel)"
    ]


def test_explain_names_every_backend() -> None:
    text = explain("cm3a", torch.zeros(1, 8, 4, 4))
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"cm3a {name}" for name in backends.BACKENDS]
    assert lines[-1] == "cm3a reference: available"
    assert "device: expected cuda, got cpu" in lines[0]
    assert pansharp_fast.explain is explain
    with pytest.raises(KeyError, match="cm3a"):
        explain("nothing")


def test_a_failed_selfcheck_warns_once_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def check(backend: str, device: torch.device) -> None:
        calls.append(backend)
        raise AssertionError("values differ")

    wrong = Operator("wrong", {"cuda": Support(("meta",), FLOAT), "reference": Support(("meta",), FLOAT)}, check)
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    x = torch.zeros(1, device="meta")
    with pytest.warns(UserWarning, match="wrong: backend cuda is not used: self-check on meta failed: values differ"):
        assert select(wrong, [x]) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select(wrong, [x]) == "reference"
    assert calls == ["cuda"]
    with pytest.raises(BackendError, match="values differ"):
        select(wrong, [x], "cuda")


def test_a_named_backend_that_fails_its_selfcheck_raises_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(backend: str, device: torch.device) -> None:
        raise AssertionError("values differ")

    wrong = Operator("wrong if named", {"cuda": Support(("meta",), FLOAT)}, check)
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    for _ in range(2):
        with pytest.raises(
            BackendError, match=r"asked for 'cuda', which cannot run: self-check on meta .*values differ"
        ):
            select(wrong, [torch.zeros(1, device="meta")], "cuda")


def test_threads_wait_for_a_selfcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them runs a kernel that is being compared, but the comparison itself."""
    x, started, release = torch.zeros(1, device="meta"), threading.Event(), threading.Event()
    inside, outside = [], []

    def check(backend: str, device: torch.device) -> None:
        inside.append(select(slow, [x], backend))
        started.set()
        release.wait(60)
        raise AssertionError("values differ")

    slow = Operator("slow", {"cuda": Support(("meta",), FLOAT), "reference": Support(("meta",), FLOAT)}, check)
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    threads = [threading.Thread(target=lambda: outside.append(select(slow, [x])), daemon=True) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads[0].start()
        assert started.wait(60)
        for thread in threads[1:]:
            thread.start()
        release.set()
        for thread in threads:
            thread.join(60)
    assert inside == ["cuda"]
    assert outside == ["reference"] * 3


def test_a_choice_is_its_threads_own() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()[0]))
        thread.start()
        thread.join()
        assert backends.requested()[0] == "reference"
    assert seen == [os.environ.get(backends.VARIABLE) or "auto"]


def test_a_compiled_graph_follows_the_choice() -> None:
    from torch._dynamo.testing import CompileCounter

    x, counter = torch.randn(1, 4, 3, 3), CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.cm3a(x, x, x, x, x, num_heads=1), fullgraph=True, backend=counter)
    compiled(x)
    kernel = counter.op_count
    with use_backend("reference"):
        compiled(x)
    assert counter.frame_count == 2
    assert counter.op_count > kernel + 10


@pytest.mark.parametrize(
    ("backend", "gpu", "skipped"),
    [("cpu", False, False), ("cuda", False, True), ("cuda", True, False), ("triton", True, False)],
)
def test_what_does_not_run_on_a_gpu_machine_is_not_skipped(
    monkeypatch: pytest.MonkeyPatch, backend: str, gpu: bool, skipped: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(support, "interpreting", lambda: False)
    monkeypatch.setattr(support, "unavailable", lambda name: None if name == "cpu" else "it does not load")
    parameter = support.parameter(backend)
    assert [mark.name for mark in parameter.marks] == ["gpu"] * (backend != "cpu") + ["skip"] * skipped


def test_a_passed_selfcheck_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    right = Operator("right", {"cuda": Support(("meta",), FLOAT)}, lambda backend, device: calls.append(backend))
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    for _ in range(3):
        assert select(right, [torch.zeros(1, device="meta")]) == "cuda"
    assert calls == ["cuda"]


@pytest.mark.parametrize("name", ["cm3a", "frequency_attention", "wavelet"])
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "default device"],
)
def test_selfchecks_run_in_any_mode(name: str, mode: Callable[[], AbstractContextManager[object]]) -> None:
    """A process's first call may be of an inference: the CPU kernel stands in for a GPU's here."""
    with mode():
        backends._compare(backends.OPERATORS[name], "cpu", torch.device("cpu"))


def test_a_captured_call_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    untouched = Operator("untouched", {"cuda": Support(("cuda",), FLOAT)}, lambda backend, device: 1 / 0)
    assert backends._selfcheck(untouched, "cuda", torch.device("cuda", 0)) is None
    assert not [key for key in backends._verdicts if key[0] == "untouched"]


def test_a_missing_library_keeps_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from pansharp_fast import _extension

    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    assert "_C.so was not built" in str(_extension.load_error.__wrapped__("_C"))
    (tmp_path / "_C.so").write_text("no library")
    assert "does not load with torch" in str(_extension.load_error.__wrapped__("_C"))


def test_a_selfcheck_compares_values_under_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    def check(backend: str, device: torch.device) -> None:
        assert torch.ones(2).sum().item() == 2

    right = Operator("right of fakes", {"cuda": Support(("meta",), FLOAT)}, check)
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)
    with FakeTensorMode():
        assert select(right, [torch.zeros(1, device="meta")], "cuda") == "cuda"
    assert backends._verdicts["right of fakes", "cuda", torch.device("meta")] is None


def test_what_only_compiles_is_selfchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def check(backend: str, device: torch.device) -> None:
        backends.OPERATORS["cm3a"].selfcheck("cpu", torch.device("cpu"))  # as much as a real one does
        calls.append(backend)
        raise AssertionError("values differ")

    support = {"cuda": Support(("meta",), FLOAT), "reference": Support(("meta",), FLOAT)}
    wrong = Operator("wrong compiled", support, check)
    monkeypatch.setitem(backends.OPERATORS, wrong.name, wrong)
    monkeypatch.setattr(backends, "unavailable", lambda backend: None)

    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + len(select(wrong, [x]))

    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(choose, backend="eager")(torch.zeros(3, device="meta"))
    assert out.shape == (3,)
    assert calls == ["cuda"]
    assert "values differ" in str(backends._verdicts[wrong.name, "cuda", torch.device("meta")])
