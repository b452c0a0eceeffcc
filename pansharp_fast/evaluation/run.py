"""Runs methods over scenes and records every measure, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..baselines import BASELINES
from ..data import Sensor, get_sensor
from ..data.sources import check_local
from ..files import atomic, check_folder
from ..metrics.measures import FULL, MEASURES, REDUCED, SHIFTED, Result
from ..options import precision as precision_name
from . import pictures, report
from .methods import off_and_auto, parse
from .published import PUBLISHED, recognise
from .scenes import PROTOCOLS, Hdf5Source, RasterSource, Scene, Source

if TYPE_CHECKING:
    from ..diffusion import Sampling

#: Shifts of the shift test, in pixels of the PAN that methods see.
SHIFTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
#: What each kind of task measures, and the frame in which its results are compared.
MEASURED = {"reduced": REDUCED, "shift": SHIFTED, "full": FULL}
FRAMES = {"reduced": "ms", "shift": "ms", "full": "pan"}
#: Files in the folder of an evaluation, its pictures apart.
FILES = ("settings.json", "records.jsonl", "results.json", "scenes.csv", "summary.md", "report.html", "shift.png")


def measure(
    fused: torch.Tensor, scene: Scene, task: str, peak: float, cut: int, names: Sequence[str] = ()
) -> dict[str, float | None]:
    """The measures of a task, or those named; None where one is undefined or infinite: JSON has neither."""
    known: dict[str, Any] = {"sensor": scene.sensor, "ratio": scene.ratio, "phase": scene.phase, "peak": peak}
    if task == "full":
        d = scene.registration[0].d
        result = Result(fused, scene.pan, scene.ms, d=d, reference=scene.reference, **known)
    else:
        result = Result(fused, scene.pan, scene.ms, gt=scene.gt, cut=cut, **known)
    values = {name: float(MEASURES[name].function(result)) for name in names or MEASURED[task]}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier run; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        with atomic(path) as part:
            part.write_text(complete)
    return [json.loads(line) for line in complete.splitlines()]


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
    sensor: str | Sensor | None = None,
    data: str | os.PathLike[str] | None = None,
    pan: str | os.PathLike[str] | None = None,
    ms: str | os.PathLike[str] | None = None,
    weights: Sequence[str] = (),
    baselines: Sequence[str] = ("EXP",),
    methods: Sequence[str] = (),
    bands: Sequence[int | str] | None = None,
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
    local_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure methods on a data set (`data`) or a pair of rasters (`pan`, `ms`), and write a report.

    Every value is kept in `OUT/records.jsonl` as soon as it is there; a second call with the same settings computes
    only what is missing, further methods included. Written at the end: results.json, scenes.csv, summary.md and
    report.html.

    Args:
        out: folder; made if need be.
        sensor: gives MTF gains, peak and the bands shown as red, green, blue. None is the one that the HDF5 file names
            in its attribute `sensor`, or the rasters in their metadata, if it has as many bands; else "default", of 16
            bits.
        data: PanCollection HDF5 file.
        pan, ms: anything rasterio opens; cut into crops, which count as scenes.
        weights: names of shipped weights, or checkpoint files; networks as they are, nothing registered.
        baselines: some of `pansharp_fast.baselines.BASELINES`, the textbook's methods.
        methods: further ones, `[registered ]NAME[ + N|auto]`: NAME is a classical method (alone: the textbook's),
            shipped weights or a checkpoint file; with `registered` bands are laid on PAN first; N, or auto, steps of
            back-projection follow. At reduced resolution every method is scored in MS's frame.
        bands: of the data, by the sensor's names or by numbers from 1; None is all.
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
        local_only: refuse rasters that are not local files.
        progress: called with (done, total).

    Returns:
        What results.json holds: settings; summary (mean, std, defined, scenes of each measure and method); undefined (a
        line for each mean that leaves scenes out); shift; published; scenes.

    Raises:
        ValueError: an argument is out of its range, or `out` holds results of other settings.
        OSError: a file cannot be read or written.
    """
    if published not in (None, "none", *PUBLISHED):
        raise ValueError(f"published: expected none or one of {', '.join(PUBLISHED)}, got {published!r}")
    for name in baselines:
        if name not in BASELINES:
            raise ValueError(f"baselines: expected all or some of {', '.join(BASELINES)}, got {name!r}")
    if local_only:
        for name, raster in (("PAN", pan), ("MS", ms)):
            if raster is not None:
                check_local(name, raster)
    source, sensor, peak = _open(data, pan, ms, crop, nodata, bands, sensor, peak)
    with source:
        protocols = tuple(protocols or source.default)
        for protocol in protocols:
            if protocol not in PROTOCOLS:
                raise ValueError(f"protocols: expected some of {', '.join(PROTOCOLS)}, got {protocol!r}")
        options = {"device": device, "precision": precision_name(precision), "peak": peak}
        chosen = parse([*baselines, *methods, *weights], source.bands, options, sampling)
        if not chosen:
            raise ValueError("weights, baselines, methods: expected at least one method, got none")
        shifted = {method.label: method for method in off_and_auto(list(chosen.values()))}
        phases = {name: source.phase("full" if name == "full" else "reduced") for name in MEASURED}
        identities = {
            (task, label): method.identity(FRAMES[task], phases[task], source.ratio)
            for task in MEASURED
            for label, method in (shifted if task == "shift" else chosen).items()
        }
        folder = Path(out)
        settings = {
            **source.facts,
            "sensor": sensor.name,
            "ratio": source.ratio,
            "MTF gains at Nyquist": list(sensor.gains(source.bands)),
            "peak": peak,
            "border cut at reduced resolution": cut,
            "version": __version__,
        }
        inputs: dict[str, Any] = {
            name: [path] for name, path in (("data", data), ("pan", pan), ("ms", ms)) if path is not None
        }
        inputs["weights"] = [method.file for method in chosen.values() if method.file is not None]
        check_folder("out", folder, FILES, inputs)
        _claim(folder, settings, overwrite)
        records = _read_records(folder / "records.jsonl")
        done = {(r["protocol"], r["scene"], tuple(r["shift"]), r["identity"]) for r in records}
        tasks = [
            (task, index, name, by, label, method)
            for task, index, name, by in _tasks(source, protocols, max_scenes, shift_scenes)
            for label, method in (shifted if task == "shift" else chosen).items()
        ]
        last: tuple[Any, Scene | None] = (None, None)
        with open(folder / "records.jsonl", "a", encoding="utf-8") as log:
            for count, (task, index, name, by, label, method) in enumerate(tasks, 1):
                identity = identities[task, label]
                shown = task != "shift" and index < pictures_of
                key, stem = (task, name, by, identity), folder / "pictures" / f"{task}-{index:03d}"
                if key not in done or (shown and not pictures.exist(stem, label)):
                    where, scene = last
                    if scene is None or where != (task, name, by):
                        scene = source.read("full" if task == "full" else "reduced", index, sensor, by)
                        last = (task, name, by), scene
                        if shown:
                            pictures.reference(stem, scene, sensor.rgb)
                    with torch.random.fork_rng():
                        torch.manual_seed(index)  # what a method draws depends on the scene alone
                        fused, seconds = method.run(scene, FRAMES[task])
                    if shown:
                        pictures.result(stem, label, fused, scene, sensor.rgb)
                    if key not in done:
                        record = {
                            "protocol": task,
                            "scene": name,
                            "shift": by,
                            "method": label,
                            "identity": identity,
                            "seconds": seconds,
                            "values": measure(fused, scene, task, peak, cut),
                        }
                        records.append(record)
                        log.write(json.dumps(record) + "\n")
                        log.flush()
                if progress is not None:
                    progress(count, len(tasks))
        asked_for = {(task, name, by, label): identities[task, label] for task, _, name, by, label, _ in tasks}
        records = [
            r
            for r in records
            if asked_for.get((r["protocol"], r["scene"], tuple(r["shift"]), r["method"])) == r["identity"]
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
            "methods": {label: identities[protocols[0], label] for label in chosen},
        }
        results = report.results(records, list(chosen), settings, source.bands, asked, asked == known)
    report.write(folder, results)
    return results


def _open(
    data: Any, pan: Any, ms: Any, crop: int | None, nodata: float | None, bands: Any, sensor: Any, peak: float | None
) -> tuple[Source, Sensor, float]:
    """The data, the sensor of the chosen bands and the peak: those asked for, else what the data says."""
    known = None if sensor is None else get_sensor(sensor)
    if (data is None) == (pan is None or ms is None) or (data is not None and (pan is not None or ms is not None)):
        raise ValueError("data, pan, ms: expected either data or both pan and ms, got something else")
    if bands is not None and known is None and data is not None:
        with Hdf5Source(data) as whole:
            known = get_sensor(whole.sensor or "default")
    numbers = None if bands is None else (known or get_sensor("default")).numbers(bands)
    source: Source = Hdf5Source(data, numbers) if data is not None else RasterSource(pan, ms, crop, nodata, numbers)
    try:
        if known is None:
            known = get_sensor(source.sensor or "default")
            if numbers is None and known.bands not in (None, source.bands):
                known = get_sensor("default")
            peak = source.peak if peak is None else peak
        chosen = known if numbers is None else known.select(numbers)
        chosen.gains(source.bands)
    except ValueError:
        source.__exit__(None, None, None)
        raise
    return source, chosen, float(chosen.peak if peak is None else peak)


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
    with atomic(mark) as part:
        part.write_text(text)


def _side(source: Source, protocol: str) -> int:
    height, width = source.original(protocol, 0)[0].shape[-2:]
    return height if height == width else 0
