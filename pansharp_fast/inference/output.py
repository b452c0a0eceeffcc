"""Writing of a sharpened scene: a GeoTIFF on PAN's grid that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
import glob
import logging
import math
import os
import re
import shutil
import threading
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
import rasterio._env
import rasterio.shutil
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, DatasetWriter, MemoryFile
from rasterio.windows import Window

from .. import pictures
from ..data.sources import source_files
from ..files import check_distinct, check_target, move, work_folder

#: Suffixes of previews.
PREVIEWS = (".png", ".jpg", ".jpeg")
PREVIEW_SIDE = 1024
#: Side of a file's blocks, at most.
BLOCK = 512
#: Relative distance from nodata up to which GDAL may take a float for it: some of float32's last places.
NODATA_REACH = 1e-6


class Source(Protocol):
    """What an output takes from the pair that it is made of."""

    pan_file: DatasetReader
    ms_file: DatasetReader
    bands: list[int]
    height: int
    width: int

    @property
    def may_lack_data(self) -> bool: ...


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Mapping[str, str | Path],
    *,
    overwrite: bool,
    cog: bool,
    creation_options: Mapping[str, str],
) -> None:
    """Refuse, before any work, what cannot be written.

    Args:
        outputs: files to be written, by what messages call them; "preview" is a picture, others are GeoTIFFs.
        inputs: rasters that are read, by any name that GDAL takes, and other files.
        overwrite: whether existing files may be replaced.
        cog: whether GeoTIFFs are Cloud Optimized.
        creation_options: see `check_creation_options`.

    Raises:
        OSError: a folder is missing, or a file exists.
        ValueError: an output is an input or another output; a preview has another suffix than .png, .jpg or .jpeg; an
            option is none of the driver's.
    """
    check_creation_options("COG" if cog else "GTiff", creation_options)
    for name, path in outputs.items():
        if path is not None:
            check_target(name, path, overwrite)
    preview = outputs.get("preview")
    if preview is not None and preview.suffix.lower() not in PREVIEWS:
        raise ValueError(f"preview: expected a name that ends in {', '.join(PREVIEWS)}, got {preview.name}")
    check_distinct(outputs, {name: source_files(source) for name, source in inputs.items()})


def check_creation_options(driver: str, options: Mapping[str, str]) -> None:
    """Refuse creation options that are none of the driver's own, values it does not take, and those that move OUT.

    Raises:
        ValueError: there is one.
    """
    known = {option.get("name", ""): option for option in _creation_options(driver)}
    for key, value in options.items():
        name, option = key.upper(), known.get(key.upper())
        if option is None:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f": {', '.join(known)}"
            raise ValueError(f"co: expected an option of GDAL's {driver} driver, got {name}{hint}")
        if name in _GRID_OPTIONS:
            raise ValueError(f"co: expected options that leave OUT on PAN's grid, got {name}")
        kind, text = option.get("type", "string"), str(value)
        if kind == "string-select":
            values = [value.text or "" for value in option.iter("Value")]
            names = [*values, *(value.get("alias", "") for value in option.iter("Value"))]
            fits, expected = text.upper() in [name.upper() for name in names], ", ".join(values)
        elif kind == "boolean":
            fits, expected = text.upper() in ("YES", "NO", "TRUE", "FALSE", "ON", "OFF", "1", "0"), "YES or NO"
        elif kind in ("int", "unsigned int", "integer", "float"):
            low, high = option.get("min"), option.get("max")
            expected = "a number" + (f" from {low}" if low else "") + (f" to {high}" if high else "")
            try:
                number = float(text) if kind == "float" else int(text)
                fits = (not low or number >= float(low)) and (not high or number <= float(high))
            except ValueError:
                fits = False
        else:
            fits, expected = True, ""
        if not fits:
            raise ValueError(f"co: {name}: expected {expected}, got {value}")


#: Options of the COG driver that make it warp what it is given.
_GRID_OPTIONS = {
    *("TARGET_SRS", "TILING_SCHEME", "RES", "EXTENT", "ZOOM_LEVEL", "ZOOM_LEVEL_STRATEGY", "ALIGNED_LEVELS"),
    *("ADD_ALPHA", "WARP_RESAMPLING"),
}


@functools.cache
def _creation_options(driver: str) -> list[ElementTree.Element]:
    """GDAL's own list; rasterio does not offer it, but is linked with the library that does."""
    gdal = ctypes.CDLL(rasterio._env.__file__)
    gdal.GDALGetDriverByName.restype = ctypes.c_void_p
    gdal.GDALGetMetadataItem.restype = ctypes.c_char_p
    gdal.GDALGetMetadataItem.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    with rasterio.Env():
        handle = gdal.GDALGetDriverByName(driver.encode())
        return list(ElementTree.fromstring(gdal.GDALGetMetadataItem(handle, b"DMD_CREATIONOPTIONLIST", None)))


def choose_nodata(scene: Source, dtype: np.dtype, asked: float | None, moved: bool = False) -> float | None:
    """The value that stands for "no data" in the output, or None where every pixel will hold data.

    `asked`, else what MS or PAN declares, else 0 (integers) or NaN. Bands that are `moved` may leave pixels void.

    Raises:
        ValueError: `dtype` does not hold the value.
    """
    declared = [value for value in (asked, scene.ms_file.nodata, scene.pan_file.nodata) if value is not None]
    if not (declared or moved or scene.may_lack_data):
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
        if nodata is not None and math.isfinite(nodata):
            near = NODATA_REACH * abs(nodata)
            above = nodata + 2 * near if nodata + 2 * near <= np.finfo(dtype).max else nodata - 2 * near
            pixels[np.abs(pixels - nodata) <= near] = above or np.finfo(dtype).smallest_subnormal
    else:
        limits = np.iinfo(dtype)
        wide = values if dtype.itemsize < 4 else values.astype(np.float64)  # float32 has not all numbers of 32 bits
        pixels = np.rint(wide).clip(limits.min, limits.max).astype(dtype)
        if nodata is not None:
            pixels[pixels == nodata] = int(nodata) + (1 if nodata < limits.max else -1)
    if nodata is not None:
        pixels[:, ~valid] = nodata
    return pixels


class Output:
    """A GeoTIFF being written beside its target; `finish` moves it there, and leaving the block cleans up.

    Args:
        path: target; where it is a link, what that points at is replaced.
        scene: gives grid, CRS, control points and the bands' descriptions, units, scales, colours and tags.
        dtype: of the pixels.
        nodata: value that means "no data", or None.
        block: side of the file's blocks, a multiple of 16.
        cog: write a Cloud Optimized GeoTIFF.
        creation_options: for GDAL's driver (GTiff or COG).
        preview: PNG or JPEG of the result in natural colours, or None.
        tags: further metadata of the dataset.

    Raises:
        OSError: the file cannot be created or written.
        ValueError: the driver cannot do what the options ask for.
    """

    def __init__(
        self,
        path: Path,
        scene: Source,
        *,
        dtype: np.dtype,
        nodata: float | None,
        block: int,
        cog: bool,
        creation_options: Mapping[str, str],
        preview: Path | None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.path, self.preview, self.cog, self.dtype, self.nodata = path, preview, cog, dtype, nodata
        compression = {"compress": "deflate", "predictor": 3 if dtype.kind == "f" else 2}
        asked = {key.lower(): value for key, value in creation_options.items()}
        if "nbits" in asked or asked.get("compress", "deflate").lower() not in ("deflate", "lzw", "zstd"):
            del compression["predictor"]
        self.final_options = {**(compression if cog else {}), **asked}
        if cog:
            compression = {"compress": "zstd", "zstd_level": 1}
        pan = scene.pan_file
        profile: dict[str, Any] = {
            "driver": "GTiff",
            "height": scene.height,
            "width": scene.width,
            "count": len(scene.bands),
            "dtype": dtype.name,
            "crs": pan.crs,
            "transform": None if pan.transform.is_identity else pan.transform,  # GDAL has it or control points
            "nodata": nodata,
            "tiled": True,
            "blockxsize": block,
            "blockysize": block,
            "bigtiff": "if_safer",
            "num_threads": "all_cpus",
            **compression,
        }
        plain = profile
        if not cog:
            profile = profile | asked
        if str(profile["tiled"]).upper() in ("NO", "FALSE", "OFF", "0"):
            profile = {key: value for key, value in profile.items() if "block" not in key or key in asked}
        if asked:
            self._try(plain, profile, asked, scene, tags)
        with self._writing(), contextlib.ExitStack() as stack, ungeoreferenced():
            self.folder = stack.enter_context(work_folder(path, ".sharpen-"))
            self.part = self.folder / path.name
            self.scene_part = self.folder / "tiles" / path.name if cog else self.part
            self.scene_part.parent.mkdir(exist_ok=True)
            self.file = stack.enter_context(rasterio.open(self.scene_part, "w", **profile))
            self._annotate(self.file, scene, tags)
            self._stack = stack.pop_all()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _annotate(self, file: DatasetWriter, scene: Source, tags: Mapping[str, str] | None) -> None:
        """What the pair says about its pixels, but for the grid."""
        pan, ms = scene.pan_file, scene.ms_file
        index = [band - 1 for band in scene.bands]
        file.descriptions = [ms.descriptions[i] for i in index]
        file.units = [ms.units[i] or "" for i in index]
        colours = [ms.colorinterp[i] for i in index]
        file.colorinterp = [
            ColorInterp.undefined if colour in (ColorInterp.alpha, ColorInterp.palette) else colour
            for colour in colours
        ]
        file.scales = [ms.scales[i] for i in index]
        file.offsets = [ms.offsets[i] for i in index]
        file.update_tags(**(_kept(ms.tags()) | dict(tags or {})))
        for number, band in enumerate(scene.bands, 1):
            file.update_tags(number, **_kept(ms.tags(band)))
        if pan.gcps[0]:
            file.gcps = pan.gcps
        if pan.rpcs is not None:
            file.rpcs = pan.rpcs
        if "AREA_OR_POINT" in pan.tags():
            file.update_tags(AREA_OR_POINT=pan.tags()["AREA_OR_POINT"])

    def _try(
        self,
        plain: Mapping[str, Any],
        profile: Mapping[str, Any],
        asked: Mapping[str, str],
        scene: Source,
        tags: Mapping[str, str] | None,
    ) -> None:
        """Write small files in memory, by the options asked for and without: what cannot work fails before any tile."""
        try:
            expected, _ = self._trial(plain, {}, scene, tags)
            facts, warned = self._trial(profile, self.final_options, scene, tags)
            texts = dict.fromkeys(text for text in warned if any(key.upper() in text.upper() for key in asked))
            lost = [name for name, value in expected.items() if facts[name] != value]
            complaint = "; ".join(texts) or (f"{', '.join(lost)} lost" if lost else "")
        except (RasterioError, CPLE_BaseError) as error:
            complaint = str(error.__cause__ or error)
        if complaint:
            options = " ".join(f"{key.upper()}={value}" for key, value in asked.items())
            raise ValueError(
                f"co: expected options by which {self.dtype} and what belongs to it can be written, got {options} "
                f"({' '.join(complaint.split())})"
            )

    def _trial(
        self, profile: Mapping[str, Any], options: Mapping[str, Any], scene: Source, tags: Mapping[str, str] | None
    ) -> tuple[dict[str, str], list[str]]:
        """What a small file says of itself when it is read back, and what GDAL warned of."""
        side = int(options.get("blocksize", BLOCK)) + 8 if self.cog else BLOCK  # a COG with overviews
        small = {**profile, "height": min(side, scene.height), "width": min(side, scene.width)}
        with (
            ungeoreferenced(),
            _gdal_warnings() as warned,
            MemoryFile(ext=".tif") as memory,
            MemoryFile(ext=".tif") as cog,
        ):
            with memory.open(**small) as file:
                self._annotate(file, scene, tags)
                file.write(np.ones((file.count, *file.shape), self.dtype))
            if self.cog:
                rasterio.shutil.copy(memory.name, cog.name, driver="COG", **options)
            with rasterio.open((cog if self.cog else memory).name) as file:
                file.read()
                return _facts(file), warned

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (RasterioError, CPLE_BaseError, OSError) as error:
            free = shutil.disk_usage(Path(os.path.realpath(self.path)).parent).free >> 20
            cause = error.__cause__ or error
            raise OSError(f"OUT: expected to write {self.path}, got {cause} ({free} MiB free there)") from error

    def write(self, top: int, left: int, values: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """Write a piece: values [C,H,W] unrounded, valid [H,W]."""
        pixels = to_pixels(values, valid, self.dtype, self.nodata)
        with self._writing():
            self.file.write(pixels, window=Window(left, top, pixels.shape[2], pixels.shape[1]))

    def finish(self) -> None:
        """Complete the file and move it, and the preview, to their places."""
        with self._writing(), contextlib.ExitStack() as stack, ungeoreferenced():
            self.file.close()
            if self.cog:
                rasterio.shutil.copy(self.scene_part, self.part, driver="COG", **self.final_options)
                shutil.rmtree(self.scene_part.parent)
            with rasterio.open(self.part) as dataset:
                # GDAL does not report what fails while it closes a file, as on a full disk: read everything back.
                for _, window in dataset.block_windows(1):
                    dataset.read(window=window)
                if self.preview is not None:
                    picture = stack.enter_context(work_folder(self.preview, ".sharpen-")) / self.preview.name
                    write_preview(dataset, picture)
            place(self.part, self.path)
            if self.preview is not None:
                place(picture, self.preview)


def place(part: Path, path: Path) -> None:
    """Move a raster to its place with the files that its driver wrote beside it, and remove those of an older one.

    GDAL reads overviews, masks, statistics, world files and more from files named after a raster: left behind, they
    would speak of the new one.
    """
    beside = [file for file in part.parent.iterdir() if file != part and file.is_file()]
    path, target = Path(os.path.abspath(path)), Path(os.path.realpath(path))
    for name in {path, target}:
        for file in name.parent.glob(glob.escape(name.name) + ".*"):
            if re.fullmatch(r"(\.ovr|\.msk|\.aux|\.aux\.xml)+", file.name.removeprefix(name.name), re.IGNORECASE):
                file.unlink()
    move(part, path)
    new = [path.parent / file.name for file in beside]
    for file, to in zip(beside, new, strict=True):
        move(file, to)
    for name in {path, target}:
        while True:  # where one world file is gone, another may count
            with rasterio.open(name) as dataset:
                old = [file for file in map(Path, dataset.files) if file not in (name, *new) and _names(file, name)]
            if not old:
                break
            for file in old:
                file.unlink()


def _names(file: Path, raster: Path) -> bool:
    """Whether a file is named after a raster, as its world file or its RPCs are."""
    rest = file.name.lower().removeprefix(raster.stem.lower())
    return file.parent == raster.parent and rest != file.name.lower() and rest.startswith((".", "_rpc"))


def _kept(tags: Mapping[str, str]) -> dict[str, str]:
    """Metadata that is still true of other pixels on another grid."""
    gone = ("STATISTICS_", "TIFFTAG_MINSAMPLE", "TIFFTAG_MAXSAMPLE", "AREA_OR_POINT", "OVR_")
    return {key: value for key, value in tags.items() if not key.startswith(gone) and key not in ("ns", "bidx")}


def _facts(file: DatasetReader) -> dict[str, str]:
    """What must not get lost on the way to a file."""
    return {
        "CRS": str(file.crs),
        "transform": str(file.transform),
        "nodata": str(file.nodata),
        "pixel type": str(file.dtypes),
        "names": str(file.descriptions),
        "tags": str(sorted(_kept(file.tags()).items())),
    }


class _Collector(logging.Handler):
    """Keeps what one thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread, self.texts = threading.get_ident(), list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread:
            self.texts.append(record.getMessage())


@contextlib.contextmanager
def _gdal_warnings() -> Iterator[list[str]]:
    """Collects what GDAL warns of, which rasterio logs."""
    logger, handler = logging.getLogger("rasterio._env"), _Collector()
    logger.addHandler(handler)
    try:
        with rasterio.Env():
            yield handler.texts
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def ungeoreferenced() -> Iterator[None]:
    """No warning of rasterio's about files that know no place: users of such files know it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def write_preview(dataset: DatasetReader, path: Path) -> None:
    """Write a picture of at most 1024 pixels a side in natural colours, PNG or JPEG by the suffix of `path`."""
    scale = min(1.0, PREVIEW_SIDE / max(dataset.shape))
    shape = max(1, round(dataset.height * scale)), max(1, round(dataset.width * scale))
    bands = [band + 1 for band in pictures.natural_colours(dataset.descriptions)]
    image = dataset.read(bands, out_shape=(3, *shape), resampling=Resampling.average).astype(np.float32)
    valid = dataset.read_masks(bands[0], out_shape=shape) != 0  # a small share of pixels with data may vanish in it
    pictures.write(path, pictures.stretch(image, pictures.limits(image, valid), valid))
