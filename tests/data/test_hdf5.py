"""PanCollection files: lazy reading, options, refusals, orientations that keep the phase."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from pansharp_fast.data import hdf5
from pansharp_fast.data.hdf5 import Epochs, PanCollection, flip_rotate
from pansharp_fast.data.resample import interp23, lpan


def write(path, with_gt=True, n=3, bands=4, h=4, w=5, **changes):
    rng = np.random.default_rng(1)
    arrays = {
        "ms": rng.uniform(-200.5, 2300.5, (n, bands, h, w)),
        "pan": rng.uniform(0, 2047, (n, 1, 4 * h, 4 * w)).astype(np.float32),
    }
    if with_gt:
        arrays["gt"] = rng.integers(0, 2048, (n, bands, 4 * h, 4 * w)).astype(np.uint16)
    arrays |= changes
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                file[name] = values
    return arrays


def test_values_are_shares_of_the_peak_unrounded_and_unclipped(tmp_path):
    arrays = write(tmp_path / "a.h5")
    data = PanCollection(tmp_path / "a.h5", sensor="QB", lms=True)
    assert len(data) == 3
    assert (data.bands, data.size) == (4, (16, 20))
    sample = data[1]
    assert set(sample) == {"ms", "pan", "lpan", "gt", "lms"}
    assert all(image.dtype == torch.float32 for image in sample.values())
    np.testing.assert_allclose(sample["ms"].numpy() * 2047, arrays["ms"][1], rtol=1e-6, atol=1e-3)
    assert sample["ms"].min() < 0
    assert sample["ms"].max() > 1
    torch.testing.assert_close(sample["lpan"], lpan(sample["pan"][None])[0])
    torch.testing.assert_close(sample["lms"], interp23(sample["ms"][None])[0])
    np.testing.assert_allclose(sample["gt"].numpy() * 2047, arrays["gt"][1], rtol=1e-6)


def test_peak_and_sensor_are_explicit(tmp_path):
    write(tmp_path / "gf2.h5")
    with pytest.raises(ValueError, match="peak: expected a number, or a sensor"):
        PanCollection(tmp_path / "gf2.h5")
    with pytest.raises(ValueError, match="sensor: expected one of"):
        PanCollection(tmp_path / "gf2.h5", sensor="nowhere")
    with pytest.raises(ValueError, match="peak: expected a number above 0"):
        PanCollection(tmp_path / "gf2.h5", peak=0)
    of_peak = PanCollection(tmp_path / "gf2.h5", sensor="QB", peak=1023)[0]["pan"]
    torch.testing.assert_close(of_peak, PanCollection(tmp_path / "gf2.h5", sensor="GF2")[0]["pan"])


def test_without_gt(tmp_path):
    write(tmp_path / "fr.h5", with_gt=False)
    data = PanCollection(tmp_path / "fr.h5", sensor="WV3", peak=2047)
    assert not data.has_gt
    assert "gt" not in data[0]


def test_given_lpan_is_used_on_request_and_must_belong_to_pan(tmp_path):
    smooth = np.cumsum(np.random.default_rng(0).normal(size=(3, 1, 32, 40)), axis=-1)
    arrays = write(tmp_path / "a.h5", h=8, w=10, pan=(smooth * 50 + 900).astype(np.float32))
    made = lpan(torch.from_numpy(arrays["pan"])).numpy()
    with h5py.File(tmp_path / "right.h5", "w") as file:
        file["lpan"] = made * 1.01 + 0.3
    with h5py.File(tmp_path / "wrong.h5", "w") as file:
        file["lpan"] = made[::-1].copy()
    with h5py.File(tmp_path / "shape.h5", "w") as file:
        file["lpan"] = made[:, :, 1:]
    given = PanCollection(tmp_path / "a.h5", peak=2047, lpan_file=tmp_path / "right.h5")[2]["lpan"]
    np.testing.assert_allclose(given.numpy() * 2047, made[2] * 1.01 + 0.3, rtol=1e-5)
    with pytest.raises(ValueError, match=r"sample \d: expected the PAN of a.h5 .* got correlation"):
        PanCollection(tmp_path / "a.h5", peak=2047, lpan_file=tmp_path / "wrong.h5")
    with pytest.raises(ValueError, match="lpan: expected"):
        PanCollection(tmp_path / "a.h5", peak=2047, lpan_file=tmp_path / "shape.h5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ms": None}, "expected data sets ms and pan, got .*missing ms"),
        ({"pan": np.zeros((3, 1, 16, 24))}, "pan: expected .* to fit ms"),
        ({"gt": np.zeros((3, 3, 16, 20))}, "gt: expected .* to fit ms"),
        ({"ms": np.zeros((4, 4, 5))}, r"ms: expected \[N, C, h, w\]"),
    ],
)
def test_refused_files(tmp_path, changes, message):
    write(tmp_path / "bad.h5", **changes)
    with pytest.raises(ValueError, match=message):
        PanCollection(tmp_path / "bad.h5", peak=2047)


def test_not_hdf5(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"no image at all")
    with pytest.raises(OSError, match="open"):
        PanCollection(tmp_path / "x.h5", peak=2047)


def test_pickles_without_open_files_and_checks_indices(tmp_path):
    write(tmp_path / "a.h5")
    data = PanCollection(tmp_path / "a.h5", peak=2047)
    torch.testing.assert_close(pickle.loads(pickle.dumps(data))[0]["pan"], data[0]["pan"])
    with pytest.raises(IndexError, match="expected -3 to 2, got 3"):
        data[3]
    with pytest.raises(IndexError, match="expected -3 to 2, got -4"):
        data[-4]
    for index in (-1, -3, np.int64(-2)):
        assert torch.equal(data[index]["pan"], data[3 + int(index)]["pan"])


def packed(path, samples=20, chunk=5, **options):
    arrays = write(path, n=samples)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, chunks=(chunk, *values.shape[1:]), **options)


def test_packed_chunks_are_unpacked_once(tmp_path, recwarn):
    """Once read, a file is not needed again: its chunks are in memory."""
    packed(tmp_path / "a.h5", compression="gzip")
    write(tmp_path / "plain.h5", n=20)
    data, plain = (PanCollection(tmp_path / name, peak=2047) for name in ("a.h5", "plain.h5"))
    order = np.random.default_rng(0).permutation(20)
    for number in range(2):
        for index in order:
            for name, image in plain[index].items():
                assert torch.equal(data[index][name], image)
        if number == 0:
            with open(tmp_path / "a.h5", "r+b") as file:
                file.write(bytes((tmp_path / "a.h5").stat().st_size))
    assert not recwarn


def test_large_packed_chunks_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "_CACHE", 1000)
    packed(tmp_path / "a.h5", compression="gzip")
    with pytest.warns(UserWarning, match="one sample a packed chunk, got 5") as caught:
        PanCollection(tmp_path / "a.h5", peak=2047)[3]
    assert len(caught) == 1
    line = str(caught[0].message)
    assert "h5repack -l ms:CHUNK=1x4x4x5 -l pan:CHUNK=1x1x16x20 -l gt:CHUNK=1x4x16x20" in line


@pytest.mark.parametrize("options", [{}, {"chunk": 1, "compression": "gzip"}])
def test_other_chunks_need_no_cache(tmp_path, monkeypatch, recwarn, options):
    monkeypatch.setattr(hdf5, "_CACHE", 0)
    packed(tmp_path / "a.h5", **options)
    PanCollection(tmp_path / "a.h5", peak=2047)[3]
    assert not recwarn


@pytest.mark.parametrize("shape", [(2, 4, 50_000, 50_000), (2, 4, 0, 5)])
def test_absurd_sizes_are_refused(tmp_path, shape):
    with h5py.File(tmp_path / "a.h5", "w") as file:  # nothing is written: a file of a few KB
        file.create_dataset("ms", shape, chunks=(1, 1, 64, 64) if 0 not in shape else None)
        big = (2, 1, 4 * shape[2], 4 * shape[3])
        file.create_dataset("pan", big, chunks=(1, 1, 64, 64) if 0 not in shape else None)
    with pytest.raises(ValueError, match="ms: expected samples of at least one pixel and at most 1 GiB"):
        PanCollection(tmp_path / "a.h5", peak=2047)


@pytest.mark.parametrize("bits", range(8))
def test_orientations_keep_the_phase(bits):
    """MS pixels that *are* PAN pixels 4k + 2 must still be so after flips and transposition."""
    pan = torch.randn(1, 24, 32)
    ms = pan[:, 2::4, 2::4].clone()
    out = flip_rotate({"pan": pan, "ms": ms}, bool(bits & 1), bool(bits & 2), bool(bits & 4))
    torch.testing.assert_close(out["pan"][:, 2::4, 2::4], out["ms"], rtol=0, atol=0)
    assert sorted(out["ms"].shape[1:]) == [5, 7]
    if bits == 0:
        torch.testing.assert_close(out["pan"], pan[:, :20, :28])
    if bits == 1:
        torch.testing.assert_close(out["pan"], pan.flip(1)[:, 3:23, :28])
    if bits == 4:
        torch.testing.assert_close(out["pan"], pan[:, :20, :28].transpose(1, 2))


def test_orientation_follows_from_seed_epoch_and_index(tmp_path):
    write(tmp_path / "a.h5", h=6, w=6)
    data = PanCollection(tmp_path / "a.h5", peak=2047)
    first, second = Epochs(data, 7, True), Epochs(data, 7, True)
    seen = set()
    for epoch in range(40):
        a, b = first[epoch, 1], second[epoch, 1]
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert a["gt"].shape == (4, 20, 20)
        seen.add(tuple(a["gt"][0, 0, :2].tolist()))  # the corner and the direction in which it is read
    assert len(seen) == 8  # every orientation occurs
    assert torch.equal(Epochs(data, 7, False)[3, 1]["gt"], data[1]["gt"])


def test_published_files(shared):
    """Real files: unrounded values, overshoot in lms, lpan recipe within a few DN of the files beside."""
    folder = shared / "data"
    for name, sensor, bands in (("QB/train_qb", "QB", 4), ("GF2/gf2_fr_256", "GF2", 4), ("WV3/wv3_rr_256", "WV3", 8)):
        path = folder / f"{name}.h5"
        if not path.exists():
            pytest.skip(f"{path} is absent")
        data = PanCollection(path, sensor=sensor, lpan_file=folder / f"{name}_pan.h5", lms=True)
        assert data.bands == bands
        sample, made = data[0], PanCollection(path, sensor=sensor)[0]
        assert float((sample["lpan"] - made["lpan"]).abs().max()) * data.peak < 0.01
        with h5py.File(path) as file:
            stored = torch.from_numpy(file["lms"][0].astype(np.float64))
        assert float((sample["lms"] * data.peak - stored).abs().max()) < 0.05
