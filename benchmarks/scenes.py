"""Whole commands on a whole scene, files to file, side by side in one run: GDAL's Brovey and this package's `sharpen`.

    python -m benchmarks.scenes [--side 4096] [--bands 4] [--repeat 3] [--out benchmarks/results/cpu/scenes.md]

The scene is made from a seed: PAN of side x side pixels and MS a quarter of that, uint16, MS displaced by a PAN pixel
or two. Every run is a process of its own, so that its peak memory is its own; ways take turns, and medians are given.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
import torch
from affine import Affine

from pansharp_fast.data.observation import observe

from .run import device_name

GRID = Affine(0.5, 0, 500000, 0, -0.5, 5000000)
BLOCK = 1024


def make(folder: Path, side: int, bands: int) -> tuple[Path, Path]:
    """Write PAN and MS block by block; neighbouring blocks do not fit each other, which costs nobody anything."""
    paths = folder / "pan.tif", folder / "ms.tif"
    profile = {"driver": "GTiff", "dtype": "uint16", "tiled": True, "crs": "EPSG:32633", "compress": "deflate"}
    with (
        rasterio.open(paths[0], "w", height=side, width=side, count=1, transform=GRID, **profile) as pan,
        rasterio.open(
            paths[1], "w", height=side // 4, width=side // 4, count=bands, transform=GRID @ Affine.scale(4), **profile
        ) as ms,
    ):
        for top in range(0, side, BLOCK):
            for left in range(0, side, BLOCK):
                rng = np.random.default_rng([top, left])
                size = min(BLOCK, side - top), min(BLOCK, side - left)
                image = np.full((bands, *size), 300.0, np.float32)
                for _ in range(size[0] * size[1] // 400):
                    y, x, h, w = rng.integers(0, (*size, 24, 24))
                    image[:, y : y + h + 3, x : x + w + 3] = rng.uniform(150, 1300) * rng.uniform(
                        0.7, 1.3, (bands, 1, 1)
                    )
                image *= 1 + 0.03 * rng.standard_normal((1, *size), np.float32)
                window = rasterio.windows.Window(left, top, size[1], size[0])
                pan.write(
                    (image.mean(0, keepdims=True) + rng.normal(0, 4, (1, *size))).astype(np.uint16), window=window
                )
                low = (size[0] // 4, size[1] // 4)
                seen = observe(
                    torch.from_numpy(image)[None],
                    low,
                    gains=[0.3] * bands,
                    ratio=4,
                    d=torch.tensor([[1.4, -0.9]] * bands),
                )
                small = rasterio.windows.Window(left // 4, top // 4, low[1], low[0])
                ms.write(seen[0].numpy().round().astype(np.uint16), window=small)
    return paths


def by_gdal(pan: Path, ms: Path, out: Path, bands: int) -> None:
    """GDAL's weighted Brovey with cubic resampling and all cores, as gdal_pansharpen makes it."""
    spectral = "".join(
        f'<SpectralBand dstBand="{b}"><SourceFilename>{ms}</SourceFilename><SourceBand>{b}</SourceBand></SpectralBand>'
        for b in range(1, bands + 1)
    )
    vrt = (
        '<VRTDataset subClass="VRTPansharpenedDataset"><PansharpeningOptions><Algorithm>WeightedBrovey</Algorithm>'
        f"<AlgorithmOptions><Weights>{','.join([str(1 / bands)] * bands)}</Weights></AlgorithmOptions>"
        "<Resampling>Cubic</Resampling><NumThreads>ALL_CPUS</NumThreads>"
        f"<PanchroBand><SourceFilename>{pan}</SourceFilename><SourceBand>1</SourceBand></PanchroBand>{spectral}"
        "</PansharpeningOptions></VRTDataset>"
    )
    with rasterio.Env(GDAL_CACHEMAX=256), rasterio.open(vrt) as source:
        options = {"compress": "deflate", "predictor": "2", "tiled": "yes", "num_threads": "all_cpus"}
        rasterio.shutil.copy(source, out, driver="GTiff", blockxsize=512, blockysize=512, **options)


def by_us(**options: object) -> Callable[[Path, Path, Path, int], None]:
    """`sharpen` with these options."""

    def run(pan: Path, ms: Path, out: Path, bands: int) -> None:
        from pansharp_fast.inference import sharpen_scene

        sharpen_scene(pan, ms, out, overwrite=True, **options)  # type: ignore[arg-type]

    return run


WAYS: dict[str, Callable[[Path, Path, Path, int], None]] = {
    "GDAL, weighted Brovey, cubic": by_gdal,
    "sharpen (BT-H, registered, consistent)": by_us(),
    "sharpen --register off --back-projection 0": by_us(register="off", back_projection=0),
    "sharpen --weights tiny": by_us(weights="tiny"),
}


def check(folder: Path, bands: int) -> None:
    """Before anything is timed: GDAL's Brovey and ours are the same picture."""
    pan, ms = make(folder, 512, bands)
    by_gdal(pan, ms, folder / "gdal.tif", bands)
    by_us(method="brovey", register="off", back_projection=0)(pan, ms, folder / "ours.tif", bands)
    images = []
    for name in ("gdal", "ours"):
        with rasterio.open(folder / f"{name}.tif") as file:
            images.append(file.read().astype(int))
    worst = int(np.abs(images[0] - images[1]).max())
    if worst > 2:  # GDAL rounds the up-sampled bands to PAN's type on the way
        raise SystemExit(f"Brovey: expected GDAL's values, got {worst} DN apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--bands", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", help="only those whose names contain this")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # (way, folder): a run in a process of its own
    options = parser.parse_args()
    if options.one:
        way, folder = options.one[0], Path(options.one[1])
        start = time.perf_counter()
        WAYS[way](folder / "pan.tif", folder / "ms.tif", folder / "out.tif", options.bands)
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
        return
    ways = [w for w in WAYS if options.ways is None or options.ways in w or w.startswith("GDAL")]
    if options.bands != 4:
        ways = [w for w in ways if "tiny" not in w]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check(folder, options.bands)
        make(folder, options.side, options.bands)
        results: dict[str, list[list[float]]] = {way: [] for way in ways}
        for _ in range(options.repeat):
            for way in ways:
                command = [sys.executable, "-m", "benchmarks.scenes", "--one", way, name, "--bands", str(options.bands)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results[way].append(json.loads(done.stdout.splitlines()[-1]))
                (folder / "out.tif").unlink()
    megapixels = options.side**2 / 1e6
    first = statistics.median(run[0] for run in results[ways[0]])
    lines = [
        f"# A scene of {options.side} x {options.side} PAN pixels, {options.bands} bands, uint16, from files to a file",
        "",
        f"{device_name(torch.device('cpu'))}; medians of {options.repeat} runs that took turns, imports left",
        f"out. `python -m benchmarks.scenes --side {options.side} --bands {options.bands}`",
        "",
        "| way | seconds | seconds a megapixel | over GDAL | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for way, runs in results.items():
        seconds, memory = (statistics.median(run[i] for run in runs) for i in (0, 1))
        lines.append(f"| {way} | {seconds:.1f} | {seconds / megapixels:.3f} | {seconds / first:.2f} | {memory:.0f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
