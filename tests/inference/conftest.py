"""A small scene on disk: PAN 0.5 m, MS 2 m, four bands, smooth enough to be compared after resampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

try:
    import rasterio
    from affine import Affine
except ImportError:  # tests of arrays alone run without
    rasterio = None
else:
    GRID = Affine(0.5, 0, 593270.25, 0, -0.5, 5747657.5)
NAMES = ("blue", "green", "red", "nir")


def landscape(bands: int, height: int, width: int, step: float) -> np.ndarray:
    """[bands, height, width] float64 sampled at pixel centres `step` PAN pixels apart; values 200 to 1200."""
    y = (np.arange(height) + 0.5)[:, None] * step
    x = (np.arange(width) + 0.5) * step
    waves = [np.sin(x / (17 + 3 * k) + k) * np.cos(y / (23 - 2 * k)) for k in range(bands)]
    return 700 + 500 * np.stack(waves)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def raster(tmp_path: Path) -> Callable[..., Path]:
    """Writes an array [C,H,W] as a GeoTIFF and returns its path; further arguments go to rasterio."""
    if rasterio is None:
        pytest.skip("needs rasterio")

    def write(name: str, pixels: np.ndarray, *, names: tuple[str, ...] = (), mask: Any = None, **profile: Any) -> Path:
        path = tmp_path / name
        count, height, width = pixels.shape
        options = {"driver": "GTiff", "dtype": pixels.dtype, "crs": "EPSG:32631", **profile}
        with rasterio.open(path, "w", count=count, height=height, width=width, **options) as file:
            file.write(pixels)
            if names:
                file.descriptions = names
            if mask is not None:
                file.write_mask(mask)
        return path

    return write


@pytest.fixture
def scene(raster) -> Callable[..., tuple[Path, Path]]:
    """Writes a PAN and an MS raster of one landscape. Arguments: PAN's size, the pixel type, rasterio's options."""

    def write(height: int = 200, width: int = 240, dtype: str = "uint16", **profile: Any) -> tuple[Path, Path]:
        rng = np.random.default_rng(7)
        pan = landscape(1, height, width, 1) + rng.normal(0, 30, (1, height, width))
        ms = landscape(4, -(-height // 4), -(-width // 4), 4)
        return (
            raster("pan.tif", pan.astype(dtype), **{"transform": GRID, **profile}),
            raster("ms.tif", ms.astype(dtype), names=NAMES, **{"transform": GRID * Affine.scale(4), **profile}),
        )

    return write
