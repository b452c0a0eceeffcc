"""How good weights are on real files that nothing was trained on: tables of reduced and of full resolution.

    python recipes/universal/evaluate.py WEIGHTS SHARED [--pictures FOLDER] [NAME ...]

SHARED holds `data` (QuickBird, GaoFen-2, IKONOS, WorldView-2 and 3) and `sample_scenes`. Every method gets the same
registration. Reduced resolution: PSNR, SAM and ERGAS against MS, in MS's frame, border of 9 cut. Full resolution:
correlation of the Laplacians of bands and PAN, their energy relative to PAN's, D_lambda_K in MS's frame. Pictures: PAN,
MS, GSA and the network side by side, whole and four times enlarged.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pansharp_fast import metrics
from pansharp_fast.classical import fuse
from pansharp_fast.data import Sensor, degrade, get_sensor
from pansharp_fast.data.observation import back_project, move
from pansharp_fast.data.registration import register
from pansharp_fast.models import Universal, UniversalConfig, load_model

RATIO, CUT = 4, 9
BGRN = [1, 2, 4, 6]  # of WorldView's eight bands


@dataclasses.dataclass
class Case:
    pan: Tensor
    ms: Tensor
    sensor: Sensor
    peak: float
    phase: float
    gt: Tensor | None = None
    d: Tensor | None = None
    network: Tensor | None = None


def read(path: Path) -> Tensor:
    with rasterio.open(path) as source:
        return torch.from_numpy(source.read().astype(np.float64))[None]


def choose(sensor: Sensor, bands: list[int] | None) -> Sensor:
    if bands is None:
        return sensor
    return dataclasses.replace(sensor, mtf_ms=tuple(sensor.mtf_ms[i] for i in bands), band_names=())


def wald(ms: Tensor, pan: Tensor, sensor: str, bands: list[int] | None = None, peak: float = 2047) -> Case:
    h, w = (extent // RATIO * RATIO for extent in ms.shape[-2:])
    gt, pan = ms[..., :h, :w], pan[..., : RATIO * h, : RATIO * w]
    chosen = choose(get_sensor(sensor), bands)
    gt = gt if bands is None or len(bands) == gt.shape[1] else gt[:, bands]
    low, pan = degrade(gt, pan, chosen, RATIO)
    return Case(pan, low, chosen, peak, RATIO / 2, gt)


def published(path: Path, sensor: str, peak: float, bands: list[int] | None = None) -> Case:
    with h5py.File(path) as file:
        gt, ms, pan = (torch.from_numpy(file[name][:].astype(np.float64)) for name in ("gt", "ms", "pan"))
    if bands is not None:
        gt, ms = gt[:, bands], ms[:, bands]
    return Case(pan, ms, choose(get_sensor(sensor), bands), peak, RATIO / 2, gt)


def rectangle(valid: np.ndarray) -> tuple[slice, slice]:
    """The largest rectangle in which all is True."""
    best, found = 0, (slice(0, 0), slice(0, 0))
    heights = np.zeros(valid.shape[1], int)
    for row in range(valid.shape[0]):
        heights = np.where(valid[row], heights + 1, 0)
        stack: list[tuple[int, int]] = []
        for column, height in enumerate([*heights, 0]):
            start = column
            while stack and stack[-1][1] >= height:
                start, top = stack.pop()
                if top * (column - start) > best:
                    best = top * (column - start)
                    found = (slice(row - top + 1, row + 1), slice(start, column))
            stack.append((start, height))
    return found


def sample_scene(folder: Path, number: int) -> tuple[Tensor, Tensor]:
    """MS and PAN of the largest rectangle without empty pixels."""
    ms, pan = (read(folder / f"scene{number}_{kind}.tif") for kind in ("ms", "pan"))
    h, w = (min(a, b // RATIO) for a, b in zip(ms.shape[2:], pan.shape[2:], strict=True))
    ms, pan = ms[..., :h, :w], pan[..., : RATIO * h, : RATIO * w]
    valid = (ms > 0).all(1)[0] & (F.max_pool2d((pan <= 0).double(), RATIO)[0, 0] == 0)
    rows, columns = rectangle(valid.numpy())
    fine = [slice(RATIO * part.start, RATIO * part.stop) for part in (rows, columns)]
    return ms[..., rows, columns], pan[..., fine[0], fine[1]]


def reduced_cases(shared: Path) -> dict[str, Callable[[], Case]]:
    native = shared / "data" / "native"

    def whole(name: str, sensor: str, bands: list[int] | None = None) -> Callable[[], Case]:
        return lambda: wald(read(native / f"{name}_ms.tif"), read(native / f"{name}_pan.tif"), sensor, bands)

    def scene(number: int) -> Callable[[], Case]:
        return lambda: wald(*sample_scene(shared / "sample_scenes", number), "WV2", BGRN)

    wv3 = shared / "data/WV3/wv3_rr_256.h5"
    return {
        "QuickBird": whole("qb", "QB"),
        "GaoFen-2": lambda: published(shared / "data/GF2/gf2_rr_256.h5", "GF2", 1023),
        "IKONOS": whole("ikonos", "IKONOS"),
        "WorldView-3 (8)": lambda: published(wv3, "WV3", 2047),
        "WorldView-3 (4)": lambda: published(wv3, "WV3", 2047, BGRN),
        "WorldView-2 (8)": whole("wv2", "WV2"),
        "WorldView-2 (4)": whole("wv2", "WV2", BGRN),
        **{f"scene {n}": scene(n) for n in (1, 2, 3)},
    }


def full_cases(shared: Path) -> dict[str, Callable[[], Case]]:
    native = shared / "data" / "native"

    def pair(name: str, sensor: str) -> Callable[[], Case]:
        def make() -> Case:
            ms, pan = read(native / f"{name}_ms.tif"), read(native / f"{name}_pan.tif")
            h, w = (extent // 8 * 8 for extent in ms.shape[2:])
            pan = pan[..., : RATIO * h, : RATIO * w]
            return Case(pan, ms[..., :h, :w], get_sensor(sensor), 2047, (RATIO - 1) / 2)

        return make

    return {
        "QuickBird": pair("qb", "QB"),
        "GaoFen-2": pair("gf2", "GF2"),
        "IKONOS": pair("ikonos", "IKONOS"),
        "WorldView-3": pair("wv3", "WV3"),
        "WorldView-2": pair("wv2", "WV2"),
    }


Methods = dict[str, Callable[[Case], Tensor]]


def methods(model: Universal) -> Methods:
    def classical(name: str, steps: int | str) -> Callable[[Case], Tensor]:
        return lambda c: fuse(
            name, c.pan, c.ms, sensor=c.sensor, ratio=RATIO, phase=c.phase, d=c.d, back_projection=steps
        )

    def grid(c: Case) -> dict[str, Any]:
        return {"gains": c.sensor.gains(c.ms.shape[1]), "ratio": RATIO, "phase": c.phase, "d": c.d}

    def network(steps: int | str) -> Callable[[Case], Tensor]:
        def run(c: Case) -> Tensor:
            if c.network is None:
                c.network = model.sharpen_registered(c.pan, c.ms, **grid(c)).double()
            return back_project(c.network, c.ms, **grid(c), steps=steps)

        return run

    return {
        "GSA": classical("gsa", 0),
        "BT-H": classical("bt-h", 0),
        "BT-H + 2": classical("bt-h", 2),
        "network": network(0),
        "network + auto": network("auto"),
        "network + 2": network(2),
    }


def locate(case: Case) -> None:
    found = register(case.pan, case.ms, sensor=case.sensor, ratio=RATIO, phase=case.phase)
    case.d = found.d


def laplacian(x: Tensor) -> Tensor:
    kernel = x.new_full((1, 1, 3, 3), -1.0)
    kernel[..., 1, 1] = 8
    return F.conv2d(x.flatten(0, 1)[:, None], kernel).view(*x.shape[:2], x.shape[2] - 2, x.shape[3] - 2)


def sharpness(x: Tensor, pan: Tensor) -> tuple[float, float]:
    """Correlation of the bands' Laplacians with PAN's, and their energy relative to PAN's, means over bands."""
    a, b = (laplacian(image)[..., 8:-8, 8:-8].flatten(2) for image in (x, pan))
    a, b = a - a.mean(2, keepdim=True), b - b.mean(2, keepdim=True)
    correlation = (a * b).mean(2) / (a * a).mean(2).sqrt() / (b * b).mean(2).sqrt()
    energy = (a.std(2) / x.flatten(2).std(2)) / (b.std(2) / pan.flatten(2).std(2))
    return float(correlation.mean()), float(energy.mean())


def picture(case: Case, results: dict[str, Tensor], path: Path) -> None:
    bands = [2, 1, 0] if case.ms.shape[1] < 8 else [4, 2, 1]
    h, w = case.pan.shape[2:]
    images = {"PAN": case.pan.expand(-1, 3, -1, -1)}
    images["MS"] = F.interpolate(case.ms[:, bands], (h, w), mode="bicubic")
    images |= {name: results[name][:, bands] for name in ("GSA", "network", "network + 2")}
    colour = torch.quantile(images["MS"].flatten(2), torch.tensor([0.01, 0.99]).double(), dim=2)
    grey = torch.quantile(case.pan.flatten(), torch.tensor([0.01, 0.99]).double())
    rows = []
    for name, image in images.items():
        low, high = (grey[0], grey[1]) if name == "PAN" else (colour[0, 0, :, None, None], colour[1, 0, :, None, None])
        shown = ((image[0] - low) / (high - low)).clamp(0, 1) ** 0.7
        rows.append((shown * 255).round().byte())
    whole = torch.cat([row[:, : min(h, 512), : min(w, 512)] for row in rows], 2)
    Image.fromarray(whole.permute(1, 2, 0).numpy()).save(path.with_suffix(".100.png"))
    y, x, side = h // 3, w // 3, min(96, h // 3)
    crops = [row[:, y : y + side, x : x + side] for row in rows]
    zoom = torch.cat([F.interpolate(c[None].float(), scale_factor=4)[0] for c in crops], 2).byte()
    Image.fromarray(zoom.permute(1, 2, 0).numpy()).save(path.with_suffix(".400.png"))


def reduced(shared: Path, chosen: list[str], compared: Methods) -> None:
    print(
        "| reduced resolution: PSNR/SAM/ERGAS | " + " | ".join(compared) + " |\n" + "|---" * (len(compared) + 1) + "|"
    )
    ratios: dict[str, list[float]] = {name: [] for name in compared}
    for name, make in reduced_cases(shared).items():
        if chosen and name not in chosen:
            continue
        case = make()
        locate(case)
        assert case.gt is not None
        assert case.d is not None
        cells, ergas = [], {}
        for method, run in compared.items():
            x = move(run(case), case.d).clamp(0, case.peak)
            ergas[method] = float(metrics.ergas(x, case.gt, RATIO, CUT))
            psnr, sam = float(metrics.psnr(x, case.gt, case.peak, CUT)), float(metrics.sam(x, case.gt, CUT))
            cells.append(f"{psnr:.2f}/{sam:.2f}/{ergas[method]:.2f}")
        for method in compared:
            ratios[method].append(ergas[method] / ergas["BT-H + 2"])
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    means = (f"{100 * float(np.mean(values)) - 100:+.1f} %" for values in ratios.values())
    print("| ERGAS against registered BT-H + 2, mean | " + " | ".join(means) + " |\n")


def full(shared: Path, chosen: list[str], compared: Methods, pictures: Path | None) -> None:
    print(
        "| full resolution: Laplacian correlation / energy / D_lambda_K | "
        + " | ".join(compared)
        + " |\n"
        + "|---" * (len(compared) + 1)
        + "|"
    )
    for name, make in full_cases(shared).items():
        if chosen and name not in chosen:
            continue
        case = make()
        locate(case)
        assert case.d is not None
        cells, results = [], {}
        for method, run in compared.items():
            x = results[method] = run(case)
            correlation, energy = sharpness(x, case.pan)
            # The toolbox's MS grid lies half a pixel from aligned areas: where it wants the image, and the MS frame.
            framed = move(x, case.d + RATIO / 2 - case.phase)
            h, w = (extent // 32 * 32 for extent in framed.shape[2:])
            framed, ms = framed[..., :h, :w], case.ms[..., : h // RATIO, : w // RATIO]
            distortion = float(metrics.d_lambda_k(framed, ms, case.sensor, RATIO))
            cells.append(f"{correlation:.3f}/{energy:.2f}/{distortion:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        if pictures is not None:
            picture(case, results, pictures / name)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="file, name, or `fresh` for the network before training")
    parser.add_argument("shared", type=Path)
    parser.add_argument("names", nargs="*", help="rows, all by default")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--only", choices=("reduced", "full"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Universal(UniversalConfig()).eval() if arguments.weights == "fresh" else load_model(arguments.weights)
    compared = methods(model)
    if arguments.only != "full":
        reduced(arguments.shared, arguments.names, compared)
    if arguments.only != "reduced":
        if arguments.pictures:
            arguments.pictures.mkdir(parents=True, exist_ok=True)
        full(arguments.shared, arguments.names, compared, arguments.pictures)


if __name__ == "__main__":
    main()
