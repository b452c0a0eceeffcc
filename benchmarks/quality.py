"""How good methods and weights are on real pairs, at reduced and at full resolution, beside what is aimed at.

    python -m benchmarks.quality [--methods M,M,...] [--weights W ...] [--cases NAME ...] [--crops DIR] [--out FILE]

Methods are named as `pansharp-fast evaluate --methods` names them. The pairs are those of the folder `shared` beside
the checkout (or `PSF_SHARED`) and the package's sample scenes; none is ever committed, nor are the crops that `--crops`
draws. Weights made for another number of bands than a pair has show as "–".
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch

from pansharp_fast import pictures
from pansharp_fast.data import get_sensor
from pansharp_fast.data.observation import upsample
from pansharp_fast.evaluation.methods import Method, parse
from pansharp_fast.evaluation.scenes import Pair, Scene
from pansharp_fast.inference import sharpen_scene
from pansharp_fast.metrics.measures import MEASURES, Result

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PSF_SHARED", ROOT.parent / "shared"))
NATIVE, SAMPLES = SHARED / "data" / "native", ROOT / "pansharp_fast" / "sample_scenes"
#: Border left out at reduced resolution.
CUT = 9
METHODS = ("bt-h", "registered bt-h", "registered bt-h + 2", "registered bt-h + auto")
BGRN = (2, 3, 5, 7)  # of WorldView's eight bands
#: ERGAS of registered BT-H with two steps by an independent sketch of the same model of observation; what `auto` may
#: be above it, on each pair and in the mean.
AIM = {
    "QB": 1.29,
    "GF2": 1.21,
    "IKONOS": 2.04,
    "WV3-8": 3.63,
    "WV3-4": 3.60,
    "WV2-8": 4.02,
    "WV2-4": 4.22,
    "scene1": 6.94,
    "scene2": 6.97,
    "scene3": 5.07,
}
AUTO_MAY, AUTO_MEAN_MAY = 1.07, 1.04
#: At full resolution: measure -> (bound, whether it is the least).
BOUNDS = {
    "Laplacian correlation": (0.95, True),
    "Laplacian energy": (0.80, True),
    "D_lambda_K registered": (0.04, False),
    "mottle": (1.1, False),
    "halo": (1.1, False),
}
#: A scene of 32 x 32 MS pixels is too small for this one.
EXCEPTED = {("wv3", "D_lambda_K registered")}


def native(name: str, sensor: str, bands: Sequence[int] | None = None) -> Pair:
    """A pair of `shared/data/native`."""
    known = get_sensor(sensor) if bands is None else get_sensor(sensor).select(bands)
    return Pair.read(NATIVE / f"{name}_pan.tif", NATIVE / f"{name}_ms.tif", known, bands=bands)


def sample(name: str) -> Pair:
    """One of the package's sample scenes, WorldView-2's blue, green, red and first near infrared; 0 is void."""
    known = get_sensor("WV2").select(BGRN)
    return Pair.read(SAMPLES / f"{name}_pan.tif", SAMPLES / f"{name}_ms.tif", known, nodata=0)


def published(path: str, sensor: str, peak: float, bands: Sequence[int] | None = None, index: int = 0) -> Scene:
    """A sample of a PanCollection file, with ground truth where the file has one."""
    known = get_sensor(sensor) if bands is None else get_sensor(sensor).select(bands)
    chosen = slice(None) if bands is None else [band - 1 for band in bands]
    with h5py.File(SHARED / "data" / path) as file:
        image = {name: torch.from_numpy(file[name][index : index + 1].astype(np.float64)) for name in file}
    ratio = image["pan"].shape[2] // image["ms"].shape[2]
    gt = image["gt"][:, chosen] if "gt" in image else None
    return Scene(image["pan"], image["ms"][:, chosen], gt, ratio, (ratio / 2, ratio / 2), known)


#: Reduced resolution: name -> (scene, peak).
REDUCED: dict[str, tuple[Callable[[], Scene], float]] = {
    "QB": (lambda: native("qb", "QB").reduced(), 2047),
    "GF2": (lambda: published("GF2/gf2_rr_256.h5", "GF2", 1023), 1023),
    "IKONOS": (lambda: native("ikonos", "IKONOS").reduced(), 2047),
    "WV3-8": (lambda: published("WV3/wv3_rr_256.h5", "WV3", 2047), 2047),
    "WV3-4": (lambda: published("WV3/wv3_rr_256.h5", "WV3", 2047, BGRN), 2047),
    "WV2-8": (lambda: native("wv2", "WV2").reduced(), 2047),
    "WV2-4": (lambda: native("wv2", "WV2", bands=BGRN).reduced(), 2047),
    "scene1": (lambda: sample("scene1").reduced(), 2047),
    "scene2": (lambda: sample("scene2").reduced(), 2047),
    "scene3": (lambda: sample("scene3").reduced(), 2047),
}
#: Full resolution: name -> scene.
FULL: dict[str, Callable[[], Scene]] = {
    "qb": lambda: native("qb", "QB").full(),
    "gf2": lambda: native("gf2", "GF2").full(),
    **{f"gf2-{k}": (lambda k=k: published("GF2/gf2_fr_256.h5", "GF2", 1023, index=k)) for k in range(1, 5)},
    "ikonos": lambda: native("ikonos", "IKONOS").full(),
    "wv2": lambda: native("wv2", "WV2").full(),
    "wv3": lambda: native("wv3", "WV3").full(),
    "landsat": lambda: native("landsat", "default").full(),
    "scene1": lambda: sample("scene1").full(),
    "scene2": lambda: sample("scene2").full(),
    "scene3": lambda: sample("scene3").full(),
}


def methods_for(names: Sequence[str], bands: int, peak: float) -> Iterator[tuple[str, Method | None]]:
    """(name, method); None where weights want another number of bands."""
    for name in names:
        try:
            [method] = parse([name], bands, {"device": "auto", "precision": "float32", "peak": peak}).values()
        except ValueError as error:
            if "bands" not in str(error):
                raise
            yield name, None
        else:
            yield method.label, method


def reduced_rows(names: Sequence[str], cases: Sequence[str]) -> Iterator[tuple[str, dict[str, list[float] | None]]]:
    """(pair, method -> PSNR, SAM, ERGAS) with values clipped to the sensor's range."""
    for case, (read, peak) in REDUCED.items():
        if case not in cases:
            continue
        scene = read()
        row: dict[str, list[float] | None] = {}
        for label, method in methods_for(names, scene.ms.shape[1], peak):
            if method is None:
                row[label] = None
                continue
            fused = method.run(scene, "ms")[0].clamp(0, peak)
            result = Result(
                fused, scene.pan, scene.ms, scene.sensor, peak, scene.ratio, scene.phase, gt=scene.gt, cut=CUT
            )
            row[label] = [float(MEASURES[name].function(result)) for name in ("PSNR", "SAM", "ERGAS")]
        yield case, row


def full_rows(
    names: Sequence[str], cases: Sequence[str], crops: Path | None
) -> Iterator[tuple[str, dict[str, list[float] | None]]]:
    """(pair, method -> measures of `BOUNDS`) of results as they come: no method is told the sensor."""
    for case, read in FULL.items():
        if case not in cases:
            continue
        scene = read()
        untold = dataclasses.replace(scene, sensor=get_sensor("default"))
        row: dict[str, list[float] | None] = {}
        images = {"registered GSA": scene.reference}
        for label, method in methods_for(names, scene.ms.shape[1], float(scene.sensor.peak)):
            if method is None:
                row[label] = None
                continue
            fused = images[label] = method.run(untold, "pan")[0]
            result = Result(
                fused,
                scene.pan,
                scene.ms,
                scene.sensor,
                scene.sensor.peak,
                scene.ratio,
                scene.phase,
                d=scene.registration[0].d,
                reference=scene.reference,
            )
            row[label] = [float(MEASURES[name].function(result)) for name in BOUNDS]
        if crops is not None:
            draw(crops, case, scene, images)
        yield case, row


def draw(folder: Path, case: str, scene: Scene, images: dict[str, torch.Tensor]) -> None:
    """Crops at 100 and 400 % of PAN, MS, registered GSA and the methods, side by side: where PAN varies most and least.

    The names of the columns stand in `columns.txt`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = (scene.pan.shape[2], scene.pan.shape[3])
    rgb = scene.sensor.rgb if scene.ms.shape[1] > max(scene.sensor.rgb) else (0, 0, 0)
    ms = upsample(scene.ms, shape, ratio=scene.ratio, phase=scene.phase, d=scene.registration[0].d)
    shown = pictures.limits(ms[0, list(rgb)].numpy())
    pan = scene.pan[0].numpy()
    columns = {"PAN": np.repeat(pictures.stretch(pan, pictures.limits(pan)), 3, 0)}
    for label, image in {"MS": ms, **images}.items():
        columns[label] = pictures.stretch(image[0, list(rgb)].numpy(), shown)
    (folder / "columns.txt").write_text(", ".join(columns) + "\n")
    for side, factor in ((256, 1), (64, 4)):
        side = min(side, *shape)
        tiles = scene.pan[0, 0].unfold(0, side, side // 2).unfold(1, side, side // 2)
        spread = tiles.std((-1, -2)) / tiles.mean((-1, -2))
        for name, place in (("edges", int(spread.argmax())), ("flat", int(spread.argmin()))):
            row, column = (side // 2 * k for k in divmod(place, spread.shape[1]))
            parts = [image[:, row : row + side, column : column + side] for image in columns.values()]
            picture = np.concatenate([pictures.enlarge(part, factor) for part in parts], 2)
            pictures.write(folder / f"{case}-{name}-{100 * factor}.png", picture)


def accepted(cases: Sequence[str]) -> list[str]:
    """A line for each native pair of files: whether `sharpen` takes it without any option."""
    lines = []
    for pan in sorted(NATIVE.glob("*_pan.tif")):
        name = pan.name.removesuffix("_pan.tif")
        if name not in cases:
            continue
        with tempfile.TemporaryDirectory() as folder:
            sharpen_scene(pan, pan.with_name(f"{name}_ms.tif"), Path(folder) / "out.tif")
        lines.append(name)
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names, by commas")
    parser.add_argument("--weights", nargs="*", default=["tiny", "registered universal"], help="weights, as methods")
    parser.add_argument("--cases", nargs="*", default=[*REDUCED, *FULL], help="pairs")
    parser.add_argument("--crops", type=Path, help="folder for crops of full-resolution results; not to be committed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality.md")
    asked = parser.parse_args()
    names = [name.strip() for name in asked.methods.split(",") if name.strip()] + asked.weights
    lines = ["# Quality on real pairs", "", "`python -m benchmarks.quality`; how: its docstring.", ""]

    reduced = []
    for case, row in reduced_rows(names, asked.cases):
        print(case, {label: values and [round(v, 3) for v in values] for label, values in row.items()}, flush=True)
        reduced.append((case, row))
    if reduced:
        labels = list(reduced[0][1])
        cells = [
            [
                case,
                *("–" if row[x] is None else "{:.2f} / {:.2f} / {:.3f}".format(*row[x]) for x in row),
                f"{AIM[case]:.2f}",
            ]
            for case, row in reduced
        ]
        lines += [f"## Reduced resolution: PSNR / SAM / ERGAS, border of {CUT} cut, in MS's frame", ""]
        lines += table(["pair", *labels, "aim (ERGAS)"], cells) + verdict_reduced(reduced)

    full = []
    for case, row in full_rows(names, asked.cases, asked.crops):
        print(case, {label: values and [round(v, 3) for v in values] for label, values in row.items()}, flush=True)
        full.append((case, row))
    if full:
        header = ["pair", "method", *(MEASURES[name].heading for name in BOUNDS)]
        cells = []
        for case, row in full:
            for label, values in row.items():
                if values is not None:
                    texts = [mark(case, name, value) for name, value in zip(BOUNDS, values, strict=True)]
                    cells.append([case, label, *texts])
        bounds = ", ".join(f"{name} {'≥' if least else '≤'} {bound:g}" for name, (bound, least) in BOUNDS.items())
        lines += [
            "## Full resolution, as it comes (no method is told the sensor)",
            "",
            f"Aim: {bounds}; missed: *.",
            "",
        ]
        lines += table(header, cells)
        taken = accepted(asked.cases)
        lines += [f"`sharpen PAN MS OUT` without any option takes: {', '.join(taken)}.", ""]
    asked.out.write_text("\n".join(lines))
    print(f"Wrote {asked.out}")


def mark(case: str, name: str, value: float) -> str:
    """A value as text, with * where it misses its bound."""
    bound, least = BOUNDS[name]
    kept = value >= bound if least else value <= bound
    return MEASURES[name].text(value) + ("" if kept or (case, name) in EXCEPTED else " *")


def verdict_reduced(rows: Sequence[tuple[str, dict[str, list[float] | None]]]) -> list[str]:
    """How two full steps and `auto` stand to the aim."""
    lines = []
    two, auto = "registered BT-H + 2", "registered BT-H + auto"
    ergas = {label: {c: row[label][2] for c, row in rows if row.get(label)} for label in (two, auto)}
    if ergas[two]:
        worst = {case: value / AIM[case] for case, value in ergas[two].items()}
        missed = [f"{case} {value:.3f}" for case, value in ergas[two].items() if round(value, 2) > AIM[case]]
        lines.append(
            f"{two}: {max(worst.values()):.3f} times the aim at the worst; above it: {', '.join(missed) or 'none'}."
        )
    if ergas[auto]:
        ratios = {case: value / AIM[case] for case, value in ergas[auto].items()}
        mean = sum(ratios.values()) / len(ratios)
        missed = [f"{case} {value:.3f}" for case, value in ratios.items() if value > AUTO_MAY]
        lines.append(
            f"{auto}: {mean:.3f} times the aim in the mean (at most {AUTO_MEAN_MAY:g}), above {AUTO_MAY:g}: "
            f"{', '.join(missed) or 'none'}."
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
