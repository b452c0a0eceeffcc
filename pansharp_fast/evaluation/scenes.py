"""Where scenes come from: a PanCollection HDF5 file, or crops of a pair of rasters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import torch

from ..data import Sensor, degrade, shift
from ..data.grid import RATIO

PROTOCOLS = ("reduced", "full")

#: Sides of PAN to which a raster pair is cropped: the papers' 256 after a reduction by 4, and 512.
CROP = {"reduced": 1024, "full": 512}


@dataclass(frozen=True)
class Scene:
    """Input of the methods and ground truth, float64 digital numbers: pan [1,1,4h,4w], ms [1,C,h,w], gt [1,C,4h,4w]."""

    pan: torch.Tensor
    ms: torch.Tensor
    gt: torch.Tensor | None


class Source(AbstractContextManager["Source"]):
    """Scenes by number, `bands` MS bands each.

    Attributes:
        facts: what identifies the data, for the report and to recognise an interrupted run.
        default: the protocols that suit the data.
    """

    bands: int
    facts: dict[str, Any]
    default: tuple[str, ...]

    def scenes(self, protocol: str) -> list[str]:
        """Names of the scenes under `protocol`, in order."""
        raise NotImplementedError

    def original(self, protocol: str, index: int) -> Scene:
        """The stored scene; without `gt` where the ground truth is to be made by reducing the pair."""
        raise NotImplementedError

    def read(self, protocol: str, index: int, sensor: Sensor, by: tuple[float, float] = (0, 0)) -> Scene:
        """Scene `index` as the methods see it, with PAN's content moved by (rows, columns) of its pixels.

        Under "reduced" a pair without ground truth is degraded by the Wald protocol; PAN is moved before that.
        """
        scene = self.original(protocol, index)
        simulated = protocol == "reduced" and scene.gt is None
        unit = RATIO if simulated else 1
        pan = shift(scene.pan, unit * by[0], unit * by[1]) if any(by) else scene.pan
        if simulated:
            ms, pan = degrade(scene.ms, pan, sensor, RATIO)
            return Scene(pan, ms, scene.ms)
        return Scene(pan, scene.ms, scene.gt if protocol == "reduced" else None)


def _identity(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Name, size and time of change of a file; the name alone of anything else that GDAL opens."""
    path = Path(path)
    if not path.is_file():
        return {"file": str(path)}
    stat = path.stat()
    return {"file": path.name, "bytes": stat.st_size, "modified": stat.st_mtime}


class Hdf5Source(Source):
    """Samples of a PanCollection file: `ms` [N,C,h,w], `pan` [N,1,4h,4w] and perhaps `gt`.

    `lms` and `lpan` are not read: both follow from the others, and some published ones belong to other scenes.

    Raises:
        ValueError: a data set is missing, shapes disagree, or the ratio is not 4.
        OSError: no such file, or no HDF5.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = h5py.File(path, "r")
        missing = [name for name in ("ms", "pan") if name not in self.file]
        if missing:
            raise ValueError(f"data: expected data sets ms and pan, got {sorted(self.file)} in {path}")
        ms, pan = self.file["ms"].shape, self.file["pan"].shape
        if len(ms) != 4 or 0 in ms:
            raise ValueError(f"data: ms: expected [N, C, h, w], none of them 0, got {ms}")
        expected = {"pan": (ms[0], 1, RATIO * ms[2], RATIO * ms[3]), "gt": (*ms[:2], RATIO * ms[2], RATIO * ms[3])}
        self.has_gt = "gt" in self.file
        for name in ("pan", "gt") if self.has_gt else ("pan",):
            if self.file[name].shape != expected[name]:
                raise ValueError(f"data: {name}: expected {expected[name]} to fit ms, got {self.file[name].shape}")
        self.bands = ms[1]
        self.default = ("reduced",) if self.has_gt else ("full",)
        self.facts = {"data": _identity(path), "scenes": ms[0], "pan": list(pan[2:]), "ground truth": self.has_gt}

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def scenes(self, protocol: str) -> list[str]:
        return [f"{index:03d}" for index in range(len(self.file["ms"]))]

    def original(self, protocol: str, index: int) -> Scene:
        def image(name: str) -> torch.Tensor:
            return torch.from_numpy(self.file[name][index : index + 1].astype("float64"))

        return Scene(image("pan"), image("ms"), image("gt") if self.has_gt else None)


class RasterSource(Source):
    """Crops of a PAN and an MS raster, side by side from the upper left corner; those that lack data are left out.

    A raster smaller than the crop gives one, as large as the protocol allows.

    Raises:
        ValueError, OSError: as `inference.scenes.Scene`.
    """

    default = PROTOCOLS

    def __init__(
        self,
        pan: str | os.PathLike[str],
        ms: str | os.PathLike[str],
        crop: int | None = None,
        nodata: float | None = None,
    ) -> None:
        from ..inference.scenes import Scene as Pair

        if crop is not None and (crop <= 0 or crop % 128):
            raise ValueError(f"crop: expected a positive multiple of 128, got {crop}")
        self.pair, self.crop = Pair(pan, ms, nodata=nodata), crop
        self.bands = len(self.pair.bands)
        self.facts = {"pan": _identity(pan), "ms": _identity(ms), "crop": crop, "nodata": nodata}
        self._places: dict[str, list[tuple[str, Any, Any]]] = {}

    def __exit__(self, *exc: object) -> None:
        self.pair.__exit__(*exc)

    def _crops(self, protocol: str) -> Iterator[tuple[str, Any, Any]]:
        from ..inference.tiles import Span

        # Full resolution: whole 32 x 32 blocks. Reduced: whole MS pixels after the reduction.
        unit = 32 if protocol == "full" else RATIO * RATIO
        side = [
            min(self.crop or CROP[protocol], length // unit * unit) for length in (self.pair.height, self.pair.width)
        ]
        if not all(side):
            raise ValueError(
                f"PAN: expected at least {unit} x {unit} pixels, got {self.pair.height} x {self.pair.width}"
            )
        for top in range(0, self.pair.height - side[0] + 1, side[0]):
            for left in range(0, self.pair.width - side[1] + 1, side[1]):
                row, column = (
                    Span(start, start + length, start, start + length, 0, 0)
                    for start, length in zip((top, left), side, strict=True)
                )
                tile = self.pair.read(row, column)
                if tile is not None and bool(tile[2].all()):
                    yield f"row {top} column {left}", row, column

    def scenes(self, protocol: str) -> list[str]:
        if protocol not in self._places:
            self._places[protocol] = list(self._crops(protocol))
            if not self._places[protocol]:
                raise ValueError(f"PAN, MS: expected a crop without nodata for protocol {protocol}, got none")
        return [name for name, _, _ in self._places[protocol]]

    def original(self, protocol: str, index: int) -> Scene:
        self.scenes(protocol)
        tile = self.pair.read(*self._places[protocol][index][1:])
        if tile is None:
            raise ValueError(f"PAN, MS: expected data in crop {index}, got none")
        return Scene(tile[0].double(), tile[1].double(), None)
