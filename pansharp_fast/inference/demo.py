"""The demonstration: three real scenes that come with the package, sharpened, measured and shown."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from torch import Tensor

from ..baselines import brovey, exp
from ..data import SENSORS, degrade
from ..data.grid import RATIO
from ..metrics import ergas, psnr, sam
from .output import natural_colours, percentiles, stretch
from .scenes import Scene
from .sharpener import Sharpener
from .tiles import Span
from .whole import sharpen_scene

SCENES = Path(__file__).resolve().parent.parent / "sample_scenes"
NAMES = ("scene1", "scene2", "scene3")
#: The four bands of the sample scenes are blue, green, red and the first near infrared of WorldView-2.
SENSOR = dataclasses.replace(
    SENSORS["WV2"], name="WV2, 4 bands", mtf_ms=(0.35,) * 4, band_names=("blue", "green", "red", "nir"), rgb=(2, 1, 0)
)
#: Undeclared in the files, see their attribution.
NODATA = 0
#: Pixels at the image border and around nodata that do not count: there the filters have seen padding.
MARGIN = 8


@dataclass(frozen=True)
class Result:
    """How one method did on one scene: at reduced resolution against the original MS, and at full resolution in time.

    psnr: dB. sam: degrees. ergas: dimensionless. seconds: per megapixel of PAN.
    """

    scene: str
    method: str
    psnr: float
    sam: float
    ergas: float
    seconds: float


def run_demo(
    out: str | Path,
    *,
    weights: str | Path = "tiny",
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """Sharpen the sample scenes into folder `out` (created; earlier results are replaced), and measure.

    Writes `sceneN_sharpened.tif` for N = 1, 2, 3 and `comparison.png` with PAN, MS and result side by side.

    Raises:
        OSError, ValueError: as `sharpen_scene`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sharpener = Sharpener(weights, peak=SENSOR.peak, device=device)
    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "interpolation": lambda pan, ms: exp(pan, ms, SENSOR),
        "Brovey": lambda pan, ms: brovey(pan, ms, SENSOR),
        "pansharp_fast": sharpener,
    }
    results = []
    for number, name in enumerate(NAMES):
        pan_file, ms_file = SCENES / f"{name}_pan.tif", SCENES / f"{name}_ms.tif"
        sharpen_scene(
            pan_file,
            ms_file,
            out / f"{name}_sharpened.tif",
            weights=sharpener.model,
            peak=SENSOR.peak,
            nodata=NODATA,
            overwrite=True,
            device=sharpener.device,
        )
        pan, ms, known = whole_pair(pan_file, ms_file)
        small_ms, small_pan = degrade(ms, pan, SENSOR)
        keep = known & ~F.pad(torch.zeros_like(known[..., MARGIN:-MARGIN, MARGIN:-MARGIN]), [MARGIN] * 4, value=True)
        truth = ms[..., keep[0, 0]][:, :, None]
        for method, function in methods.items():
            fused = function(small_pan, small_ms).cpu().to(ms)[..., keep[0, 0]][:, :, None]
            start = time.perf_counter()
            function(pan, ms)
            seconds = (time.perf_counter() - start) / (pan.numel() / 1e6)
            results.append(
                Result(
                    name,
                    method,
                    psnr(fused, truth, SENSOR.peak).item(),
                    sam(fused, truth).item(),
                    ergas(fused, truth).item(),
                    seconds,
                )
            )
        if progress is not None:
            progress(number + 1, len(NAMES))
    draw_comparison(out)
    return results


def whole_pair(pan_file: Path, ms_file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """A sample scene in memory, cut to whole multiples of 16 PAN pixels.

    Returns:
        pan [1,1,4h,4w] and ms [1,C,h,w] float32 with nodata filled, and where MS holds data, no nearer than MARGIN
        to any pixel that does not: bool [1,1,h,w].
    """
    with Scene(pan_file, ms_file, nodata=NODATA) as scene:
        step = RATIO * RATIO
        height, width = scene.height // step * step, scene.width // step * step
        tile = scene.read(*(Span(0, length, 0, length, 0, 0) for length in (height, width)))
    assert tile is not None, "the sample scenes hold data"
    pan, ms, valid = tile
    missing = F.max_pool2d((~valid).float()[None, None], RATIO)
    return pan, ms, F.max_pool2d(missing, 2 * MARGIN + 1, stride=1, padding=MARGIN) == 0


def mean_results(results: list[Result]) -> list[Result]:
    """The mean of each method over the scenes, as scene "mean"."""
    methods = dict.fromkeys(result.method for result in results)
    means = []
    for method in methods:
        own = [result for result in results if result.method == method]
        columns = ("psnr", "sam", "ergas", "seconds")
        values = {column: float(np.mean([getattr(result, column) for result in own])) for column in columns}
        means.append(Result("mean", method, **values))
    return means


def draw_comparison(out: Path) -> None:
    """Write `comparison.png`: a row a scene, PAN, MS and the sharpened scene in natural colours, stretched alike."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 12.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(NAMES), 3)
    for row, name in zip(axes, NAMES, strict=True):
        for axis, (title, image) in zip(row, _pictures(name, out), strict=True):
            axis.imshow(image, cmap="gray", interpolation="nearest")
            axis.set_title(f"{name}: {title}")
            axis.set_axis_off()
    figure.savefig(out / "comparison.png", dpi=150)


def _pictures(name: str, out: Path) -> Iterator[tuple[str, np.ndarray]]:
    with rasterio.open(SCENES / f"{name}_pan.tif") as file:
        pan = file.read().astype(np.float32)
        yield "PAN", stretch(pan, (pan != NODATA).all(0), percentiles(pan, (pan != NODATA).all(0)))[0]
    with rasterio.open(SCENES / f"{name}_ms.tif") as file:
        ms = file.read(natural_colours(file)).astype(np.float32)
        limits = percentiles(ms, (ms != NODATA).all(0))
        yield "MS", stretch(ms, (ms != NODATA).all(0), limits).transpose(1, 2, 0)
    with rasterio.open(out / f"{name}_sharpened.tif") as file:
        result = file.read(natural_colours(file)).astype(np.float32)
        yield "sharpened", stretch(result, file.dataset_mask() > 0, limits).transpose(1, 2, 0)
