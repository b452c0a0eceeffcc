"""Every command that the README and the documents show is one that the command line takes."""

import re
import shlex
from pathlib import Path

import click
import pytest

from pansharp_fast.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?:sh|bash|console)?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))):
        for block in BLOCK.findall(path.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("pansharp-fast ") and not line.startswith("pansharp-fast COMMAND"):
                    yield pytest.param(line, id=f"{path.name}: {line[:60]}")


def parse(command, arguments, parent=None, name="pansharp-fast"):
    """Take the arguments as a run would, down to the last subcommand, without running it."""
    with command.make_context(name, list(arguments), parent=parent) as context:
        if isinstance(command, click.Group):
            given, inner, rest = command.resolve_command(context, context._protected_args + context.args)
            return parse(inner, rest, context, given)
        return context.params


@pytest.mark.parametrize("line", list(commands()))
def test_documented_command_is_taken(line):
    parse(main, shlex.split(line, comments=True)[1:])


def test_a_wrong_command_would_be_noticed():
    for line in (
        "evaluate --model a --out b --sensor QB",
        "train nothing",
        "sharpen a b c --precision int4",
        "nothing",
    ):
        with pytest.raises(click.UsageError):
            parse(main, shlex.split(line))
