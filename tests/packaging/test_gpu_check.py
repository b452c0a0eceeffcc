"""The script for a machine with a GPU, rehearsed: every step to its end, and none that keeps the others from theirs."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FACTS = ROOT / "scripts" / "gpu_facts.py"

#: In the place of Python: does nothing at once, fails where its arguments contain $PLANTED.
NOTHING = r"""#!/usr/bin/env bash
echo "$@"
case "$*" in *"$PLANTED"*) exit 3 ;; esac
while [ $# -gt 0 ]; do
  [ "$1" != --only ] || operator=$2
  [ "$1" != --out ] || [ -z "${operator:-}" ] || echo table >"$2/$operator.md"
  shift
done
"""
#: step -> what its command contains and those of `info` and `selfcheck` do not.
PLANTED = {
    "values": "facts.py values",
    "speed": "facts.py speed",
    "network": "facts.py network",
    "samples": "facts.py samples",
    "tests_cm3a": "test_cm3a.py",
    "tests_wavelet": "test_wavelet.py",
    "tests_frequency_attention": "test_frequency_attention.py",
    "tests_conformance": "test_conformance.py",
    "tests_triton": "tests/ops",
    "tests_rest": "test_diffusion.py",
    "memcheck": "--alone",
    "racecheck": "--alone",
    "initcheck": "--alone",
    "bench_cm3a": "--only cm3a",
    "bench_wavelet": "--only wavelet",
    "bench_frequency_attention": "--only frequency_attention",
    "bench_pancrafter": "--only pancrafter",
    "bench_uknow": "--only uknow",
    "train": "train.py",
}


def check(*arguments, python=None, **variables):
    """Run the script with `python` as python3; its exit status and the step's."""
    folder = Path(python or sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **variables}
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--rehearse", *map(str, arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ends = dict(re.findall(r"^(\w+): exit (\d+), .*$", done.stdout, re.MULTILINE))
    return done.returncode, {name: int(status) for name, status in ends.items()}, done.stdout


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    path = tmp_path_factory.mktemp("bin") / "python3"
    path.write_text(NOTHING)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("step", PLANTED)
def test_failed_step_leaves_the_others(step, nothing, tmp_path):
    status, ends, output = check(tmp_path, "info", f"{step}:20", "selfcheck", python=nothing, PLANTED=PLANTED[step])
    assert (status, ends.pop(step) != 0) == (1, True), output
    assert ends == {"load": 0, "info": 0, "selfcheck": 0}
    report = (tmp_path / "report.md").read_text()
    assert [line for line in re.findall(r"## (\w+):", report)] == ["load", "info", step, "selfcheck"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {f"./logs/{name}.log" for name in ("load", "info", step, "selfcheck")} <= set(archive.getnames())


def test_every_step_ends_well_where_nothing_fails(nothing, tmp_path):
    status, ends, output = check(tmp_path, *PLANTED, python=nothing, PLANTED="no such argument")
    assert (status, set(ends)) == (0, {"load", *PLANTED}), output
    assert len(list(tmp_path.iterdir())) <= 8


def test_time_is_kept(nothing, tmp_path):
    slow = tmp_path / "bin" / "python3"
    slow.parent.mkdir()
    slow.write_text('#!/bin/sh\ncase "$*" in *pansharp_fast.info*) sleep 30 ;; esac\n')
    slow.chmod(0o755)
    status, ends, output = check("--seconds", "6", tmp_path / "out", "info", "selfcheck", python=slow)
    assert (status, ends) == (1, {"load": 0, "info": 124, "selfcheck": 1}), output
    assert "cut off at its limit" in output
    assert "not run: no time left" in output


def test_libraries_that_do_not_load_are_a_failure(tmp_path):
    status, ends, output = check(tmp_path / "out", "tests_cm3a", PANSHARP_FAST_LIBRARIES=str(tmp_path))
    assert (status, ends["load"]) == (1, 1), output
    skipped = tmp_path / "test_skipped.py"
    skipped.write_text("import pytest\n@pytest.mark.skip\ndef test(): pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.gpu_run", "-p", "no:cacheprovider", skipped]
    environment = {**os.environ, "REHEARSE": "1", "PYTHONPATH": str(ROOT)}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run(command, env=environment, **options)
    assert (done.returncode, "no test passed" in done.stdout) == (1, True), done.stdout
    environment["PANSHARP_FAST_LIBRARIES"] = str(tmp_path)
    done = subprocess.run(command, env=environment, **options)
    assert (done.returncode, "_C.so was not built" in done.stdout) == (1, True), done.stdout


def test_case_that_takes_the_device_along_leaves_the_others(tmp_path):
    """One that raises, one after which the device is lost, one that ends the process, one that hangs."""
    program = tmp_path / "facts.py"
    program.write_text(
        "import importlib.util, os, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('gpu_facts', {str(FACTS)!r})\n"
        "facts = sys.modules['gpu_facts'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(facts)\n"
        "class Facts:\n"
        "    lost = False\n"
        "    def __init__(self, *_): pass\n"
        "    def synchronize(self):\n"
        "        if self.lost: raise RuntimeError('no device')\n"
        "    def lose(self):\n"
        "        self.lost = True\n"
        "        return self.fine()\n"
        "    def fine(self): return {'ok': True, 'text': 'fine'}\n"
        "    def cases(self, what):\n"
        "        bodies = self.fine, lambda: 1 / 0, self.lose, lambda: os._exit(9), lambda: time.sleep(60), self.fine\n"
        "        for number, body in enumerate(bodies):\n"
        "            yield facts.Case(str(number), str(number), body)\n"
        "        for number in range(6):\n"
        "            yield facts.Case('all', f'lost {number}', self.lose)\n"
        "        yield facts.Case('last', 'last', self.fine)\n"
        "facts.Facts, facts.__file__ = Facts, __file__\n"
        "sys.exit(facts.main())\n"
    )
    command = [sys.executable, program, "values", "--patience", "2", "--seconds", "60", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = {
        record["name"]: (record["ok"], record["text"]) for record in json.loads((tmp_path / "values.json").read_text())
    }
    assert [name for name, (ok, _) in found.items() if ok] == ["0", "5", "last"]
    assert "ZeroDivisionError" in found["1"][1]
    assert "device lost" in found["2"][1]
    assert "ended with status 9" in found["3"][1]
    assert "no answer for 2 s" in found["4"][1]
    assert [name for name in found if name.startswith("lost")] == ["lost 0", "lost 1", "lost 2"]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """Values, speed, self-checks and tests as they are, on the CPU."""
    steps = ["info", "values", "speed", "samples", "selfcheck", "tests_cm3a"]
    status, ends, output = check(tmp_path, *steps, OMP_NUM_THREADS="1")
    assert (status, set(ends)) == (0, {"load", *steps}), output
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        for name in ("values", "speed", "samples", "selfcheck"):
            records = json.load(archive.extractfile(f"./{name}.json"))
            assert records
            assert all(record["ok"] for record in records)
        assert all(record["ms"] > 0 for record in json.load(archive.extractfile("./speed.json")) if "ms" in record)
