"""PAN and multispectral GeoTIFFs of one scene, read as arrays."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

RATIO = 4


@dataclass(frozen=True)
class Pair:
    """One scene in memory.

    Attributes:
        pan: [4h, 4w], float32 digital numbers.
        ms: [bands, h, w], float32 digital numbers.
        valid: [h, w], bool: no band of the MS pixel and none of its PAN pixels is nodata or NaN.
        band_names: descriptions of the MS bands in the file, "" where it has none.
    """

    pan: np.ndarray
    ms: np.ndarray
    valid: np.ndarray
    band_names: tuple[str, ...]


def read_pair(
    pan: str | os.PathLike[str],
    ms: str | os.PathLike[str],
    *,
    nodata: float | None = None,
    shift: tuple[int, int] = (0, 0),
) -> Pair:
    """Read a PAN file and an MS file with a quarter of its rows and columns.

    Args:
        pan, ms: anything rasterio opens.
        nodata: value that means "no pixel", over what the files declare.
        shift: whole PAN pixels (rows, columns) by which PAN's content is moved down and right to lie on MS; what
            that leaves empty is not valid.

    Raises:
        ValueError: PAN has several bands, or the sizes do not stand 4 to 1.
        rasterio.errors.RasterioIOError: a file cannot be read.
    """
    import rasterio

    with rasterio.open(pan) as source:
        if source.count != 1:
            raise ValueError(f"PAN: expected one band, got {source.count} in {pan}")
        pan_image = source.read(1).astype(np.float32)
        pan_valid = _valid(pan_image, source.nodata if nodata is None else nodata)
    with rasterio.open(ms) as source:
        ms_image = source.read().astype(np.float32)
        ms_valid = _valid(ms_image, source.nodata if nodata is None else nodata).all(0)
        names = tuple(name or "" for name in source.descriptions)
    height, width = ms_image.shape[1:]
    if pan_image.shape != (RATIO * height, RATIO * width):
        raise ValueError(
            f"PAN: expected {RATIO * height} x {RATIO * width} pixels, {RATIO} times those of MS, "
            f"got {pan_image.shape[0]} x {pan_image.shape[1]}"
        )
    for axis, distance in enumerate(shift):
        pan_image, pan_valid = np.roll(pan_image, distance, axis), np.roll(pan_valid, distance, axis)
        empty = np.s_[:distance] if distance >= 0 else np.s_[distance:]
        np.moveaxis(pan_valid, axis, 0)[empty] = distance == 0
    blocks = pan_valid.reshape(height, RATIO, width, RATIO).all((1, 3))
    return Pair(np.nan_to_num(pan_image), np.nan_to_num(ms_image), np.asarray(ms_valid & blocks), names)


def _valid(image: np.ndarray, nodata: float | None) -> np.ndarray:
    valid: np.ndarray = np.isfinite(image)
    if nodata is not None and not np.isnan(nodata):
        valid &= image != nodata
    return valid
