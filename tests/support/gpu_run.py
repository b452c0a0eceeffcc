"""pytest plugin for a run on a machine with a GPU (`-p tests.support.gpu_run`): nothing passes there by being skipped.

The run fails where the compiled libraries do not load, no device is visible or no test passed. Self-checks are off, so
that one of them does not turn every test of an operator into the same error. A process whose device answers no more
ends; xdist starts another one for the tests that are left.

With REHEARSE=1 two tests a file run, on whatever device there is.
"""

import os
from collections import Counter

import pytest

REHEARSE = os.environ.get("REHEARSE") == "1"


def pytest_sessionstart(session):
    import torch

    from pansharp_fast import ops
    from pansharp_fast._extension import load_error
    from pansharp_fast.ops import _backends

    libraries = ("_C",) if REHEARSE else ("_C", "_C_cuda")
    problems = [f"{name}: {reason}" for name in libraries if (reason := load_error(name)) is not None]
    if not REHEARSE and not torch.cuda.is_available():
        problems.append("no CUDA device is visible")
    if problems:
        pytest.exit("; ".join(problems), returncode=1)
    for operator in ops.OPERATORS:
        for backend in ("cuda", "triton"):
            _backends._verdicts[operator, backend, torch.device("cuda", 0)] = None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    if REHEARSE:
        seen = Counter()
        kept = []
        for item in items:
            seen[item.path] += 1
            if seen[item.path] <= 2:
                kept.append(item)
        items[:] = kept


def pytest_runtest_setup(item):
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"device lost before {item.nodeid}: {error}", flush=True)
            os._exit(3)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and not reporter.stats.get("passed"):
        print("\nno test passed")
        session.exitstatus = 1
