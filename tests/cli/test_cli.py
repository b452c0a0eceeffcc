"""The command line as a whole: help, information, and the boundary that turns failures into one line."""

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from pansharp_fast.cli import ErrorBoundary, main


def run(*args: str, group: click.Group = main) -> tuple[int, str, str]:
    result = CliRunner().invoke(group, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_info_lists_versions_and_operators():
    code, out, _ = run("info")
    assert code == 0
    assert out.startswith("pansharp_fast ")
    assert "library _C:" in out


@pytest.mark.parametrize("args", [["no-such-command"], ["info", "--no-such-option"], ["info", "extra"]])
def test_usage_errors_are_one_line_and_exit_2(args):
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("Error: ")


@pytest.fixture
def failing() -> ErrorBoundary:
    group = ErrorBoundary("failing", params=[click.Option(["--debug"], is_flag=True)])

    @group.command()
    def bad_input() -> None:
        raise ValueError("ratio: expected 4,\n  got 2")

    @group.command()
    def defect() -> None:
        raise ZeroDivisionError("a defect")

    return group


def test_failure_is_one_line_and_exit_1(failing):
    assert run("bad-input", group=failing) == (1, "", "Error: ratio: expected 4, got 2\n")


def test_defects_keep_their_traceback(failing):
    with pytest.raises(ZeroDivisionError):
        run("defect", group=failing)


def test_debug_shows_the_traceback(failing):
    with pytest.raises(ValueError, match="ratio"):
        run("--debug", "bad-input", group=failing)


def test_command_line_starts_without_heavy_imports():
    heavy = {"torch", "rasterio", "h5py", "matplotlib", "diffusers"}
    code = f"import sys, pansharp_fast.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
