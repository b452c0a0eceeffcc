"""Training files from scenes of one's own, by Wald's protocol."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch

from .mtf import degrade
from .pairs import RATIO, Pair, read_pair
from .resample import interp23
from .sensors import Sensor, get_sensor


def simulate_pair(pair: Pair, sensor: str | Sensor) -> dict[str, np.ndarray]:
    """Degrade a scene four times, so that its MS can serve as ground truth.

    L. Wald et al., PE&RS 1997, as PanCollection does it: MS through the sensor's MTF, then rows and columns 2, 6, 10,
    ...; PAN by antialiased bicubic reduction (`data.degrade`).

    Returns:
        gt [C, h, w] float32, ms [C, h/4, w/4] and pan [1, h, w] float32 unrounded, lms [C, h, w] (`data.interp23`),
        valid [h/4, w/4] bool: the pixel and its surroundings within 4 MS pixels hold no nodata. h and w are the MS
        sizes, cut to multiples of 4.

    Raises:
        ValueError: the sensor has another number of bands, or the scene is smaller than 4 x 4 MS pixels.
    """
    height, width = (extent // RATIO * RATIO for extent in pair.valid.shape)
    if not height or not width:
        raise ValueError(f"MS: expected at least {RATIO} x {RATIO} pixels, got {pair.valid.shape}")
    gt = torch.from_numpy(pair.ms[:, :height, :width])[None]
    pan = torch.from_numpy(pair.pan[: RATIO * height, : RATIO * width])[None, None]
    ms, reduced = degrade(gt.double(), pan.double(), sensor)
    blocks = pair.valid[:height, :width].reshape(height // RATIO, RATIO, width // RATIO, RATIO).all((1, 3))
    bad = torch.from_numpy(~blocks).float()[None, None]
    # The filters reach 20 pixels: about one low-resolution pixel in effect, five by the letter.
    bad = torch.nn.functional.max_pool2d(bad, 3, stride=1, padding=1)[0, 0].bool()
    images = {"gt": gt, "ms": ms, "pan": reduced, "lms": interp23(ms)}
    return {name: image[0].float().numpy() for name, image in images.items()} | {"valid": ~bad.numpy()}


def patches(images: dict[str, np.ndarray], size: int, overlap: int) -> Iterator[dict[str, np.ndarray]]:
    """Square patches of `size` gt pixels without nodata, neighbours sharing `overlap` low-resolution pixels.

    Args:
        images: what `simulate_pair` returns.
        size: a multiple of 4.
        overlap: below size / 4.

    Raises:
        ValueError: size or overlap is out of range.
    """
    side = size // RATIO
    if size % RATIO or side < 1:
        raise ValueError(f"patch: expected a multiple of {RATIO}, got {size}")
    if not 0 <= overlap < side:
        raise ValueError(f"overlap: expected 0 to {side - 1} low-resolution pixels, got {overlap}")
    height, width = images["valid"].shape
    for y in range(0, height - side + 1, side - overlap):
        for x in range(0, width - side + 1, side - overlap):
            if images["valid"][y : y + side, x : x + side].all():
                low = np.s_[:, y : y + side, x : x + side]
                high = np.s_[:, RATIO * y : RATIO * (y + side), RATIO * x : RATIO * (x + side)]
                yield {name: images[name][low if name == "ms" else high] for name in ("gt", "ms", "lms", "pan")}


def write_pancollection(path: str | os.PathLike[str], samples: list[dict[str, np.ndarray]], sensor: Sensor) -> None:
    """Write samples in the PanCollection layout; the file appears whole or not at all.

    Raises:
        ValueError: there is no sample.
        OSError: the file cannot be written.
    """
    if not samples:
        raise ValueError("patch: expected a size that fits between nodata and the borders, got no patch at all")
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        with h5py.File(temporary, "w") as file:
            for name in samples[0]:
                file[name] = np.stack([sample[name] for sample in samples])
            file.attrs.update(sensor=sensor.name, max_value=sensor.peak, ratio=RATIO)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def simulate(
    pan: str | os.PathLike[str],
    ms: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sensor: str | Sensor,
    patch: int = 64,
    overlap: int = 4,
    valid_out: str | os.PathLike[str] | None = None,
    valid_share: float = 0.2,
    nodata: float | None = None,
    shift: tuple[int, int] = (0, 0),
) -> dict[str, int]:
    """Make a training file, and a validation file of another part of the scene, from two GeoTIFFs.

    Args:
        pan, ms, nodata, shift: see `data.read_pair`.
        out: PanCollection HDF5 file with gt, ms, lms, pan.
        sensor: name or `Sensor`, for the MTF.
        patch: side of a patch in gt pixels (that is, native MS pixels), a multiple of 4.
        overlap: low-resolution pixels that neighbouring patches share.
        valid_out: file for the patches of the scene's right part, of which `out` then holds nothing.
        valid_share: share of the columns that goes there.

    Returns:
        Number of patches in each file written.

    Raises:
        ValueError, OSError: an argument or a file is none of the above, or a file exists already.
    """
    sensor = get_sensor(sensor)
    outputs = [Path(path) for path in (out, valid_out) if path is not None]
    for path in outputs:
        if path.exists():
            raise ValueError(f"{path}: expected a new file, got one that exists")
    images = simulate_pair(read_pair(pan, ms, nodata=nodata, shift=shift), sensor)
    parts = [images]
    if valid_out is not None:
        if not 0 < valid_share < 1:
            raise ValueError(f"valid_share: expected a number between 0 and 1, got {valid_share}")
        width = images["valid"].shape[1]
        cut = width - round(width * valid_share)
        parts = [
            {name: v[..., :cut] if v.shape[-1] == width else v[..., : RATIO * cut] for name, v in images.items()},
            {name: v[..., cut:] if v.shape[-1] == width else v[..., RATIO * cut :] for name, v in images.items()},
        ]
    found = [list(patches(part, patch, overlap)) for part in parts]
    for path, samples in zip(outputs, found, strict=True):
        if not samples:
            raise ValueError(f"patch: expected a size that fits {path.name}'s part of the scene, got {patch}")
    for path, samples in zip(outputs, found, strict=True):
        write_pancollection(path, samples, sensor)
    return {str(path): len(samples) for path, samples in zip(outputs, found, strict=True)}
