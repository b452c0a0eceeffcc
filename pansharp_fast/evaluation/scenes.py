"""Where scenes come from: a PanCollection HDF5 file, or crops of a pair of rasters."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from ..data import Sensor, degrade, imresize, shift
from ..data.observation import observe
from ..data.registration import Registration, register

PROTOCOLS = ("reduced", "full")
#: What the papers' scenes measure a side, in pixels of the PAN that methods see.
CROP = {"reduced": 256, "full": 512}
#: Ratios of the scenes, whole numbers.
RATIOS = range(2, 9)


@dataclass(frozen=True)
class Scene:
    """Input of the methods and ground truth, float64 digital numbers.

    Attributes:
        pan: [1, 1, r*h, r*w].
        ms: [1, C, h, w].
        gt: [1, C, r*h, r*w] in MS's frame, or None.
        ratio: r.
        phase: PAN row and column of the first MS pixel's centre.
        sensor: of these bands.
    """

    pan: torch.Tensor
    ms: torch.Tensor
    gt: torch.Tensor | None
    ratio: int
    phase: tuple[float, float]
    sensor: Sensor

    @functools.cached_property
    def registration(self) -> tuple[Registration, float]:
        """Where the bands lie against PAN, and the seconds that it took to find out."""
        start = time.perf_counter()
        found = register(self.pan, self.ms, sensor=self.sensor, ratio=self.ratio, phase=self.phase)
        return found, time.perf_counter() - start

    @functools.cached_property
    def reference(self) -> torch.Tensor:
        """Registered GSA, in PAN's frame."""
        from ..inference import sharpen

        return sharpen(
            self.pan,
            self.ms,
            method="gsa",
            register=self.registration[0],
            back_projection=0,
            sensor=self.sensor,
            ratio=self.ratio,
            phase=self.phase,
        )


class Source(AbstractContextManager["Source"]):
    """Scenes by number.

    Attributes:
        bands: number of MS bands.
        ratio: PAN pixels per MS pixel.
        facts: what identifies the data, for the report and to recognise an interrupted run.
        default: the protocols that suit the data.
        sensor: name of the sensor, where the data says it.
        peak: largest digital number, where the data says it.
    """

    bands: int
    ratio: int
    facts: dict[str, Any]
    default: tuple[str, ...]
    sensor: str | None = None
    peak: float | None = None

    def scenes(self, protocol: str) -> list[str]:
        """Names of the scenes under `protocol`, in order."""
        raise NotImplementedError

    def phase(self, protocol: str) -> tuple[float, float]:
        """PAN row and column of the first MS pixel's centre, in scenes of `protocol`."""
        raise NotImplementedError

    def original(self, protocol: str, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """PAN, MS and ground truth as they are stored; without the last where it is to be made of the pair."""
        raise NotImplementedError

    def read(self, protocol: str, index: int, sensor: Sensor, by: tuple[float, float] = (0, 0)) -> Scene:
        """Scene `index` as the methods see it, with PAN's content moved by (rows, columns) of its pixels.

        Under "reduced" a pair without ground truth is degraded by the Wald protocol; PAN is moved before that.
        """
        pan, ms, gt = self.original(protocol, index)
        phase = self.phase(protocol)
        if protocol == "reduced" and gt is None:
            # The ground truth's pixels lie where those of the reduced PAN will: aligned areas.
            aligned = (self.ratio - 1) / 2
            moved = [self.ratio * b + aligned - own for b, own in zip(by, self.phase("full"), strict=True)]
            pan = shift(pan, *moved) if any(moved) else pan
            low, pan = reduce(ms, pan, sensor, self.ratio)
            return Scene(pan, low, ms, self.ratio, phase, sensor)
        pan = shift(pan, *by) if any(by) else pan
        return Scene(pan, ms, gt if protocol == "reduced" else None, self.ratio, phase, sensor)


def reduce(ms: torch.Tensor, pan: torch.Tensor, sensor: Sensor, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Wald's protocol: the toolbox's at its ratios, powers of two; the same by the model of observation at others."""
    if ratio & (ratio - 1) == 0:
        return degrade(ms, pan, sensor, ratio)
    height, width = (length // ratio for length in ms.shape[2:])
    low = observe(ms, (height, width), gains=sensor.gains(ms.shape[1]), ratio=ratio, phase=ratio / 2)
    return low, imresize(pan, 1 / ratio)[..., : ratio * height, : ratio * width]


def _identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Name, size and time of change of a file; the name alone of anything else that GDAL opens."""
    path = Path(path)
    if not path.is_file():
        return {"file": str(path)}
    stat = path.stat()
    return {"file": path.name, "bytes": stat.st_size, "modified": stat.st_mtime}


class Hdf5Source(Source):
    """Samples of a PanCollection file: `ms` [N,C,h,w], `pan` [N,1,r*h,r*w] and perhaps `gt`.

    `lms` and `lpan` are not read: both follow from the others, and some published ones belong to other scenes. MS
    pixels lie at phase ratio / 2 unless the attribute `phase` (one number, or row and column) says otherwise; the
    attributes `sensor` and `max_value` are taken where nothing else is asked for.

    Args:
        path: the file.
        bands: numbers of the bands to use, from 1; None is all.

    Raises:
        ValueError: a data set is missing, shapes disagree, the ratio is not 2 to 8, or there is no such band.
        OSError: no such file, or no HDF5.
    """

    def __init__(self, path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> None:
        self.file = h5py.File(path, "r")
        missing = [name for name in ("ms", "pan") if name not in self.file]
        if missing:
            raise ValueError(f"data: expected data sets ms and pan, got {sorted(self.file)} in {path}")
        ms, pan = self.file["ms"].shape, self.file["pan"].shape
        if len(ms) != 4 or 0 in ms:
            raise ValueError(f"data: ms: expected [N, C, h, w], none of them 0, got {ms}")
        ratio = pan[2] // ms[2] if len(pan) == 4 and pan[2] // ms[2] in RATIOS else 4
        expected = {"pan": (ms[0], 1, ratio * ms[2], ratio * ms[3]), "gt": (*ms[:2], ratio * ms[2], ratio * ms[3])}
        self.has_gt = "gt" in self.file
        for name in ("pan", "gt") if self.has_gt else ("pan",):
            if self.file[name].shape != expected[name]:
                raise ValueError(f"data: {name}: expected {expected[name]} to fit ms, got {self.file[name].shape}")
        self.chosen = list(range(1, ms[1] + 1) if bands is None else bands)
        if not all(1 <= band <= ms[1] for band in self.chosen):
            raise ValueError(f"bands: expected numbers from 1 to {ms[1]}, got {self.chosen}")
        self.bands, self.ratio = len(self.chosen), ratio
        facts = self.file.attrs
        named, peak = facts.get("sensor"), facts.get("max_value")
        self.sensor = named.decode() if isinstance(named, bytes) else named
        self.peak = None if peak is None else float(peak)
        phase = torch.as_tensor(facts.get("phase", ratio / 2), dtype=torch.float64).reshape(-1).tolist()
        self._phase = (phase[0], phase[-1])
        self.default = ("reduced",) if self.has_gt else ("full",)
        self.facts = {"data": _identity(path), "scenes": ms[0], "pan": list(pan[2:]), "ground truth": self.has_gt}
        if bands is not None:
            self.facts["bands"] = self.chosen

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def scenes(self, protocol: str) -> list[str]:
        return [f"{index:03d}" for index in range(len(self.file["ms"]))]

    def phase(self, protocol: str) -> tuple[float, float]:
        made = protocol == "reduced" and not self.has_gt
        return (self.ratio / 2, self.ratio / 2) if made else self._phase

    def original(self, protocol: str, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        def image(name: str, bands: Sequence[int]) -> torch.Tensor:
            values = torch.from_numpy(self.file[name][index : index + 1].astype("float64"))
            return values[:, [band - 1 for band in bands]]

        return image("pan", [1]), image("ms", self.chosen), image("gt", self.chosen) if self.has_gt else None


class RasterSource(Source):
    """Crops of a PAN and an MS raster, side by side from the upper left corner; those that lack data are left out.

    A raster smaller than the crop gives one, as large as the protocol allows.

    Attributes:
        pair: the open rasters.
        first: MS row and column of the first whole MS pixel on PAN.
        start: PAN row and column at which its crop begins.

    Args:
        pan: PAN raster.
        ms: MS raster.
        crop: side of a crop in PAN pixels; None is that of the papers' scenes.
        nodata: value without data where a raster declares none.
        bands: numbers of the bands to use, from 1; None is all.

    Raises:
        ValueError, OSError: as `data.rasters.RasterPair`; also where the ratio is no whole number from 2 to 8.
    """

    default = PROTOCOLS

    def __init__(
        self,
        pan: str | os.PathLike[str],
        ms: str | os.PathLike[str],
        crop: int | None = None,
        nodata: float | None = None,
        bands: Sequence[int] | None = None,
    ) -> None:
        from ..data.rasters import RasterPair
        from ..data.sensors import sensor_in

        self.pair, self.crop = RasterPair(pan, ms, nodata=nodata, bands=bands), crop
        named = sensor_in(self.pair.ms_file, self.pair.pan_file)
        self.sensor = None if named == "default" else named
        rows, columns = self.pair.ratio
        if rows != columns or rows not in RATIOS:
            raise ValueError(f"MS: expected a ratio that is a whole number from 2 to 8, got {rows:.4g} x {columns:.4g}")
        self.ratio, self.bands = int(rows), len(self.pair.bands)
        unit = math.lcm(32, self.ratio**2)
        if crop is not None and (crop <= 0 or crop % unit):
            raise ValueError(f"crop: expected a positive multiple of {unit}, got {crop}")
        # PAN's pixels up to the first whole MS pixel, and the MS pixel that is first in a crop that starts there.
        offset = [round(phase - (self.ratio - 1) / 2) for phase in self.pair.phase]
        self.first = [math.ceil(-value / self.ratio) for value in offset]
        self.start = [value + self.ratio * first for value, first in zip(offset, self.first, strict=True)]
        self._local = tuple(phase - value for phase, value in zip(self.pair.phase, offset, strict=True))
        self.facts = {"pan": _identity(pan), "ms": _identity(ms), "crop": crop, "nodata": nodata}
        if bands is not None:
            self.facts["bands"] = list(bands)
        self._places: dict[str, list[tuple[int, int, int, int]]] = {}

    def __exit__(self, *exc: object) -> None:
        self.pair.__exit__(*exc)

    def phase(self, protocol: str) -> tuple[float, float]:
        return (self.ratio / 2, self.ratio / 2) if protocol == "reduced" else (self._local[0], self._local[1])

    def _crops(self, protocol: str) -> Iterator[tuple[int, int, int, int]]:
        # Full resolution: whole 32 x 32 blocks. Reduced: whole MS pixels after the reduction.
        unit = math.lcm(32, self.ratio) if protocol == "full" else self.ratio**2
        most = self.crop or CROP[protocol] * (self.ratio if protocol == "reduced" else 1)
        lengths = [length - start for length, start in zip(self.pair.pan_file.shape, self.start, strict=True)]
        height, width = (min(most, length) // unit * unit for length in lengths)
        if not height or not width:
            raise ValueError(
                f"PAN: expected at least {unit} x {unit} pixels, got {self.pair.height} x {self.pair.width}"
            )
        for top in range(self.start[0], self.pair.height - height + 1, height):
            for left in range(self.start[1], self.pair.width - width + 1, width):
                if all(bool(valid.all()) for _, valid in self._read(top, left, height, width)):
                    yield top, left, height, width

    def _read(self, top: int, left: int, height: int, width: int) -> list[Any]:
        """(values, validity) of PAN and of MS."""
        row, column = (
            first + (place - start) // self.ratio
            for first, place, start in zip(self.first, (top, left), self.start, strict=True)
        )
        ms = self.pair.read_ms(row, column, height // self.ratio, width // self.ratio)
        return [self.pair.read_pan(top, left, height, width), ms]

    def scenes(self, protocol: str) -> list[str]:
        if protocol not in self._places:
            self._places[protocol] = list(self._crops(protocol))
            if not self._places[protocol]:
                raise ValueError(f"PAN, MS: expected a crop without nodata for protocol {protocol}, got none")
        return [f"row {top} column {left}" for top, left, _, _ in self._places[protocol]]

    def original(self, protocol: str, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self.scenes(protocol)
        (pan, _), (ms, _) = self._read(*self._places[protocol][index])
        return torch.from_numpy(pan)[None].double(), torch.from_numpy(ms)[None].double(), None


@dataclass(frozen=True)
class Pair:
    """A pair of rasters in memory, void pixels cut off.

    Attributes:
        pan: [1, 1, r*h, r*w], float64 digital numbers.
        ms: [1, C, h, w].
        ratio: r.
        phase: PAN row and column of the first MS pixel's centre.
        sensor: of the bands.
    """

    pan: torch.Tensor
    ms: torch.Tensor
    ratio: int
    phase: tuple[float, float]
    sensor: Sensor

    @classmethod
    def read(
        cls,
        pan: str | os.PathLike[str],
        ms: str | os.PathLike[str],
        sensor: Sensor,
        nodata: float | None = None,
        bands: Sequence[int] | None = None,
    ) -> Pair:
        """The largest rectangle of whole MS pixels in which both rasters hold data; arguments as `RasterSource`.

        Raises:
            ValueError, OSError: as `RasterSource`; also where no pixel holds data in both.
        """
        source = RasterSource(pan, ms, None, nodata, bands)
        with source:
            ratio, first, start = source.ratio, source.first, source.start
            height, width = (
                (length - begin) // ratio for length, begin in zip(source.pair.pan_file.shape, start, strict=True)
            )
            values, valid = source.pair.read_ms(first[0], first[1], height, width)
            sharp, known = source.pair.read_pan(start[0], start[1], ratio * height, ratio * width)
            phase = source.phase("full")
        whole = known.reshape(height, ratio, width, ratio).all((1, 3))
        top, left, height, width = largest_rectangle(np.logical_and(valid.all(0), whole))
        if not height:
            raise ValueError("PAN, MS: expected a pixel that holds data in both, got none")
        part = values[:, top : top + height, left : left + width]
        fine = sharp[:, ratio * top : ratio * (top + height), ratio * left : ratio * (left + width)]
        images = [torch.from_numpy(np.ascontiguousarray(image))[None].double() for image in (fine, part)]
        return cls(images[0], images[1], ratio, phase, sensor)

    def full(self) -> Scene:
        """The pair as it is."""
        return Scene(self.pan, self.ms, None, self.ratio, self.phase, self.sensor)

    def reduced(self) -> Scene:
        """Both reduced by Wald's protocol, MS the ground truth."""
        height, width = (length // self.ratio * self.ratio for length in self.ms.shape[2:])
        gt, pan = self.ms[..., :height, :width], self.pan[..., : self.ratio * height, : self.ratio * width]
        low, small = reduce(gt, pan, self.sensor, self.ratio)
        return Scene(small, low, gt, self.ratio, (self.ratio / 2, self.ratio / 2), self.sensor)


def largest_rectangle(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest rectangle of True in [H, W], the first of equal ones."""
    best = (0, 0, 0, 0)
    heights = np.zeros(mask.shape[1] + 1, int)
    for bottom, row in enumerate(mask, 1):
        heights[:-1] = np.where(row, heights[:-1] + 1, 0)
        open_at: list[tuple[int, int]] = []  # (first column, height), heights rising
        for column, height in enumerate(heights.tolist()):
            first = column
            while open_at and open_at[-1][1] >= height:
                first, tall = open_at.pop()
                if tall * (column - first) > best[2] * best[3]:
                    best = (bottom - tall, first, tall, column - first)
            open_at.append((first, height))
    return best
