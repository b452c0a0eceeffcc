"""Files of samples: what is written is read back; damaged ones are read, or refused in one line."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pansharp_fast.data import get_sensor
from pansharp_fast.data.hdf5 import PanCollection
from pansharp_fast.data.simulate import write_pancollection

from .mutations import damaged, fuzz_settings, kept, survives


def samples(count: int, bands: int, side: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"gt": (bands, 4 * side, 4 * side), "ms": (bands, side, side), "lms": (bands, 4 * side, 4 * side)}
    shapes["pan"] = (1, 4 * side, 4 * side)
    return [
        {name: rng.uniform(0, 2047, shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(count)
    ]


@functools.cache
def good() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.h5"
        write_pancollection(path, samples(2, 4, 4, 0), get_sensor("QB"))
        return path.read_bytes()


def read(path: Path) -> None:
    data = PanCollection(path, sensor="QB")
    for index in (0, len(data) - 1):
        for image in data[index].values():
            assert image.ndim == 3


@fuzz_settings
@given(count=st.integers(1, 4), bands=st.sampled_from([3, 4, 8]), side=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_what_is_written_is_read(tmp_path, count, bands, side, seed):
    written = samples(count, bands, side, seed)
    write_pancollection(tmp_path / "a.h5", written, get_sensor("QB"))
    data = PanCollection(tmp_path / "a.h5", sensor="QB")
    assert (len(data), data.bands, data.size) == (count, bands, (4 * side, 4 * side))
    for index, sample in enumerate(written):
        for name in ("gt", "ms", "pan"):
            np.testing.assert_array_equal(data[index][name].numpy(), (sample[name] / 2047.0).astype(np.float32))


@fuzz_settings
@given(content=damaged(good(), (b"HDF", b"TREE", b"HEAP", b"SNOD", b"ms\0")))
def test_damaged_files(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    survives(lambda: read(tmp_path / "a.h5"), OSError, ValueError)


@pytest.mark.parametrize("content", kept("samples.h5"))
def test_kept(tmp_path, content):
    (tmp_path / "a.h5").write_bytes(content)
    survives(lambda: read(tmp_path / "a.h5"), OSError, ValueError)
