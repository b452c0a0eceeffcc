"""Runs methods over scenes and records every measure, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, metrics
from ..baselines import BASELINES
from ..data import Sensor, get_sensor
from ..data.grid import RATIO
from ..files import check_folder
from ..metrics._common import prepare
from ..metrics.reduced import gradient
from ..options import precision as precision_name
from . import pictures, report
from .published import PUBLISHED, recognise
from .scenes import PROTOCOLS, Hdf5Source, RasterSource, Scene, Source

if TYPE_CHECKING:
    from ..diffusion import Sampling

Method = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Measures against a ground truth, in the order of the tables.
MEASURES = {
    "reduced": ("PSNR", "SSIM", "SAM", "ERGAS", "SCC", "Q", "Q2n"),
    "shift": ("PSNR", "SAM", "ERGAS", "SCC", "Q2n", "sharpness"),
}
#: Shifts of the shift test, in pixels of the PAN that methods see.
SHIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)


def _reduced(
    fused: torch.Tensor, scene: Scene, peak: float, cut: int, wanted: Sequence[str]
) -> dict[str, torch.Tensor]:
    gt = scene.gt
    assert gt is not None

    def sharpness() -> torch.Tensor:
        strengths = [gradient(image)[..., 1:-1, 1:-1].mean() for image in prepare(fused, gt, cut)]
        return strengths[0] / strengths[1]

    measures: dict[str, Callable[[], torch.Tensor]] = {
        "PSNR": lambda: metrics.psnr(fused, gt, peak, cut),
        "SSIM": lambda: metrics.ssim(fused, gt, peak, cut),
        "SAM": lambda: metrics.sam(fused, gt, cut),
        "ERGAS": lambda: metrics.ergas(fused, gt, cut=cut),
        "SCC": lambda: metrics.scc(fused, gt, cut),
        "Q": lambda: metrics.q(fused, gt, cut),
        "Q2n": lambda: metrics.q2n(fused, gt, cut),
        "sharpness": sharpness,
    }
    return {name: measures[name]() for name in wanted}


def _full(fused: torch.Tensor, scene: Scene, sensor: Sensor) -> dict[str, torch.Tensor]:
    spectral, spatial = metrics.d_lambda_k(fused, scene.ms, sensor), metrics.d_s(fused, scene.ms, scene.pan)
    original = metrics.d_lambda(fused, scene.ms)
    return {
        "D_lambda_K": spectral,
        "D_s": spatial,
        "HQNR": (1 - spectral) * (1 - spatial),
        "D_lambda": original,
        "QNR": (1 - original) * (1 - spatial),
    }


def _weights_file(name: str) -> Path:
    from ..models.checkpoint import WEIGHTS

    path = Path(name)
    return path if path.suffix or path.exists() else WEIGHTS / f"{name}.safetensors"


def _baseline(name: str, sensor: Sensor) -> Method:
    return lambda pan, ms: BASELINES[name](pan, ms, sensor)


def _model(name: str, bands: int, options: dict[str, Any]) -> Method:
    from ..inference import sharpen
    from ..models import load_model

    # float64 in and out: nothing is rounded beyond the network's own float32.
    model = load_model(name, bands=bands)
    return lambda pan, ms: sharpen(pan, ms, weights=model, phase=RATIO / 2, register="off", **options)


def _methods(
    models: Sequence[str],
    baselines: Sequence[str],
    sensor: Sensor,
    peak: float,
    bands: int,
    sampling: Sampling | None,
    **options: Any,
) -> dict[str, tuple[str, Callable[[], Method]]]:
    """Label -> (identity, maker of the method); networks are loaded only when they are needed."""
    found: dict[str, tuple[str, Callable[[], Method]]] = {}
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(f"baselines: expected all or some of {', '.join(BASELINES)}, got {name!r}")
        found[name] = (f"{name} {__version__}", functools.partial(_baseline, name, sensor))
    samples = False
    for name in models:
        from ..models import FSAStudent, FSATeacher, load_model

        path = _weights_file(name)
        label = path.stem
        if label in found:
            raise ValueError(f"model: expected files of different names, got {label} twice")
        model = load_model(name, bands=bands)  # says at once what does not fit
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        identity, given = f"{label} {digest} {options['precision']}", {"peak": peak, **options}
        if isinstance(model, FSAStudent | FSATeacher):
            from ..diffusion import Sampling

            samples, given["sampling"] = True, sampling or Sampling()
            values = dataclasses.asdict(given["sampling"])
            identity += "".join(f" {key}={values[key]}" for key in ("steps", "sampler", "samples", "seed"))
        found[label] = (identity, functools.partial(_model, name, bands, given))
    if sampling is not None and not samples:
        raise ValueError("steps, sampler, samples, seed: expected a diffusion model to use them, got none")
    if not found:
        raise ValueError("model, baselines: expected at least one method, got none")
    return found


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier run; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete)
    return [json.loads(line) for line in complete.splitlines()]


def _number(value: torch.Tensor) -> float | None:
    """None where a measure is undefined or infinite: JSON has neither."""
    number = float(value)
    return number if math.isfinite(number) else None


def _tasks(
    source: Source, protocols: Sequence[str], max_scenes: int | None, shift_scenes: int
) -> Iterator[tuple[str, int, str, tuple[float, float]]]:
    """(protocol, scene number, scene name, shift of PAN)."""
    for protocol in protocols:
        for index, name in enumerate(source.scenes(protocol)[:max_scenes]):
            yield protocol, index, name, (0.0, 0.0)
    for index, name in enumerate(source.scenes("reduced")[:shift_scenes] if shift_scenes else []):
        for distance in SHIFTS:
            for by in ((0.0, distance), (distance, 0.0))[: 2 if distance else 1]:
                yield "shift", index, name, by


def evaluate(
    out: str | os.PathLike[str],
    *,
    sensor: str | Sensor,
    data: str | os.PathLike[str] | None = None,
    pan: str | os.PathLike[str] | None = None,
    ms: str | os.PathLike[str] | None = None,
    models: Sequence[str] = (),
    baselines: Sequence[str] = ("EXP",),
    protocols: Sequence[str] | None = None,
    peak: float | None = None,
    cut: int = 21,
    crop: int | None = None,
    nodata: float | None = None,
    max_scenes: int | None = None,
    pictures_of: int = 3,
    shift_scenes: int = 0,
    published: str | None = None,
    device: str = "auto",
    precision: str = "float32",
    sampling: Sampling | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure methods on a data set (`data`) or a pair of rasters (`pan`, `ms`), and write a report.

    Every value is kept in `OUT/records.jsonl` as soon as it is there; a second call with the same settings computes
    only what is missing, further methods included. Written at the end: results.json, scenes.csv, summary.md and
    report.html.

    Args:
        out: folder; made if need be.
        sensor: gives MTF gains, peak and the bands shown as red, green, blue. Never guessed.
        data: PanCollection HDF5 file.
        pan, ms: anything rasterio opens; cut into crops, which count as scenes.
        models: names of shipped weights, or checkpoint files.
        baselines: some of `pansharp_fast.baselines.BASELINES`.
        protocols: some of "reduced" (Wald protocol where the data has no ground truth) and "full"; None is what the
            data offers: reduced for HDF5 files with ground truth, full for those without, both for rasters.
        peak: largest digital number, over the sensor's own.
        cut: border left out at reduced resolution, as in the toolbox (`metrics`).
        crop: side of a crop of PAN, over the papers' 1024 (256 after reduction) and 512 (full).
        nodata: value without data where a raster declares none.
        max_scenes: number of scenes of each protocol; None is all.
        pictures_of: number of scenes of each protocol to show.
        shift_scenes: number of scenes of the shift test; 0 leaves it out.
        published: "WV3", "GF2", "QB", "WV2": compare with the papers' tables of that test set; None where the data has
            its sensor, number and size of scenes; "none" never.
        device, precision: of the networks, as in `pansharp_fast.sharpen`.
        sampling: how diffusion models sample; None is `Sampling()`.
        overwrite: replace results of other settings in `out`.
        progress: called with (done, total).

    Returns:
        What results.json holds: settings; summary (mean, std, defined, scenes of each measure and method); undefined (a
        line for each mean that leaves scenes out); shift; published; scenes.

    Raises:
        ValueError: an argument is out of its range, or `out` holds results of other settings.
        OSError: a file cannot be read or written.
    """
    sensor = get_sensor(sensor)
    peak = float(sensor.peak if peak is None else peak)
    if published not in (None, "none", *PUBLISHED):
        raise ValueError(f"published: expected none or one of {', '.join(PUBLISHED)}, got {published!r}")
    source: Source
    if data is not None and pan is None and ms is None:
        source = Hdf5Source(data)
    elif data is None and pan is not None and ms is not None:
        source = RasterSource(pan, ms, crop, nodata)
    else:
        raise ValueError("data, pan, ms: expected either data or both pan and ms, got something else")
    with source:
        protocols = tuple(protocols or source.default)
        for protocol in protocols:
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocols: expected some of {', '.join(PROTOCOLS)}, got {protocol!r}")
        sensor.gains(source.bands)
        options = {"device": device, "precision": precision_name(precision)}
        methods = _methods(models, baselines, sensor, peak, source.bands, sampling, **options)
        folder = Path(out)
        settings = {
            **source.facts,
            "sensor": sensor.name,
            "MTF gains at Nyquist": list(sensor.gains(source.bands)),
            "peak": peak,
            "border cut at reduced resolution": cut,
            "version": __version__,
        }
        inputs = {name: [path] for name, path in (("data", data), ("pan", pan), ("ms", ms)) if path is not None}
        check_folder("out", folder, FILES, inputs | {"model": [str(model) for model in models]})
        _claim(folder, settings, overwrite)
        records = _read_records(folder / "records.jsonl")
        done = {(r["protocol"], r["scene"], tuple(r["shift"]), r["identity"]) for r in records}
        tasks = list(_tasks(source, protocols, max_scenes, shift_scenes))
        total, count = len(tasks) * len(methods), 0
        loaded: dict[str, Method] = {}
        with open(folder / "records.jsonl", "a", encoding="utf-8") as log:
            for protocol, index, name, by in tasks:
                scene: Scene | None = None
                shown = protocol != "shift" and index < pictures_of
                for label, (identity, make) in methods.items():
                    key = (protocol, name, by, identity)
                    stem = folder / "pictures" / f"{protocol}-{index:03d}"
                    if key not in done or (shown and not pictures.exist(stem, label)):
                        if scene is None:
                            scene = source.read("reduced" if protocol == "shift" else protocol, index, sensor, by)
                            if shown:
                                pictures.reference(stem, scene, sensor.rgb)
                        if label not in loaded:
                            loaded[label] = make()
                        fused, seconds = _run(loaded[label], scene, index)
                        if protocol == "full":
                            values = _full(fused, scene, sensor)
                        else:
                            values = _reduced(fused, scene, peak, cut, MEASURES[protocol])
                        if shown:
                            pictures.result(stem, label, fused, scene, sensor.rgb)
                        record = {
                            "protocol": protocol,
                            "scene": name,
                            "shift": by,
                            "method": label,
                            "identity": identity,
                            "seconds": seconds,
                            "values": {measure: _number(value) for measure, value in values.items()},
                        }
                        if key not in done:
                            records.append(record)
                            log.write(json.dumps(record) + "\n")
                            log.flush()
                    count += 1
                    if progress is not None:
                        progress(count, total)
        wanted = {
            (protocol, name, by, label): identity
            for protocol, _, name, by in tasks
            for label, (identity, _) in methods.items()
        }
        records = [
            r
            for r in records
            if wanted.get((r["protocol"], r["scene"], tuple(r["shift"]), r["method"])) == r["identity"]
        ]
        known = {
            protocol: recognise(sensor.name, protocol, len(source.scenes(protocol)), _side(source, protocol))
            for protocol in protocols
        }
        asked = {protocol: published for protocol in protocols} if published else known
        settings |= {
            "protocols": list(protocols),
            "scenes measured": {protocol: len(source.scenes(protocol)[:max_scenes]) for protocol in protocols},
            "device": device,
            "precision": options["precision"],
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            "methods": {label: identity for label, (identity, _) in methods.items()},
        }
        results = report.results(records, list(methods), settings, source.bands, asked, asked == known)
    report.write(folder, results)
    return results


#: Files in the folder of an evaluation, its pictures apart.
FILES = ("settings.json", "records.jsonl", "results.json", "scenes.csv", "summary.md", "report.html", "shift.png")


def _claim(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder ours: same settings go on, others must be allowed to replace what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    mark, text = folder / "settings.json", json.dumps(settings, indent=2)
    if mark.exists() and mark.read_text() != text:
        if not overwrite:
            raise ValueError(f"out: expected a new folder or results of the same settings, got others in {folder}")
        (folder / "records.jsonl").unlink(missing_ok=True)
        for picture in (folder / "pictures").glob("*.png"):
            picture.unlink()
    (folder / "pictures").mkdir(exist_ok=True)
    mark.write_text(text)


def _run(method: Method, scene: Scene, index: int) -> tuple[torch.Tensor, float]:
    """Result and seconds; random numbers, where a method draws some, depend on the scene alone."""
    with torch.random.fork_rng():
        torch.manual_seed(index)
        start = time.perf_counter()
        fused = method(scene.pan, scene.ms).cpu()
        return fused.double(), time.perf_counter() - start


def _side(source: Source, protocol: str) -> int:
    height, width = source.original(protocol, 0).pan.shape[-2:]
    return height if height == width else 0
