"""PanCollection HDF5 files as a data set, read lazily."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from .grid import RATIO
from .resample import interp23, lpan
from .sensors import Sensor, get_sensor

#: Bytes of unpacked chunks that a process keeps for one file.
_CACHE = 512 << 20
#: Bytes of one sample's largest image; a small file may claim any size.
_LARGEST_SAMPLE = 1 << 30
_LPAN_CORRELATION = 0.9  # files of other scenes have about 0, right ones above .97


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Turns what h5py raises over a damaged file into one kind of error.

    Raises:
        OSError: the block failed for the file's sake.
    """
    try:
        yield
    except (AttributeError, KeyError, MemoryError, OSError, OverflowError, RuntimeError, TypeError) as error:
        raise OSError(f"{path}: expected a readable HDF5 file, got a damaged or other one ({error})") from error


def _packed(file: h5py.File) -> dict[str, tuple[int, int]]:
    """Data sets of several samples a packed chunk -> (bytes of them all unpacked, number of chunks).

    A sample of those costs a whole chunk, unless the chunk is still there.
    """
    packed = {}
    for name in ("ms", "pan", "gt", "lpan"):
        data = file.get(name)
        if not (isinstance(data, h5py.Dataset) and data.chunks and data.chunks[0] > 1):
            continue
        if data.id.get_create_plist().get_nfilters() > 0:
            count = math.prod(-(-length // part) for length, part in zip(data.shape, data.chunks, strict=True))
            packed[name] = (count * math.prod(data.chunks) * data.dtype.itemsize, count)
    return packed


class PanCollection(Dataset[dict[str, torch.Tensor]]):
    """Samples of one PanCollection file: `ms` [N, C, h, w], `pan` [N, 1, 4h, 4w] and, where the file has it, `gt`.

    A sample is a dictionary of float32 tensors, each value divided by the peak and neither rounded nor clipped: `ms`
    [C, h, w], `pan` [1, 4h, 4w], `lpan` [1, h, w] (PAN on the MS grid), `gt` [C, 4h, 4w] where there is one and,
    with `lms`, `lms` [C, 4h, 4w]. `lpan` and `lms` are made here (`data.lpan`, `data.interp23`), not read: published
    `lpan` files of two test sets belong to other scenes.

    Samples come fast in any order where a chunk of the file holds one, or is not packed. Files with several samples a
    packed chunk are kept unpacked in memory up to 512 MiB; larger ones warn, with the line that repacks them.

    Args:
        path: the HDF5 file; it stays on disk and is opened once in each process.
        sensor: name or `Sensor`; gives the peak. Nothing is guessed from the path or the values.
        peak: largest digital number, over the sensor's own.
        lpan_file: file with a data set `lpan` [N, 1, h, w] to be used instead; checked against `pan` on opening.
        lms: add the 23-tap interpolation of `ms`.

    Raises:
        ValueError: neither sensor nor peak is given, a data set is missing, shapes disagree, the file's attributes
            name another ratio than 4 or phase than 2, or `lpan_file` shows other scenes than `pan`.
        OSError: a file cannot be read as HDF5.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sensor: str | Sensor | None = None,
        peak: float | None = None,
        lpan_file: str | os.PathLike[str] | None = None,
        lms: bool = False,
    ) -> None:
        if peak is None:
            if sensor is None:
                raise ValueError("peak: expected a number, or a sensor that has one, got neither")
            peak = get_sensor(sensor).peak
        if not peak > 0:
            raise ValueError(f"peak: expected a number above 0, got {peak}")
        self.path, self.peak, self.lms = Path(path), float(peak), lms
        self.lpan_path = None if lpan_file is None else Path(lpan_file)
        self._files: dict[Path, tuple[int, h5py.File]] = {}
        self._sets: dict[tuple[Path, str], h5py.Dataset] = {}  # unpacked chunks live as long as these
        with _reading(path):
            file = self._open(self.path)
            names = sorted(file)
            shapes = {name: file[name].shape for name in ("ms", "pan", "gt") if name in names}
            grid = [float(file.attrs.get(name, usual)) for name, usual in (("ratio", RATIO), ("phase", RATIO / 2))]
        missing = [name for name in ("ms", "pan") if name not in names]
        if missing:
            raise ValueError(f"{path}: expected data sets ms and pan, got {names} (missing {', '.join(missing)})")
        ms, pan = shapes["ms"], shapes["pan"]
        if len(ms) != 4 or ms[0] == 0:
            raise ValueError(f"{path}: ms: expected [N, C, h, w] with N > 0, got {ms}")
        if 0 in ms or 16 * 8 * math.prod(ms[1:]) > _LARGEST_SAMPLE:
            raise ValueError(f"{path}: ms: expected samples of at least one pixel and at most 1 GiB, got {ms}")
        if grid != [RATIO, RATIO / 2]:
            raise ValueError(
                f"{path}: expected ratio {RATIO} and phase {RATIO / 2:g}, which networks are trained at, got ratio "
                f"{grid[0]:g} and phase {grid[1]:g}"
            )
        self.has_gt = "gt" in shapes
        self._expect(path, "pan", pan, (ms[0], 1, 4 * ms[2], 4 * ms[3]))
        if self.has_gt:
            self._expect(path, "gt", shapes["gt"], (*ms[:2], 4 * ms[2], 4 * ms[3]))
        self.bands: int = ms[1]
        self.size: tuple[int, int] = (4 * ms[2], 4 * ms[3])
        self._length: int = ms[0]
        if self.lpan_path is not None:
            given = self._open(self.lpan_path)
            if "lpan" not in given:
                raise ValueError(f"{lpan_file}: expected data set lpan, got {sorted(given)}")
            self._expect(lpan_file, "lpan", given["lpan"].shape, (ms[0], 1, *ms[2:]))
            self._check_lpan()

    @staticmethod
    def _expect(path: Any, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if tuple(got) != expected:
            raise ValueError(f"{path}: {name}: expected {expected} to fit ms, got {tuple(got)}")

    def _open(self, path: Path) -> h5py.File:
        pid, file = self._files.get(path, (0, None))
        if pid != os.getpid():  # a forked worker must not share its parent's handle
            file = h5py.File(path, "r")
            packed = _packed(file)
            if packed and sum(size for size, _ in packed.values()) <= _CACHE:
                sizes, counts = zip(*packed.values(), strict=True)
                file.close()
                file = h5py.File(path, "r", rdcc_nbytes=max(sizes), rdcc_nslots=10 * max(counts) + 1)
            elif packed and path not in self._files:
                chunks = " ".join(
                    f"-l {name}:CHUNK=1x{'x'.join(str(length) for length in file[name].shape[1:])}" for name in packed
                )
                warnings.warn(
                    f"{path}: expected one sample a packed chunk, got {file[next(iter(packed))].chunks[0]}, "
                    f"which makes reading in random order slow; repack it with: h5repack {chunks} {path} OUT.h5",
                    stacklevel=4,
                )
            self._files[path] = (os.getpid(), file)
            self._sets = {key: data for key, data in self._sets.items() if key[0] != path}
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}, "_sets": {}}

    def _read(self, name: str, index: int, path: Path | None = None) -> torch.Tensor:
        path = path or self.path
        with _reading(path):
            file = self._open(path)
            if (path, name) not in self._sets:
                self._sets[path, name] = file[name]
            values = np.asarray(self._sets[path, name][index], dtype=np.float64)
        return torch.from_numpy((values / self.peak).astype(np.float32))

    def _check_lpan(self) -> None:
        """Compare a few samples of the given `lpan` with what `pan` says."""
        for index in np.unique(np.linspace(0, len(self) - 1, 8).astype(int)):
            made = lpan(self._read("pan", index)[None])[0]
            given = self._read("lpan", index, self.lpan_path)
            correlation = float(torch.corrcoef(torch.stack([made.flatten(), given.flatten()]))[0, 1])
            if not correlation > _LPAN_CORRELATION:  # a flat image gives NaN
                raise ValueError(
                    f"{self.lpan_path}: sample {index}: expected the PAN of {self.path.name} (correlation above "
                    f"{_LPAN_CORRELATION}), got correlation {correlation:.3f}"
                )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected {-len(self)} to {len(self) - 1}, got {index}")
        index %= len(self)
        sample = {"ms": self._read("ms", index), "pan": self._read("pan", index)}
        if self.lpan_path is not None:
            sample["lpan"] = self._read("lpan", index, self.lpan_path)
        else:
            sample["lpan"] = lpan(sample["pan"][None])[0]
        if self.has_gt:
            sample["gt"] = self._read("gt", index)
        if self.lms:
            sample["lms"] = interp23(sample["ms"][None])[0]
        return sample


def flip_rotate(
    sample: dict[str, torch.Tensor], flip_y: bool, flip_x: bool, transpose: bool
) -> dict[str, torch.Tensor]:
    """One of the eight orientations of a sample, with MS pixel k still at PAN index 4k + 2.

    Mirroring alone would move MS pixels to index 4k + 1. So a mirrored axis leaves out the three PAN pixels that now
    come first and the one that comes last, and the MS pixel with them; an axis that is not mirrored loses its last MS
    pixel, so that every orientation has the same size: [C, h, w] becomes [C, h-1, w-1], [C, 4h, 4w] becomes
    [C, 4h-4, 4w-4].

    Args:
        sample: tensors [C, h, w] (keys `ms`, `lpan`) and [C, 4h, 4w] (any other key).
    """
    out = {}
    for name, image in sample.items():
        low = name in ("ms", "lpan")
        unit = 1 if low else 4
        for dim, flip in ((-2, flip_y), (-1, flip_x)):
            length = image.shape[dim] - unit
            if flip:
                image = image.flip(dim).narrow(dim, 1 if low else 3, length)
            else:
                image = image.narrow(dim, 0, length)
        out[name] = (image.transpose(-2, -1) if transpose else image).contiguous()
    return out


class Samples(Protocol):
    """What `Epochs` reads from: `PanCollection`, or one that adds tensors to its samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


class Epochs(Dataset[dict[str, torch.Tensor]]):
    """`data` over several epochs; an index is (epoch, index in data).

    With `augment` a sample comes in a random orientation (`flip_rotate`) that follows from seed, epoch and index.
    """

    def __init__(self, data: Samples, seed: int, augment: bool) -> None:
        self.data, self.seed, self.augment = data, seed, augment

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, torch.Tensor]:
        sample = self.data[index[1]]
        if not self.augment:
            return sample
        bits = int(np.random.default_rng([self.seed, *index]).integers(8))
        return flip_rotate(sample, bool(bits & 1), bool(bits & 2), bool(bits & 4))
