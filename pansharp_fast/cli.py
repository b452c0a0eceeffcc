"""The command line: thin commands, each calling a function of the package and importing it only when it runs.

Exit codes: 0 done, 1 the work failed, 2 the command line was wrong. A failure is one line on standard error,
"Error: argument: expected X, got Y"; `pansharp-fast --debug COMMAND ...` shows the traceback too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from . import __version__
from . import options as allowed

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
        usual, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"Warning: {message}\n"
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
        finally:
            warnings.formatwarning = usual


@click.group(cls=ErrorBoundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """PAN-sharpening with fused kernels."""
    ctx.with_resource(warnings.catch_warnings())
    warnings.showwarning = _warn
    for category in (DeprecationWarning, PendingDeprecationWarning):  # of libraries: no matter of the user's
        warnings.simplefilter("ignore", category)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _stop)


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning is one line, as an error is."""
    click.echo(f"Warning: {' '.join(str(message).split())}", err=True)


#: Time of the last signal to stop, and seconds that cleaning up is given.
_stopped, _CLEANING = [-math.inf], 5.0


def _stop(number: int, _frame: object) -> None:
    """Leave as an exception, so that unfinished files are removed; the exit code is the shell's for this signal."""
    earlier, _stopped[0] = _stopped[0], time.monotonic()
    if _stopped[0] - earlier > _CLEANING:  # the next one does not interrupt what this one begins
        raise SystemExit(128 + number)


@main.command()
def info() -> None:
    """Versions, facts of the build, and each operator on each backend."""
    click.echo(importlib.import_module("pansharp_fast.info").report())


def _creation_options(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for value in values:
        key, equals, setting = value.partition("=")
        if not (key and equals):
            raise click.BadParameter(f"expected KEY=VALUE, got {value!r}")
        options[key.upper()] = setting
    return options


def _bands(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 2,3,5,7, got {value!r}") from None


def _precision(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    try:
        return allowed.precision(value)
    except ValueError as error:
        raise click.BadParameter(str(error).partition(": ")[2]) from None


_precision_option = click.option(
    "--precision",
    metavar="|".join(allowed.PRECISIONS),
    default="float32",
    show_default=True,
    callback=_precision,
    help="auto: bfloat16 where the device has units for it.",
)


def _numbers(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, float] | None:
    """One number for rows and columns, or two."""
    if value is None:
        return None
    try:
        numbers = [float(part) for part in value.split(",")]
        rows, columns = numbers if len(numbers) > 1 else numbers * 2
    except ValueError:
        raise click.BadParameter(f"expected {param.metavar} such as 1.5,-0.25, got {value!r}") from None
    return rows, columns


def _values(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 1.5,-0.5, got {value!r}") from None


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of diffusion models; the command gets them as `sampling`, None where none is given."""

    @functools.wraps(command)
    def run(**options: Any) -> None:
        given = {name: options.pop(name) for name in ("steps", "sampler", "samples", "seed", "cuda_graph")}
        given = {name: value for name, value in given.items() if value is not None}
        command(
            sampling=importlib.import_module("pansharp_fast.diffusion").Sampling(**given) if given else None, **options
        )

    for option in (
        click.option(
            "--cuda-graph/--no-cuda-graph",
            default=None,
            help="Diffusion models: record a step once, replay it. Default: on CUDA devices.",
        ),
        click.option("--seed", type=click.IntRange(0), help="Diffusion models: seed of the noise  [default: 0]."),
        click.option(
            "--samples", type=click.IntRange(1), help="Diffusion models: results that are averaged  [default: 1]."
        ),
        click.option("--sampler", type=click.Choice(allowed.SAMPLERS), help="Diffusion models  [default: ddim]."),
        click.option("--steps", type=click.IntRange(1), help="Diffusion models: steps of the sampler  [default: 25]."),
    ):
        run = option(run)
    return run


@main.command()
@click.argument("pan", metavar="PAN.tif")
@click.argument("ms", metavar="MS.tif")
@click.argument("out", metavar="OUT.tif", type=click.Path())
@click.option(
    "--method",
    type=click.Choice(["auto", *allowed.METHODS]),
    help="Classical method  [default: auto, which is bt-h; not with --weights or --model].",
)
@click.option(
    "--weights",
    help="Sharpen with a network: checkpoint file, or name of shipped weights (--model uknow-... needs a file).",
)
@click.option(
    "--model",
    type=click.Choice(allowed.SHARPENERS),
    help="Refuse weights of another network  [default: take any].",
)
@click.option(
    "--register",
    type=click.Choice(["auto", "off"]),
    default="auto",
    show_default=True,
    help="Measure where each MS band lies against PAN, and bring it there.",
)
@click.option("--registration", metavar="FILE.json", help="Use a registration found before.")
@click.option("--save-registration", metavar="FILE.json", type=click.Path(dir_okay=False), help="Write what was found.")
@click.option(
    "--shift", metavar="DY,DX", callback=_values, help="PAN pixels by which MS lies off PAN, down and right positive."
)
@click.option("--reach", default=2.0, show_default=True, help="MS pixels within which to look for a displacement.")
@click.option(
    "--back-projection",
    metavar="auto|N",
    default="auto",
    show_default=True,
    help="Steps that bring the result closer to MS; auto is what real images bear.",
)
@click.option(
    "--frame",
    type=click.Choice(allowed.FRAMES),
    default="pan",
    show_default=True,
    help="Every band where PAN lies, or each where its own MS band lies.",
)
@click.option(
    "--phase",
    type=float,
    help="PAN pixels from the first PAN pixel's centre in an MS pixel to where that was sampled [default: the middle].",
)
@click.option("--sensor", help="Sensor, for its MTF  [default: what the metadata name, else a gain of .3].")
@click.option("--mtf", metavar="G,G,...", callback=_values, help="MTF gains at Nyquist, one or one a band.")
@click.option("--band-weights", metavar="W,W,...", callback=_values, help="Weights of --method brovey.")
@click.option("--peak", default=2047.0, show_default=True, help="Networks: largest value of the sensor.")
@click.option("--bands", metavar="N,N,...", callback=_bands, help="MS bands to use, from 1 [default: all].")
@click.option("--tile", type=int, help="PAN pixels computed at once, a side [default: 1024, networks 512].")
@click.option("--overlap", type=int, help="PAN pixels that a tile reaches beyond its core [default: 64 or more].")
@click.option(
    "--dtype",
    type=click.Choice(allowed.DTYPES),
    help="Pixel type of OUT [default: that of MS].",
)
@click.option("--nodata", type=float, help="Value without data where a file declares none, and in OUT; nan for NaN.")
@click.option("--co", metavar="KEY=VALUE", multiple=True, callback=_creation_options, help="GDAL creation option.")
@click.option("--cog", is_flag=True, help="Write a Cloud Optimized GeoTIFF.")
@click.option("--local-only", is_flag=True, help="Refuse sources that need a network or run code.")
@click.option("--overwrite", is_flag=True, help="Replace existing files.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_precision_option
@click.option("--preview", metavar="PICTURE", type=click.Path(), help="Write a picture (.png, .jpg) of the result too.")
@_sampling_options
@click.option(
    "--uncertainty",
    metavar="OUT_unc.tif",
    type=click.Path(),
    help="Diffusion models: write an uncertainty in DN too: a teacher's or the samples' standard deviation; of a "
    "student's single sample the drift of its estimates, which ranks pixels only. None is calibrated.",
)
@click.option("--quiet", is_flag=True, help="No progress bar, no summary.")
def sharpen(
    pan: str,
    ms: str,
    out: str,
    co: dict[str, str],
    quiet: bool,
    weights: str | None,
    model: str | None,
    registration: str | None,
    **options: Any,
) -> None:
    """Sharpen the multispectral MS.tif with PAN.tif into OUT.tif, on PAN's grid."""
    from .inference import sharpen_scene

    if weights is None and model not in (None, "pancrafter"):
        raise click.UsageError(
            f"--weights: expected a file with weights of {model} (none come with the package), got none"
        )
    if options["method"] is not None and (weights or model):
        raise click.UsageError("--method: expected none beside --weights or --model, which name a network")
    if sum([registration is not None, options["shift"] is not None, options["register"] == "off"]) > 1:
        raise click.UsageError("--registration, --shift, --register off: expected one of them")
    if registration is not None:
        options["register"] = registration
    options["weights"], options["architecture"] = weights, model
    with _quiet_libraries(), _progress("sharpening", quiet) as progress:
        summary = sharpen_scene(pan, ms, out, creation_options=co, progress=progress, **options)
    if not quiet:
        click.echo(summary.text(out))


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Drops what C libraries print on standard error by themselves (libtiff does where a disk is full).

    An exception says the same in one line. What Python prints is kept.
    """
    stderr = sys.__stderr__
    if stderr is None or sys.stderr is not stderr:  # somebody reads it already
        yield
        return
    stderr.flush()
    with open(os.dup(2), "w", buffering=1) as kept, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = kept
        try:
            yield
        finally:
            os.dup2(kept.fileno(), 2)
            sys.stderr = stderr


@contextlib.contextmanager
def _progress(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on standard error: the callback takes (done, total)."""
    if quiet:
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn(what), progress.BarColumn(), progress.MofNCompleteColumn())
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    console = Console(stderr=True)
    with progress.Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@main.command()
@click.option("--out", default="demo_output", show_default=True, type=click.Path(), help="Folder for the results.")
@click.option("--weights", help="Checkpoint file, or name of shipped weights  [default: what sharpen does].")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def demo(out: str, weights: str | None, device: str, quiet: bool) -> None:
    """Sharpen the three sample scenes that come with the package, and measure the result beside other methods."""
    from rich.console import Console
    from rich.table import Table

    from .demo import FULL, REDUCED, mean_results, run_demo
    from .metrics.measures import MEASURES

    with _quiet_libraries(), _progress("sharpening the sample scenes", quiet) as progress:
        results = run_demo(out, weights=weights, device=device, progress=progress)
    for title, names in (
        ("Reduced resolution, against the original MS", REDUCED),
        ("Full resolution (mottle and halo: registered GSA is 1)", FULL),
    ):
        table = Table("scene", "method", title=title)
        for name in names:
            table.add_column(MEASURES[name].heading, justify="right")
        if names is REDUCED:
            table.add_column("s per megapixel", justify="right")
        for result in (*results, *mean_results(results)):
            texts = [MEASURES[name].text(result.values[name]) for name in names]
            texts += [f"{result.seconds:.2f}"] if names is REDUCED else []
            table.add_row(result.scene, result.method, *texts, end_section=result.method == results[-1].method)
        Console().print(table)
    click.echo(f"Wrote scene1_sharpened.tif to scene3_sharpened.tif and comparison.png to {out}")


class _Recipes(click.Group):
    """One command a recipe, with a flag for each key of its configuration; built when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(importlib.import_module("pansharp_fast.training").RECIPES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        training = importlib.import_module("pansharp_fast.training")
        config = training.recipe_class(name).config_class

        def run(config: str | None, resume: bool, quiet: bool, **overrides: Any) -> None:
            measures = training.train(name, config, resume=resume, progress=not quiet, **overrides)
            click.echo("  ".join(f"{measure} {value:.4f}" for measure, value in measures.items()))

        options: list[click.Parameter] = [  # what is required may stand in the file, so click cannot ask for it
            click.Option(["--config"], type=click.Path(dir_okay=False), help="YAML file with any of the keys below."),
            click.Option(["--resume"], is_flag=True, help="Continue the run in OUT, if there is one."),
            click.Option(["--quiet"], is_flag=True, help="No progress bar."),
        ]
        for field in dataclasses.fields(config):
            needed = field.default is dataclasses.MISSING
            default = "  [required]" if needed else "" if field.default in (None, "", ()) else f"  [{field.default}]"
            flag = f"--{field.name.replace('_', '-')}"
            options.append(click.Option([flag, field.name], help=field.metadata["help"] + default))
        return click.Command(name, callback=run, params=options, help=f"Train {name}.")


@main.command(cls=_Recipes)
def train() -> None:
    """Train a model on PanCollection HDF5 files."""


@main.command()
@click.argument("pan", type=click.Path())
@click.argument("ms", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--sensor", help="Sensor whose MTF degrades MS  [default: what the metadata name, else a gain of .3].")
@click.option("--mtf", metavar="G,G,...", callback=_values, help="MTF gains at Nyquist, one or one a band.")
@click.option("--patch", default=64, show_default=True, help="Side of a patch, in MS pixels; a multiple of the ratio.")
@click.option("--overlap", default=4, show_default=True, help="Low-resolution pixels shared by neighbouring patches.")
@click.option("--valid-out", type=click.Path(dir_okay=False), help="File for patches of the scene's right part.")
@click.option("--valid-share", default=0.2, show_default=True, help="Share of the columns that goes to --valid-out.")
@click.option("--bands", metavar="N,N,...", callback=_bands, help="MS bands to use, from 1 [default: all].")
@click.option("--nodata", type=float, help="Value without data where a file declares none; nan for NaN.")
@click.option(
    "--shift",
    metavar="DY,DX",
    callback=_numbers,
    help="Displacement of MS against PAN in PAN pixels, down and right positive: MS shows at p + (DY, DX) what PAN "
    "shows at p. Undone as --frame says; fractions are allowed  [default: 0,0].",
)
@click.option(
    "--register",
    type=click.Choice(["auto", "off"]),
    default="off",
    show_default=True,
    help="Measure the displacement of every band against PAN, and undo it as --frame says.",
)
@click.option(
    "--frame",
    type=click.Choice(["ms", "pan"]),
    default="ms",
    show_default=True,
    help="Move PAN by --shift or to the bands' median, or every band to PAN.",
)
@click.option(
    "--phase",
    metavar="P or PY,PX",
    callback=_numbers,
    help="PAN index of the first MS pixel's centre within its area  [default: (ratio - 1) / 2].",
)
@click.option("--local-only", is_flag=True, help="Refuse sources that need a network or run code.")
def simulate(pan: str, ms: str, out: str, shift: tuple[float, float] | None, **options: Any) -> None:
    """Make training patches OUT (HDF5) from two GeoTIFFs by Wald's protocol."""
    counts = importlib.import_module("pansharp_fast.data.simulate").simulate(
        pan, ms, out, shift=shift or (0, 0), **options
    )
    for path, count in counts.items():
        click.echo(f"{path}: {count} patches")


def _baselines(_ctx: click.Context, _param: click.Parameter, value: str) -> list[str]:
    known = list(importlib.import_module("pansharp_fast.baselines").BASELINES)
    names = {"all": known, "none": []}.get(value, value.split(","))
    for name in names:
        if name not in known:
            raise click.BadParameter(f"expected all, none or some of {','.join(known)}, got {name!r}")
    return names


def _methods(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[str]:
    return [] if value is None else [name.strip() for name in value.split(",")]


def _band_names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> list[int | str] | None:
    if value is None:
        return None
    return [int(name) if name.strip().isdigit() else name.strip() for name in value.split(",")]


@main.command()
@click.option("--data", metavar="FILE.h5", type=click.Path(), help="PanCollection HDF5 file; or give --pan and --ms.")
@click.option("--pan", metavar="PAN.tif", help="PAN raster, cut into crops that count as scenes.")
@click.option("--ms", metavar="MS.tif", help="MS raster that belongs to it.")
@click.option("--out", metavar="DIR", required=True, type=click.Path(file_okay=False), help="Folder of the report.")
@click.option(
    "--sensor", help="WV2, WV3, WV4, QB, GF2, IKONOS, GeoEye1 or default  [default: what the data says, else default]."
)
@click.option(
    "--bands", metavar="B,B,...", callback=_band_names, help="Bands by name or by number from 1 [default: all]."
)
@click.option("--weights", multiple=True, help="Checkpoint file, or name of shipped weights; repeatable.")
@click.option(
    "--baselines",
    default="EXP",
    show_default=True,
    callback=_baselines,
    help="The textbook's methods: all, none or names: A,B,...",
)
@click.option(
    "--methods",
    metavar="M,M,...",
    callback=_methods,
    help="Further ones, each [registered ]NAME[ + N|auto]: a classical method or weights, its bands registered on PAN "
    "first, steps of back-projection after: 'registered bt-h + auto'.",
)
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    type=click.Choice(["reduced", "full"]),
    help="Against ground truth, or without [default: what the data offers].",
)
@click.option("--peak", type=float, help="Largest value [default: the sensor's].")
@click.option("--cut", default=21, show_default=True, help="Border pixels left out at reduced resolution.")
@click.option("--crop", type=int, help="Side of a crop of PAN [default: 512, 256 reduced, of what methods see].")
@click.option("--nodata", type=float, help="Value without data where a raster declares none.")
@click.option("--max-scenes", type=click.IntRange(1), help="Scenes of each protocol at most.")
@click.option("--pictures", "pictures_of", default=3, show_default=True, help="Scenes of each protocol to show.")
@click.option(
    "--shift-test", is_flag=True, help="Each method under shifts of 0 to 4 PAN pixels, unregistered and registered."
)
@click.option("--shift-scenes", default=4, show_default=True, type=click.IntRange(1), help="Scenes of the shift test.")
@click.option(
    "--published", help="Compare with the papers' numbers for WV3, GF2, QB, WV2, or none [default: if known]."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@_precision_option
@_sampling_options
@click.option("--overwrite", is_flag=True, help="Replace results of other settings in DIR.")
@click.option("--local-only", is_flag=True, help="Refuse sources that need a network or run code.")
@click.option("--quiet", is_flag=True, help="No progress bar, no tables.")
def evaluate(out: str, shift_test: bool, shift_scenes: int, quiet: bool, **options: Any) -> None:
    """Measure models and classical methods; write tables, pictures and a page to DIR.

    The same call again goes on where the last one stopped.
    """
    from .evaluation import evaluate as run
    from .evaluation.report import tables

    with _progress("evaluating", quiet) as progress:
        found = run(out, shift_scenes=shift_scenes if shift_test else 0, progress=progress, **options)
    for line in found["undefined"]:
        click.echo(f"Warning: {line}", err=True)
    if not quiet:
        click.echo(tables(found))
        click.echo(f"Report: {Path(out) / 'report.html'}")
