"""Writing of a sharpened scene: a GeoTIFF on PAN's grid that appears whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from .scenes import Scene

PREVIEW_SIDE = 1024
GAMMA = 0.7


def check_target(name: str, path: Path, overwrite: bool) -> None:
    """Raise OSError unless a file may be written at `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected an existing folder, got {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file name, got the folder {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{name}: expected a new file, got existing {path} (overwrite replaces it)")


def choose_nodata(scene: Scene, dtype: np.dtype, asked: float | None) -> float | None:
    """The value that stands for "no data" in the output, or None where every pixel will hold data.

    `asked`, else what MS or PAN declares, else 0 (integers) or NaN.

    Raises:
        ValueError: `dtype` does not hold the value.
    """
    declared = [value for value in (asked, scene.ms_file.nodata, scene.pan_file.nodata) if value is not None]
    if not declared and not scene.may_lack_data:
        return None
    value = declared[0] if declared else (math.nan if dtype.kind == "f" else 0)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    fits = dtype.kind == "f" if not math.isfinite(value) else limits.min <= value <= limits.max
    if not fits or (dtype.kind != "f" and value != int(value)):
        raise ValueError(f"nodata: expected a value that {dtype} holds, got {value:g} (choose one with nodata)")
    return value


def to_pixels(
    values: NDArray[np.float32], valid: NDArray[np.bool_], dtype: np.dtype, nodata: float | None
) -> NDArray[np.generic]:
    """Values [C,H,W] as `dtype`, rounded and clipped where integer; invalid pixels are nodata and no valid one is."""
    if dtype.kind == "f":
        pixels = values.astype(dtype)
        above = None if nodata is None else np.nextafter(dtype.type(nodata), dtype.type(np.inf))
    else:
        limits = np.iinfo(dtype)
        pixels = values.astype(np.float64).round().clip(limits.min, limits.max).astype(dtype)
        above = None if nodata is None else int(nodata) + (1 if nodata < limits.max else -1)
    if nodata is not None:
        pixels[pixels == nodata] = above
        pixels[:, ~valid] = nodata
    return pixels


class Output:
    """A GeoTIFF being written beside its target; `finish` moves it there, and leaving the block cleans up.

    Args:
        path: target. scene: gives grid, CRS, control points and the bands' descriptions, scales and colours.
        dtype, nodata: of the pixels. block: side of the file's blocks, a multiple of 16.
        cog: write a Cloud Optimized GeoTIFF. creation_options: for GDAL's driver (GTiff or COG).
        preview: PNG of the result in natural colours, or None.

    Raises:
        OSError: the file cannot be created or written.
    """

    def __init__(
        self,
        path: Path,
        scene: Scene,
        *,
        dtype: np.dtype,
        nodata: float | None,
        block: int,
        cog: bool,
        creation_options: Mapping[str, str],
        preview: Path | None,
    ) -> None:
        self.path, self.preview, self.cog, self.dtype, self.nodata = path, preview, cog, dtype, nodata
        compression = {"compress": "deflate", "predictor": 3 if dtype.kind == "f" else 2}
        self.final_options = {**(compression if cog else {}), **creation_options}
        if cog:
            compression = {"compress": "zstd", "zstd_level": 1}
        pan, ms = scene.pan_file, scene.ms_file
        profile = {
            "driver": "GTiff",
            "height": scene.height,
            "width": scene.width,
            "count": len(scene.bands),
            "dtype": dtype.name,
            "crs": pan.crs,
            "transform": pan.transform,
            "nodata": nodata,
            "tiled": True,
            "blockxsize": block,
            "blockysize": block,
            "bigtiff": "if_safer",
            **compression,
            **({} if cog else {key.lower(): value for key, value in creation_options.items()}),
        }
        with self._writing(), contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".sharpen-", dir=path.parent)))
            self.file = stack.enter_context(rasterio.open(self.folder / "scene.tif", "w", **profile))
            index = [band - 1 for band in scene.bands]
            self.file.descriptions = [ms.descriptions[i] for i in index]
            self.file.colorinterp = [ms.colorinterp[i] for i in index]
            self.file.scales = [ms.scales[i] for i in index]
            self.file.offsets = [ms.offsets[i] for i in index]
            if pan.gcps[0]:
                self.file.gcps = pan.gcps
            if pan.rpcs is not None:
                self.file.rpcs = pan.rpcs
            if "AREA_OR_POINT" in pan.tags():
                self.file.update_tags(AREA_OR_POINT=pan.tags()["AREA_OR_POINT"])
            self._stack = stack.pop_all()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RasterioError, OSError) as error:
            free = shutil.disk_usage(self.path.parent).free >> 20
            cause = error.__cause__ or error
            raise OSError(f"OUT: expected to write {self.path}, got {cause} ({free} MiB free there)") from error

    def write(self, top: int, left: int, values: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """Write a piece: values [C,H,W] unrounded, valid [H,W]."""
        pixels = to_pixels(values, valid, self.dtype, self.nodata)
        with self._writing():
            self.file.write(pixels, window=Window(left, top, pixels.shape[2], pixels.shape[1]))

    def finish(self) -> None:
        """Complete the file and move it, and the preview, to their places."""
        with self._writing():
            self.file.close()
            written = self.folder / "scene.tif"
            if self.cog:
                written = self.folder / "cog.tif"
                rasterio.shutil.copy(self.folder / "scene.tif", written, driver="COG", **self.final_options)
            with open(written, "rb") as file:
                os.fsync(file.fileno())
            with rasterio.open(written) as dataset:
                # GDAL does not report what fails while it closes a file, as on a full disk: read everything back.
                for _, window in dataset.block_windows(1):
                    dataset.read(window=window)
                if self.preview is not None:
                    write_preview(dataset, self.folder / "preview.png")
            if self.preview is not None:
                shutil.move(self.folder / "preview.png", self.preview)
            os.replace(written, self.path)


def natural_colours(dataset: DatasetReader) -> tuple[int, int, int]:
    """Bands (from 1) to show as red, green and blue: by description, else by the usual order of 4 or 8 bands."""
    names = [(name or "").strip().lower() for name in dataset.descriptions]
    if {"red", "green", "blue"} <= set(names):
        return names.index("red") + 1, names.index("green") + 1, names.index("blue") + 1
    if dataset.count >= 8:
        return 5, 3, 2
    return (3, 2, 1) if dataset.count >= 3 else (1, 1, 1)


def percentiles(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """2nd and 98th percentile of each band of [C,H,W] over the valid pixels, of which there must be some: [2,C]."""
    return np.percentile(image[:, valid], (2, 98), axis=1)


def stretch(image: NDArray[np.float32], valid: NDArray[np.bool_], limits: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[C,H,W] as 8 bits, each band's two `limits` [2,C] at 0 and 255, dark tones lifted; invalid pixels are black."""
    low, high = limits[..., None, None]
    scaled = ((image - low) / np.maximum(high - low, 1e-6)).clip(0, 1) ** GAMMA * 255
    return np.where(valid, scaled, 0).round().astype(np.uint8)


def write_preview(dataset: DatasetReader, path: Path) -> None:
    """Write a PNG of at most 1024 pixels a side in natural colours."""
    from matplotlib.image import imsave

    scale = min(1.0, PREVIEW_SIDE / max(dataset.shape))
    shape = max(1, round(dataset.height * scale)), max(1, round(dataset.width * scale))
    bands = natural_colours(dataset)
    image = dataset.read(bands, out_shape=(3, *shape), resampling=Resampling.average).astype(np.float32)
    valid = dataset.read_masks(bands[0], out_shape=shape) != 0
    if valid.any():  # a small share of pixels with data may vanish in the reduced picture
        image = stretch(image, valid, percentiles(image, valid))
    imsave(path, np.ascontiguousarray(image.transpose(1, 2, 0).astype(np.uint8)))
