"""The demonstration: three real scenes that come with the package, sharpened, measured and shown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import pictures
from .data import get_sensor
from .evaluation.methods import Method, parse
from .evaluation.run import measure
from .evaluation.scenes import Pair, Scene
from .inference import sharpen_scene

SCENES = Path(__file__).resolve().parent / "sample_scenes"
NAMES = ("scene1", "scene2", "scene3")
#: The four bands of the sample scenes are blue, green, red and the first near infrared of WorldView-2.
SENSOR = get_sensor("WV2").select(["blue", "green", "red", "NIR1"])
#: Undeclared in the files, see their attribution.
NODATA = 0
#: Border that does not count at reduced resolution.
CUT = 9
#: Title -> method: GDAL's weighted Brovey (cubic up-sampling, equal weights) and two of the textbook's, to compare.
OTHERS = {"Brovey (GDAL)": "brovey + 0", "GSA": "gsa", "BT-H": "bt-h"}
#: What `sharpen` does unless told otherwise.
OURS, DEFAULT = "pansharp_fast", "registered bt-h + auto"
#: What the table shows, at reduced and at full resolution.
REDUCED = ("PSNR", "SAM", "ERGAS")
FULL = ("Laplacian correlation", "D_lambda_K registered", "mottle", "halo")
#: Sides of the parts that are shown, in PAN pixels, by their enlargement.
PARTS = {1: 256, 4: 64}


@dataclass(frozen=True)
class Result:
    """How one method did on one scene.

    Attributes:
        scene: name.
        method: title.
        values: measure -> value, those of `REDUCED` against the original MS, those of `FULL` on the scene itself.
        seconds: per megapixel of PAN, registration included.
    """

    scene: str
    method: str
    values: dict[str, float]
    seconds: float


def run_demo(
    out: str | Path,
    *,
    weights: str | Path | None = None,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Sharpen the sample scenes into folder `out` (created; earlier results are replaced), and measure.

    Writes `sceneN_sharpened.tif` for N = 1, 2, 3 and `comparison.png`: PAN, MS, GDAL's Brovey and the result side by
    side, at 100 and at 400 %.

    Args:
        out: folder.
        weights: name of shipped weights or a checkpoint file; None is what `sharpen` does by default.
        device: where a network runs; None is CUDA if there is any.
        progress: called with (scenes done, scenes).

    Raises:
        OSError, ValueError: as `sharpen_scene`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"device": device or "auto", "precision": "float32", "peak": SENSOR.peak}
    ours = DEFAULT if weights is None else f"registered {weights}"
    methods = {
        title: next(iter(parse([name], len(SENSOR.band_names), options).values()))
        for title, name in (OTHERS | {OURS: ours}).items()
    }
    results, shown = [], []
    for number, name in enumerate(NAMES):
        files = SCENES / f"{name}_pan.tif", SCENES / f"{name}_ms.tif"
        network = {} if weights is None else {"weights": weights, "peak": SENSOR.peak, "device": device}
        sharpen_scene(*files, out / f"{name}_sharpened.tif", sensor=SENSOR, nodata=NODATA, overwrite=True, **network)
        pair = Pair.read(*files, SENSOR, nodata=NODATA)
        scene = pair.full()
        images = {}
        for title, method in methods.items():
            result, images[title] = _try(method, pair.reduced(), scene)
            results.append(Result(name, title, *result))
        shown.append((name, scene, images))
        if progress is not None:
            progress(number + 1, len(NAMES))
    draw_comparison(out / "comparison.png", shown)
    return results


def _try(method: Method, small: Scene, scene: Scene) -> tuple[tuple[dict[str, float], float], torch.Tensor]:
    """((values, seconds per megapixel), result at full resolution)."""
    reduced = measure(method.run(small, "ms")[0].clamp(0, SENSOR.peak), small, "reduced", SENSOR.peak, CUT, REDUCED)
    fused, seconds = method.run(scene, "pan")
    full = measure(fused, scene, "full", SENSOR.peak, CUT, FULL)
    known = {name: float("nan") if value is None else value for name, value in (reduced | full).items()}
    return (known, seconds / (scene.pan.numel() / 1e6)), fused


def mean_results(results: Sequence[Result]) -> list[Result]:
    """The mean of each method over the scenes, as scene "mean"."""
    means = []
    for method in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == method]
        values = {name: statistics.fmean(result.values[name] for result in own) for name in own[0].values}
        means.append(Result("mean", method, values, statistics.fmean(result.seconds for result in own)))
    return means


def draw_comparison(path: Path, shown: Sequence[tuple[str, Scene, dict[str, torch.Tensor]]]) -> None:
    """Two rows a scene: PAN, MS, Brovey and ours at 100 % and, where PAN varies most, at 400 %; stretched alike."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap, head, dpi = 8, 24, 100
    side = PARTS[1]
    columns = ("PAN", "MS", next(iter(OTHERS)), OURS)
    width, height = len(columns) * (side + gap) + gap, len(shown) * len(PARTS) * (side + head) + gap
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    FigureCanvasAgg(figure)
    for row, (name, scene, images) in enumerate(shown):
        tiles = _tiles(scene, [images[title] for title in columns[2:]])
        for number, (factor, parts) in enumerate(tiles.items()):
            top = (row * len(PARTS) + number) * (side + head)
            for column, (title, image) in enumerate(zip(columns, parts, strict=True)):
                left = gap + column * (side + gap)
                pixels = (image.transpose(1, 2, 0) * 255).round().astype(np.uint8)
                figure.figimage(pixels, left, height - top - head - side, origin="upper")
                text = f"{name}, {100 * factor} %: {title}" if column == 0 else title
                figure.text(left / width, 1 - (top + head - 6) / height, text, fontsize=8)
    figure.savefig(path, dpi=dpi)


def _tiles(scene: Scene, results: Sequence[torch.Tensor]) -> dict[int, list[NDArray[np.floating]]]:
    """Enlargement -> parts [3, 256, 256] of PAN, MS and the results; the place is where PAN varies most."""
    pan, ms = scene.pan[0].numpy(), scene.ms[0, list(SENSOR.rgb)].numpy()
    shape, ratio = pan.shape[1:], scene.ratio
    colours = pictures.limits(ms)
    whole = [
        np.repeat(pictures.stretch(pan, pictures.limits(pan)), 3, 0),
        pictures.enlarge(pictures.stretch(ms, colours), ratio),
        *(pictures.stretch(image[0, list(SENSOR.rgb)].numpy(), colours) for image in results),
    ]
    step = PARTS[4] // 2
    spread = scene.pan[0, 0].unfold(0, PARTS[4], step).unfold(1, PARTS[4], step).std((-1, -2))
    centre = [step * int(k) + step for k in divmod(int(spread.argmax()), spread.shape[1])]
    parts = {}
    for factor, side in PARTS.items():
        top, left = (
            min(max(0, middle - side // 2), length - side) for middle, length in zip(centre, shape, strict=True)
        )
        parts[factor] = [pictures.enlarge(image[:, top : top + side, left : left + side], factor) for image in whole]
    return parts
