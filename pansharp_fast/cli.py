"""The command line: thin commands, each calling a function of the package and importing it only when it runs.

Exit codes: 0 done, 1 the work failed, 2 the command line was wrong. A failure is one line on standard error,
"Error: argument: expected X, got Y"; `pansharp-fast --debug COMMAND ...` shows the traceback too.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from . import __version__

try:
    import click
except ImportError:
    sys.exit("pansharp-fast: click is not installed; run: pip install 'pansharp_fast[cli]'")

# Exceptions that report bad input or a failing machine, in the words of whoever raised them. Everything else is a
# defect of ours and keeps its traceback. Classes of optional packages stand by name: what was never imported raised
# nothing.
_FAILURES = (ValueError, TypeError, OSError, MemoryError)
_FAILURES_BY_NAME = (
    ("pansharp_fast.ops", "BackendError"),
    ("rasterio.errors", "RasterioError"),
    ("rasterio._err", "CPLE_BaseError"),
    ("safetensors", "SafetensorError"),
    ("torch", "OutOfMemoryError"),
)


def _failures() -> tuple[type[BaseException], ...]:
    named = [getattr(sys.modules[module], name) for module, name in _FAILURES_BY_NAME if module in sys.modules]
    return (*_FAILURES, *named)


class ErrorBoundary(click.Group):
    """A group whose commands fail in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            error.ctx = None  # leaves out the usage text, so that one line remains
            raise
        except click.ClickException:
            raise
        except Exception as error:
            if ctx.params["debug"] or not isinstance(error, _failures()):
                raise
            raise click.ClickException(" ".join(str(error).split()) or type(error).__name__) from error


@click.group(cls=ErrorBoundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def main(debug: bool) -> None:
    """PAN-sharpening with fused kernels."""


@main.command()
def info() -> None:
    """Versions, facts of the build, and each operator on each backend."""
    click.echo(importlib.import_module("pansharp_fast.info").report())
