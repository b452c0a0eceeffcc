"""The teacher's knowledge of a training set, sampled once and kept in an HDF5 file."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data.hdf5 import PanCollection
from ..diffusion import sample
from ..files import atomic
from ..models import FSATeacher

_VERSION = 1
#: Samples that the fingerprint reads in full.
_PROBES = 16


def fingerprint(data: PanCollection) -> str:
    """Digest of a data set: its size, its peak and up to 16 samples spread over it."""
    digest = hashlib.sha256(f"{len(data)} {data.bands} {data.size} {data.peak}".encode())
    for index in np.unique(np.linspace(0, len(data) - 1, _PROBES).astype(int)):
        for name, image in sorted(data[int(index)].items()):
            if name in ("gt", "ms", "pan"):
                digest.update(image.numpy().tobytes())
    return digest.hexdigest()


def teacher_digest(teacher: FSATeacher) -> str:
    """Digest of a teacher's weights and configuration."""
    digest = hashlib.sha256(repr(sorted(teacher.config.to_dict().items())).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


class TeacherKnowledge(Dataset[dict[str, Tensor]]):
    """Samples of `data` with the teacher's view of them, read lazily.

    Adds `teacher_out` and `teacher_variance` [C, H, W] and `teacher_feature1`, ... (the maps that distillation
    compares), float32 whatever the file holds.

    Args:
        data: with `gt` and `lms`; must be the set that the file was made from.
        path: file made by `make_knowledge`.
        teacher: must be the one that the file was made with.
        released: the file must have been made by the release's sampling (True) or by ours.

    Raises:
        ValueError: the file belongs to another data set, teacher or way of sampling.
        OSError: the file cannot be read as HDF5.
    """

    def __init__(self, data: PanCollection, path: str | os.PathLike[str], teacher: FSATeacher, released: bool) -> None:
        self.data, self.path = data, Path(path)
        self._file: tuple[int, h5py.File] | None = None
        facts = dict(self._open().attrs)
        if facts.get("version") != _VERSION:
            raise ValueError(f"{path}: expected teacher knowledge of this package, got another HDF5 file")
        expected = {"data": fingerprint(data), "teacher": teacher_digest(teacher), "released": released}
        what = {"data": f"made from {data.path}", "teacher": "made by this teacher", "released": f"released={released}"}
        for name, value in expected.items():
            if facts[name] != value:
                raise ValueError(f"{path}: expected teacher knowledge {what[name]}, got another fingerprint ({name})")

    def _open(self) -> h5py.File:
        if self._file is None or self._file[0] != os.getpid():  # a forked worker must not share its parent's handle
            self._file = (os.getpid(), h5py.File(self.path, "r"))
        return self._file[1]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        file = self._open()
        added = {f"teacher_{name}": torch.from_numpy(file[name][index].astype(np.float32)) for name in file}
        return self.data[index] | added


def make_knowledge(
    data: PanCollection,
    path: str | os.PathLike[str],
    teacher: FSATeacher,
    *,
    released: bool,
    steps: int = 25,
    float16: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """Sample the teacher over `data` and write what distillation needs; the file appears when it is complete.

    Args:
        data: with `lms`.
        teacher: in evaluation mode, on the device that samples.
        released: see `diffusion.sample`.
        steps: of DDIM.
        float16: store half precision.
        seed: of the noise; the noise of a sample depends on its index alone.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    device = next(teacher.parameters()).device
    with atomic(path) as part, h5py.File(part, "w") as file:
        for first in range(0, len(data), batch_size):
            samples = [data[index] for index in range(first, min(first + batch_size, len(data)))]
            lms, pan = (torch.stack([each[name] for each in samples]).to(device) for name in ("lms", "pan"))
            noise = torch.stack(
                [
                    torch.from_numpy(
                        np.random.default_rng([seed, first + i]).standard_normal(lms.shape[1:], np.float32)
                    )
                    for i in range(len(samples))
                ]
            )
            result = sample(
                teacher,
                teacher.condition(lms, pan),
                steps=steps,
                noise=noise.to(device),
                released=released,
                return_features=True,
            )
            assert result.variance is not None
            assert result.features is not None
            arrays = {"out": result.residual, "variance": result.variance}
            arrays |= {f"feature{i}": feature for i, feature in enumerate(result.features[1:], 1)}
            for name, array in arrays.items():
                if first == 0:
                    kind = np.float16 if float16 else np.float32
                    file.create_dataset(
                        name, (len(data), *array.shape[1:]), kind, chunks=(1, *array.shape[1:]), shuffle=True
                    )
                file[name][first : first + len(samples)] = array.float().cpu().numpy()
        file.attrs.update(
            {
                "version": _VERSION,
                "data": fingerprint(data),
                "teacher": teacher_digest(teacher),
                "released": released,
                "steps": steps,
                "seed": seed,
            }
        )


def wait_for(path: str | os.PathLike[str]) -> None:
    """Return once another process of the same job has written `path`."""
    while not Path(path).exists():
        time.sleep(0.5)
