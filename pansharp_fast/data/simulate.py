"""Training files from scenes of one's own, by Wald's protocol."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..files import atomic, check_distinct, check_target
from .grid import aligned_phase
from .mtf import degrade
from .observation import REACH, move, observe, upsample
from .rasters import RasterPair, fill
from .registration import measure
from .resample import imresize, interp23
from .resample import shift as ramp
from .sensors import Sensor, gains_of, get_sensor, sensor_in
from .sources import check_local, source_files

#: Pixels over which a move by fractions of a pixel spreads what is void.
_REACH = 8


@dataclass(frozen=True)
class Pair:
    """One scene in memory, PAN where MS lies: MS pixel k covers PAN pixels ratio*k to ratio*k + ratio - 1.

    Attributes:
        pan: [ratio*h, ratio*w], float32 digital numbers; void pixels are filled from their surroundings.
        ms: [bands, h, w], float32 digital numbers; void pixels are filled, band by band.
        valid: [h, w], bool: every band of the MS pixel and all of its PAN pixels hold data.
        band_names: descriptions of the MS bands in the file, "" where it has none.
        ratio: PAN pixels per MS pixel.
        sensor: with the MTF gains of these bands.
        displacement: [bands, 2], (rows, columns) in PAN pixels: band b shows at p + d_b what PAN shows at p. None where
            it was not measured.
        field: [2, h, w] or None: what is added to it from place to place.
    """

    pan: np.ndarray
    ms: np.ndarray
    valid: np.ndarray
    band_names: tuple[str, ...]
    ratio: int
    sensor: Sensor
    displacement: np.ndarray | None = None
    field: np.ndarray | None = None


def read_pair(
    pan: str | os.PathLike[str],
    ms: str | os.PathLike[str],
    *,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    phase: float | tuple[float, float] | None = None,
    shift: tuple[float, float] = (0, 0),
    register: str = "off",
    frame: str = "ms",
    sensor: str | Sensor | None = None,
    mtf: Sequence[float] | None = None,
) -> Pair:
    """Read the part that a PAN and an MS raster share, on MS's own grid; PAN is moved to lie on it.

    Args:
        pan: see `rasters.RasterPair`, as the four arguments that follow.
        ms: its grid may differ from PAN's in place, orientation and CRS.
        bands: MS bands, counted from 1; None is all.
        nodata: value without data where a file declares none.
        phase: (row, column), PAN pixels.
        shift: displacement (rows, columns) of MS against PAN, in PAN pixels, down and right positive: MS shows at p +
            shift what PAN shows at p.
        register: "auto" measures the displacement of every band (`data.registration`) instead; "off" does not.
        frame: "ms" moves PAN by shift or to the median of all image bands, and MS keeps its pixels (fractions go by a
            phase ramp, `data.shift`); "pan" moves every band to where PAN lies (`data.observation.move`).
        sensor: name or `Sensor`, for the MTF; None is what the files' metadata name, else gains of .3.
        mtf: gains at MS's Nyquist frequency, one or one for each image band, over the sensor's.

    Raises:
        ValueError: as `rasters.RasterPair`; the ratio is no whole number from 2 to 8; PAN covers no MS pixel; the
            sensor has another number of bands; or an option is none of the above.
        OSError: a file cannot be read.
    """
    with RasterPair(pan, ms, bands=bands, nodata=nodata, phase=phase) as pair:
        ratio = round(pair.ratio[0])
        if pair.ratio != (ratio, ratio) or not 2 <= ratio <= 8:
            raise ValueError(
                f"ratio: expected a whole number from 2 to 8, got {pair.ratio[0]:.6g} x {pair.ratio[1]:.6g}"
            )
        chosen = [pair.image_bands.index(band) for band in pair.bands]
        known = get_sensor(sensor_in(pair.ms_file, pair.pan_file) if sensor is None else sensor)
        gains = gains_of(known, mtf, len(pair.image_bands))
        own = tuple(gains[index] for index in chosen)
        if mtf is None and sensor is not None and len(known.mtf_ms) != len(gains):
            own = known.gains(len(chosen))
        displacement, field = None, None
        moves = np.broadcast_to(np.array(shift, float), (len(chosen), 2))
        if register == "auto":
            if moves.any():
                raise ValueError("shift: expected none beside register auto")
            found = measure(pair, gains, bands=pair.image_bands)
            if found.model == "none":
                warnings.warn(found.text(), stacklevel=2)
            moves = found.d[0, chosen].numpy()
            shift = tuple(np.median(found.d[0].numpy(), 0).tolist())
            displacement = moves - shift if frame == "ms" else np.zeros_like(moves)
            if found.field is not None:
                rows, columns = (
                    start + ratio * torch.arange(length)
                    for start, length in zip(pair.phase, (pair.ms_height, pair.ms_width), strict=True)
                )
                field = found.at(rows, columns, (pair.height, pair.width))[0].numpy()
        if frame == "pan":
            shift = (0.0, 0.0)
        # Where on PAN the area of MS pixel 0 begins, and which MS pixels PAN reaches.
        starts = [p - aligned_phase(ratio) - d for p, d in zip(pair.phase, shift, strict=True)]
        whole = [round(start) if abs(start - round(start)) < 1e-3 else math.floor(start) for start in starts]
        ends = (pair.ms_height, pair.ms_width)
        first = [max(0, math.ceil(-(start + ratio - 1) / ratio)) for start in whole]
        last = [
            min(end, math.ceil((size - start) / ratio))
            for end, size, start in zip(ends, pair.pan_file.shape, whole, strict=True)
        ]
        height, width = (stop - start for start, stop in zip(first, last, strict=True))
        if height < 1 or width < 1:
            raise ValueError(
                f"MS: expected to overlap PAN, got its first area at row {starts[0]:g}, column {starts[1]:g}"
            )
        values, holds = pair.read_ms(first[0], first[1], height, width)
        if field is not None:
            field = field[:, first[0] : last[0], first[1] : last[1]]
        names = tuple(pair.ms_file.descriptions[band - 1] or "" for band in pair.bands)
        top, left = (start + ratio * index for start, index in zip(whole, first, strict=True))
        rest = [start - part for start, part in zip(starts, whole, strict=True)]
        border = [_REACH if abs(part) > 1e-3 else 0 for part in rest]
        image, pan_holds = pair.read_pan(
            top - border[0], left - border[1], ratio * height + 2 * border[0], ratio * width + 2 * border[1]
        )
    image = fill(image, pan_holds)
    if any(border):
        moved = ramp(
            torch.from_numpy(image)[None].double(),
            *(-part if at else 0.0 for part, at in zip(rest, border, strict=True)),
        )
        image = moved[0].float().numpy()
        spread = F.max_pool2d(
            torch.from_numpy(~pan_holds).float()[None, None],
            [2 * at + 1 for at in border],
            stride=1,
            padding=border,
        )
        pan_holds = spread[0, 0].numpy() == 0
    values = fill(values, holds)
    if frame == "pan":
        values, holds = _moved(values, holds, moves / ratio)
    inner = np.s_[border[0] : border[0] + ratio * height, border[1] : border[1] + ratio * width]
    image, pan_holds = image[0][inner], pan_holds[inner]
    blocks = pan_holds.reshape(height, ratio, width, ratio).all((1, 3))
    valid = np.asarray(holds.all(0) & blocks)
    sensor = dataclasses.replace(known, mtf_ms=own)
    return Pair(image, values, valid, names, ratio, sensor, displacement, field)


def _moved(
    values: NDArray[np.float32], holds: NDArray[np.bool_], d: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Bands [C, h, w] moved back by their displacements [C, 2], in pixels, and where nothing void went in."""
    if not d.any():
        return values, holds
    moved = move(torch.from_numpy(values)[None].double(), torch.from_numpy(-d))[0].float().numpy()
    masks = []
    for mask, shift in zip(holds, d, strict=True):
        reach = [REACH + math.ceil(abs(part)) if part else 0 for part in shift.tolist()]
        void = torch.from_numpy(~np.pad(mask, [(part, part) for part in reach])).float()[None, None]
        masks.append(F.max_pool2d(void, [2 * part + 1 for part in reach], stride=1)[0, 0].numpy() == 0)
    return moved, np.stack(masks)


def simulate_pair(pair: Pair, sensor: str | Sensor | None = None) -> dict[str, np.ndarray]:
    """Degrade a scene by its ratio r, so that its MS can serve as ground truth.

    L. Wald et al., PE&RS 1997, as PanCollection does it: MS through the sensor's MTF and sampled at phase r / 2 (rows
    and columns 2, 6, 10, ... at ratio 4); PAN by antialiased bicubic reduction. Where r is a power of two, by the
    toolbox's filters (`data.degrade`, `data.interp23`), else by `data.observation`.

    Args:
        pair: a scene.
        sensor: name or `Sensor`, for the MTF; None is the scene's own.

    Returns:
        gt [C, h, w] float32, ms [C, h/r, w/r] and pan [1, h, w] float32 unrounded, lms [C, h, w], valid [h/r, w/r]
        bool: the pixel and its surroundings within r MS pixels hold data, and where it was measured displacement
        [C, 2, h/r, w/r] float32: of gt against pan, in their pixels, down and right positive. h and w are the MS
        sizes, cut to multiples of r.

    Raises:
        ValueError: the sensor has another number of bands, or the scene is smaller than r x r MS pixels.
    """
    ratio = pair.ratio
    height, width = (extent // ratio * ratio for extent in pair.valid.shape)
    if not height or not width:
        raise ValueError(
            f"MS: expected at least {ratio} x {ratio} pixels on PAN, got {pair.valid.shape[0]} x {pair.valid.shape[1]}"
        )
    gt = torch.from_numpy(pair.ms[:, :height, :width])[None]
    pan = torch.from_numpy(pair.pan[: ratio * height, : ratio * width])[None, None]
    sensor = pair.sensor if sensor is None else get_sensor(sensor)
    if ratio & (ratio - 1) == 0:
        ms, reduced = degrade(gt.double(), pan.double(), sensor, ratio)
        lms = interp23(ms, ratio)
    else:
        gains, small = sensor.gains(gt.shape[1]), (height // ratio, width // ratio)
        ms = observe(gt.double(), small, gains=gains, ratio=ratio, phase=ratio / 2)
        lms = upsample(ms, (height, width), ratio=ratio, phase=ratio / 2)
        reduced = imresize(pan.double(), 1 / ratio)
    blocks = pair.valid[:height, :width].reshape(height // ratio, ratio, width // ratio, ratio).all((1, 3))
    bad = torch.from_numpy(~blocks).float()[None, None]
    # The filters reach 20 pixels: about one low-resolution pixel in effect, five by the letter.
    bad = torch.nn.functional.max_pool2d(bad, 3, stride=1, padding=1)[0, 0].bool()
    images = {name: x[0].float().numpy() for name, x in {"gt": gt, "ms": ms, "pan": reduced, "lms": lms}.items()}
    images["valid"] = ~bad.numpy()
    if pair.displacement is not None:
        d = np.broadcast_to(pair.displacement[..., None, None], (*pair.displacement.shape, *blocks.shape))
        if pair.field is not None:
            d = d + pair.field[:, :height, :width].reshape(2, height // ratio, ratio, width // ratio, ratio).mean(
                (2, 4)
            )
        images["displacement"] = (d / ratio).astype(np.float32)
    return images


def patches(images: dict[str, np.ndarray], size: int, overlap: int) -> Iterator[dict[str, np.ndarray]]:
    """Square patches of `size` gt pixels without nodata, neighbours sharing `overlap` low-resolution pixels.

    Args:
        images: what `simulate_pair` returns.
        size: a multiple of the ratio.
        overlap: below size / ratio.

    Raises:
        ValueError: size or overlap is out of range.
    """
    ratio = images["gt"].shape[-1] // images["ms"].shape[-1]
    side = size // ratio
    if size % ratio or side < 1:
        raise ValueError(f"patch: expected a multiple of {ratio}, got {size}")
    if not 0 <= overlap < side:
        raise ValueError(f"overlap: expected 0 to {side - 1} low-resolution pixels, got {overlap}")
    height, width = images["valid"].shape
    for y in range(0, height - side + 1, side - overlap):
        for x in range(0, width - side + 1, side - overlap):
            if images["valid"][y : y + side, x : x + side].all():
                low = np.s_[:, y : y + side, x : x + side]
                high = np.s_[:, ratio * y : ratio * (y + side), ratio * x : ratio * (x + side)]
                patch = {name: images[name][low if name == "ms" else high] for name in ("gt", "ms", "lms", "pan")}
                if "displacement" in images:
                    patch["displacement"] = images["displacement"][..., y : y + side, x : x + side].mean((-2, -1))
                yield patch


def write_pancollection(path: str | os.PathLike[str], samples: list[dict[str, np.ndarray]], sensor: Sensor) -> None:
    """Write samples in the PanCollection layout; the file appears whole or not at all.

    Attributes of the file: `sensor`, `mtf` (gains), `max_value`, `ratio`, and `phase`, the PAN index of the first ms
    pixel's centre, ratio / 2; of the data set displacement, `unit`.

    Args:
        path: HDF5 file.
        samples: arrays of equal shapes by name; ms [C, h, w], pan [1, r*h, r*w], perhaps displacement [C, 2].
        sensor: what the samples are of.

    Raises:
        ValueError: there is no sample.
        OSError: the file cannot be written.
    """
    if not samples:
        raise ValueError("patch: expected a size that fits between nodata and the borders, got no patch at all")
    ratio = samples[0]["pan"].shape[-1] // samples[0]["ms"].shape[-1]
    with atomic(path) as part, h5py.File(part, "w") as file:
        for name in samples[0]:
            file[name] = np.stack([sample[name] for sample in samples])
        if "displacement" in file:
            file["displacement"].attrs["unit"] = "pixels of pan (rows, columns), down and right positive"
        file.attrs.update(sensor=sensor.name, mtf=sensor.mtf_ms, max_value=sensor.peak, ratio=ratio, phase=ratio / 2)


def simulate(
    pan: str | os.PathLike[str],
    ms: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sensor: str | Sensor | None = None,
    mtf: Sequence[float] | None = None,
    patch: int = 64,
    overlap: int = 4,
    valid_out: str | os.PathLike[str] | None = None,
    valid_share: float = 0.2,
    bands: Sequence[int] | None = None,
    nodata: float | None = None,
    phase: float | tuple[float, float] | None = None,
    shift: tuple[float, float] = (0, 0),
    register: str = "off",
    frame: str = "ms",
    local_only: bool = False,
) -> dict[str, int]:
    """Make a training file, and a validation file of another part of the scene, from two rasters.

    Args:
        pan: see `read_pair`.
        ms: see `read_pair`.
        out: PanCollection HDF5 file with gt, ms, lms, pan and, with register, displacement.
        sensor: see `read_pair`; also for the largest value that the file names.
        mtf: see `read_pair`.
        patch: side of a patch in gt pixels (that is, native MS pixels), a multiple of the ratio.
        overlap: low-resolution pixels that neighbouring patches share.
        valid_out: file for the patches of the scene's right part, of which `out` then holds nothing.
        valid_share: share of the columns that goes there.
        bands: see `read_pair`.
        nodata: see `read_pair`.
        phase: see `read_pair`.
        shift: see `read_pair`.
        register: see `read_pair`.
        frame: see `read_pair`.
        local_only: refuse sources that are not local files.

    Returns:
        Number of patches in each file written.

    Raises:
        ValueError: an argument or a raster is none of the above, or a file is another's.
        OSError: a file cannot be read or written, or exists.
    """
    outputs = {name: Path(path) for name, path in (("OUT", out), ("valid_out", valid_out)) if path is not None}
    for name, path in outputs.items():
        check_target(name, path, False)
    if local_only:
        check_local("PAN", pan)
        check_local("MS", ms)
    check_distinct(outputs, {"PAN": source_files(pan), "MS": source_files(ms)})
    for name, value, choices in (("register", register, ("auto", "off")), ("frame", frame, ("ms", "pan"))):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    pair = read_pair(
        pan,
        ms,
        bands=bands,
        nodata=nodata,
        phase=phase,
        shift=shift,
        register=register,
        frame=frame,
        sensor=sensor,
        mtf=mtf,
    )
    images = simulate_pair(pair)
    parts = [images]
    if valid_out is not None:
        if not 0 < valid_share < 1:
            raise ValueError(f"valid_share: expected a number between 0 and 1, got {valid_share}")
        width = images["valid"].shape[1]
        cut = width - round(width * valid_share)
        parts = [_columns(images, 0, cut, pair.ratio), _columns(images, cut, width, pair.ratio)]
    samples = [list(patches(part, patch, overlap)) for part in parts]
    for path, some in zip(outputs.values(), samples, strict=True):
        if not some:
            raise ValueError(f"patch: expected a size that fits {path.name}'s part of the scene, got {patch}")
    for path, some in zip(outputs.values(), samples, strict=True):
        write_pancollection(path, some, pair.sensor)
    return {str(path): len(some) for path, some in zip(outputs.values(), samples, strict=True)}


def _columns(images: dict[str, np.ndarray], start: int, stop: int, ratio: int) -> dict[str, np.ndarray]:
    """Columns of what `simulate_pair` returns, counted in low-resolution pixels."""
    scales = dict.fromkeys(("gt", "lms", "pan"), ratio)
    return {name: x[..., scales.get(name, 1) * start : scales.get(name, 1) * stop] for name, x in images.items()}
