"""GeoTIFF pairs to training patches by Wald's protocol."""

import h5py
import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from click.testing import CliRunner
from rasterio.enums import ColorInterp
from scipy import ndimage

from pansharp_fast.cli import main
from pansharp_fast.data.hdf5 import PanCollection
from pansharp_fast.data.mtf import decimate, mtf_filter
from pansharp_fast.data.observation import move
from pansharp_fast.data.registration import Registration, measure
from pansharp_fast.data.resample import imresize, interp23
from pansharp_fast.data.simulate import patches, read_pair, simulate, simulate_pair

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write(path, image, nodata=None, names=(), **options):
    profile = {"driver": "GTiff", "count": image.shape[0], "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", dtype=image.dtype.name, nodata=nodata, **profile, **options) as file:
        file.write(image)
        for index, name in enumerate(names, 1):
            file.set_band_description(index, name)


@pytest.fixture
def scene(tmp_path):
    rng = np.random.default_rng(3)
    ms = rng.integers(1, 2048, (4, 66, 82)).astype(np.uint16)
    pan = rng.integers(1, 2048, (1, 264, 328)).astype(np.uint16)
    write(tmp_path / "ms.tif", ms, names=("blue", "green", "red", "nir"))
    write(tmp_path / "pan.tif", pan)
    return tmp_path, pan, ms


def test_protocol(scene):
    folder, pan, ms = scene
    pair = read_pair(folder / "pan.tif", folder / "ms.tif")
    assert pair.band_names == ("blue", "green", "red", "nir")
    images = simulate_pair(pair, "QB")
    gt = torch.from_numpy(ms[:, :64, :80].astype(np.float64))[None]
    expected = decimate(mtf_filter(gt, "QB"))
    np.testing.assert_allclose(images["ms"], expected[0].numpy(), rtol=1e-5)
    reduced = imresize(torch.from_numpy(pan[None, :, :256, :320].astype(np.float64)), 0.25)
    np.testing.assert_allclose(images["pan"], reduced[0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(images["lms"], interp23(expected)[0].numpy(), rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(images["gt"], gt[0].numpy())
    assert images["valid"].all()
    assert images["valid"].shape == (16, 20)
    assert "displacement" not in images
    exact = {"ms": expected, "pan": reduced, "lms": interp23(expected)}
    for name, image in exact.items():  # the toolbox's, bit for bit
        np.testing.assert_array_equal(images[name], image[0].float().numpy())


def test_command_writes_two_parts_that_share_nothing(scene):
    folder, _, ms = scene
    arguments = ["simulate", *(str(folder / name) for name in ("pan.tif", "ms.tif", "train.h5")), "--sensor", "QB"]
    options = ["--patch", "16", "--overlap", "1", "--valid-out", str(folder / "valid.h5"), "--valid-share", "0.4"]
    result = CliRunner().invoke(main, arguments + options)
    assert result.exit_code == 0, result.output
    with h5py.File(folder / "train.h5") as train, h5py.File(folder / "valid.h5") as valid:
        assert {name: train[name].shape[1:] for name in train} == {
            "gt": (4, 16, 16),
            "ms": (4, 4, 4),
            "lms": (4, 16, 16),
            "pan": (1, 16, 16),
        }
        # 16 rows and 12 + 8 columns of low-resolution pixels, side 4, step 3.
        assert len(train["gt"]) == 5 * 3
        assert len(valid["gt"]) == 5 * 2
        assert train.attrs["sensor"] == "QB"
        np.testing.assert_array_equal(train["gt"][1], ms[:, :16, 12:28])
        np.testing.assert_array_equal(valid["gt"][0], ms[:, :16, 48:64])
    again = CliRunner().invoke(main, arguments + options)
    assert again.exit_code == 1
    assert "expected a new file" in again.output


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 7, 8])
def test_other_ratios(tmp_path, ratio):
    """gt keeps MS's pixels; ms, lms and pan lie where ratio and phase of the file say."""
    side = ratio * 16
    y = np.arange(side * ratio)[:, None] / ratio
    x = np.arange(side * ratio) / ratio
    wave = (500 + 200 * np.sin(y / (3 * ratio)) * np.cos(x / (4 * ratio) + 1)).astype(np.float32)
    ms = wave.reshape(side, ratio, side, ratio).mean((1, 3))
    write(tmp_path / "pan.tif", wave[None])
    write(tmp_path / "ms.tif", np.stack([ms] * 4))
    simulate(tmp_path / "pan.tif", tmp_path / "ms.tif", tmp_path / "t.h5", sensor="QB", patch=4 * ratio, overlap=0)
    with h5py.File(tmp_path / "t.h5") as file:
        assert file.attrs["ratio"] == ratio
        assert file.attrs["phase"] == ratio / 2
        np.testing.assert_array_equal(file.attrs["mtf"], (0.34, 0.32, 0.30, 0.22))
        assert file["gt"].shape == (16, 4, 4 * ratio, 4 * ratio)
        assert file["ms"].shape == (16, 4, 4, 4)
        np.testing.assert_array_equal(file["gt"][5], [ms[4 * ratio : 8 * ratio, 4 * ratio : 8 * ratio]] * 4)
        sample = {name: file[name][5] for name in file}
    np.testing.assert_allclose(sample["pan"][0], sample["gt"][0], atol=4)
    low, high = (sample["gt"][:, half::ratio, half::ratio] for half in (ratio // 2, -(-ratio // 2)))
    np.testing.assert_allclose(sample["ms"], (low + high) / 2, atol=10)
    np.testing.assert_allclose(sample["lms"], sample["gt"], atol=12)


GRID = Affine(0.5, 0, 500000, 0, -0.5, 5000000)
MS_GRID = GRID * Affine.scale(4)


def landscape(side, ratio=4, seed=0):
    """PAN [1, side, side] and MS [4, side/ratio, side/ratio] whose areas lie on each other."""
    rng = np.random.default_rng(seed)
    pan = ndimage.gaussian_filter(rng.uniform(0, 4000, (side, side)), 3).astype(np.float32)
    ms = pan.reshape(side // ratio, ratio, side // ratio, ratio).mean((1, 3))
    return pan[None], np.stack([ms * (k + 1) for k in range(4)])


def both(folder, pan, ms, pan_grid=GRID, ms_grid=MS_GRID, **options):
    write(folder / "pan.tif", pan, transform=pan_grid, crs="EPSG:32633")
    write(folder / "ms.tif", ms, **{"transform": ms_grid, "crs": "EPSG:32633", **options})
    return folder / "pan.tif", folder / "ms.tif"


def in_place(pair, tolerance=0.5):
    """PAN's means over MS pixels are MS's first band wherever both hold data."""
    means = pair.pan.reshape(pair.ms.shape[1], pair.ratio, pair.ms.shape[2], pair.ratio).mean((1, 3))
    assert pair.valid.any()
    assert np.abs(means - pair.ms[0])[pair.valid].max() <= tolerance


def test_ms_that_begins_elsewhere(tmp_path):
    pan, ms = landscape(160)
    paths = both(tmp_path, pan[:, :100], ms[:, 6:, 3:], ms_grid=GRID * Affine.scale(4) * Affine.translation(3, 6))
    pair = read_pair(*paths)
    assert pair.ms.shape == (4, 19, 37)
    assert pair.valid.all()
    in_place(pair)
    paths = both(tmp_path, pan[:, 40:, 20:], ms, pan_grid=GRID * Affine.translation(20, 40))
    pair = read_pair(*paths)
    assert pair.ms.shape == (4, 30, 35)
    assert pair.valid.all()
    in_place(pair)


def test_ms_south_up_and_mirrored(tmp_path):
    pan, ms = landscape(160)
    for rows, columns in ((-1, 1), (1, -1), (-1, -1)):
        grid = GRID * Affine.scale(4) * Affine.translation(40 * (columns < 0), 40 * (rows < 0))
        paths = both(tmp_path, pan, ms[:, ::rows, ::columns], ms_grid=grid * Affine.scale(columns, rows))
        pair = read_pair(*paths)
        np.testing.assert_array_equal(pair.ms, ms)
        in_place(pair)


def test_grids_apart_by_fractions_of_a_pixel(tmp_path):
    """PAN whose pixels begin .3 down and .6 left of MS's is moved onto MS; MS's pixels stay as they are."""
    rng = np.random.default_rng(0)
    fine = ndimage.gaussian_filter(rng.uniform(0, 40000, (1600, 1600)), 20, mode="wrap").astype(np.float32)

    def pixels(size, move):
        """Means over squares of size tenths of a PAN pixel; pixel 0 begins at `move` tenths."""
        return np.roll(fine, [-m for m in move], (0, 1)).reshape(1600 // size, size, 1600 // size, size).mean((1, 3))

    ms = np.stack([pixels(40, (0, 0))] * 4)
    pair = read_pair(*both(tmp_path, pixels(10, (3, -6))[None], ms, pan_grid=GRID * Affine.translation(-0.6, 0.3)))
    np.testing.assert_array_equal(pair.ms, ms)
    assert pair.valid[3:-3, 3:-3].all()
    assert not pair.valid[0].any(), "PAN begins below its first row"
    straight = pixels(10, (0, 0))
    assert np.abs(pair.pan - straight)[12:-12, 12:-12].max() < 0.01 * np.ptp(straight)
    in_place(pair, 0.01 * np.ptp(straight))
    moved = read_pair(*both(tmp_path, pixels(10, (5, -14))[None], ms), shift=(0.5, -1.4))
    assert np.abs(moved.pan - straight)[12:-12, 12:-12].max() < 0.01 * np.ptp(straight)


def test_ms_in_another_crs(tmp_path):
    pan, ms = landscape(160)
    paths = both(tmp_path, pan, ms, crs="EPSG:32632")
    with pytest.raises(ValueError, match="MS: expected to overlap PAN"):
        read_pair(*paths)


def test_masks_and_alpha_stay_out(tmp_path):
    pan, ms = landscape(160)
    hole = np.zeros((40, 40), bool)
    hole[:, :15] = True
    empty = np.where(hole, 0, ms)
    paths = both(tmp_path, pan, empty)
    with rasterio.open(paths[1], "r+") as file:
        file.write_mask(~hole)
    np.testing.assert_array_equal(read_pair(*paths).valid, ~hole)
    both(tmp_path, pan, np.concatenate([empty, np.where(hole, 0, 255)[None]]).astype(np.float32))
    with rasterio.open(paths[1], "r+") as file:
        file.colorinterp = [*file.colorinterp[:4], ColorInterp.alpha]
    pair = read_pair(*paths)
    assert len(pair.ms) == 4
    np.testing.assert_array_equal(pair.valid, ~hole)
    images = simulate_pair(pair, "QB")
    assert all(patch["gt"].min() > 0 for patch in patches(images, 8, 0))


@pytest.mark.parametrize("size", [(159, 158), (157, 160), (162, 161)])
def test_sizes_of_pan_that_are_no_multiples(tmp_path, size):
    pan, ms = landscape(160)
    padded = np.pad(pan, ((0, 0), (0, 4), (0, 4)), mode="edge")[:, : size[0], : size[1]]
    for options in ({}, {"crs": None, "transform": None}):
        write(tmp_path / "pan.tif", padded, **{"transform": GRID, "crs": "EPSG:32633", **options})
        write(tmp_path / "ms.tif", ms, **{"transform": GRID * Affine.scale(4), "crs": "EPSG:32633", **options})
        pair = read_pair(tmp_path / "pan.tif", tmp_path / "ms.tif")
        whole = [min(length // 4, 40) for length in size]
        assert pair.valid[: whole[0], : whole[1]].all()
        assert pair.valid.sum() == whole[0] * whole[1]
        in_place(pair)


def test_registered(tmp_path, monkeypatch):
    """Bands that lie apart from PAN and from each other: PAN goes to their median, or they go to PAN."""
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (960, 960))
    fine = 1000 + sum(300 * s * ndimage.gaussian_filter(noise, 3 * s, mode="wrap") * s for s in (1, 2, 4))
    d = np.array([(1.5, -2.25), (1.5, -2.25), (1.5, -2.25), (2.25, -1.5)])  # PAN pixels, 3 fine ones each

    def pixels(size, by=(0, 0)):
        moved = np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(fine), by)).real
        return moved.reshape(960 // size, size, 960 // size, size).mean((1, 3)).astype(np.float32)

    ms = np.stack([pixels(12, 3 * by) for by in d])
    write(tmp_path / "pan.tif", pixels(3)[None])
    write(tmp_path / "ms.tif", ms)
    paths, options = (tmp_path / "pan.tif", tmp_path / "ms.tif"), {"register": "auto", "sensor": "QB"}
    found = []

    def keep(*arguments, **options):
        found.append(measure(*arguments, **options))
        return found[0]

    monkeypatch.setattr("pansharp_fast.data.simulate.measure", keep)
    pair = read_pair(*paths, **options)
    np.testing.assert_array_equal(pair.ms, ms)
    np.testing.assert_allclose(pair.displacement, d - d[0], atol=0.2)
    truth = pixels(3, 3 * d[0])
    assert np.abs(pair.pan - truth)[16:-16, 16:-16].max() < 0.15 * np.ptp(truth)
    assert pair.valid[12:-12, 12:-12].all()

    monkeypatch.setattr("pansharp_fast.data.simulate.measure", lambda *_, **__: found[0])
    moved = read_pair(*paths, frame="pan", **options)
    np.testing.assert_array_equal(moved.pan, pixels(3))
    assert not moved.displacement.any()
    assert np.abs(moved.ms - pixels(12))[:, 12:-12, 12:-12].max() < 0.1 * np.ptp(ms)
    assert moved.valid[12:-12, 12:-12].all()

    outputs = {"valid_out": tmp_path / "v.h5", "valid_share": 0.5}
    simulate(*paths, tmp_path / "t.h5", patch=16, overlap=0, **outputs, **options)
    with h5py.File(tmp_path / "t.h5") as file, h5py.File(tmp_path / "v.h5") as other:
        assert file["displacement"].shape == (len(file["gt"]), 4, 2)
        assert "pixels of pan" in file["displacement"].attrs["unit"]
        np.testing.assert_allclose(file["displacement"][0], pair.displacement / 4, atol=1e-6)
        np.testing.assert_array_equal(other["displacement"][0], file["displacement"][0])


@pytest.mark.parametrize("ratio", [2, 3, 5])
def test_displacement_is_what_remains(tmp_path, ratio):
    """gt shows at p + displacement what pan shows at p, in their pixels."""
    side = 24 * ratio + 12
    noise = np.random.default_rng(2).normal(0, 1, (side * ratio, side * ratio))
    scene = 1000 + sum(300 * s * ndimage.gaussian_filter(noise, s * ratio / 4, mode="wrap") for s in (1, 2, 4))
    d = np.array([(0.6, -1.1), (0.6, -1.1), (0.6, -1.1), (-0.3, -0.5)])  # PAN pixels

    def seen(by):
        moved = np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(scene), by)).real
        return moved.reshape(side, ratio, side, ratio).mean((1, 3)).astype(np.float32)

    write(tmp_path / "pan.tif", scene[None].astype(np.float32))
    write(tmp_path / "ms.tif", np.stack([seen(by) for by in d]))
    options = {"register": "auto", "mtf": [0.3], "patch": 6 * ratio, "overlap": 0}
    simulate(tmp_path / "pan.tif", tmp_path / "ms.tif", tmp_path / "t.h5", **options)
    with h5py.File(tmp_path / "t.h5") as file:
        left = file["displacement"][:]
        pan, gt = (torch.from_numpy(file[name][:]).double() for name in ("pan", "gt"))
    assert (left == left[0]).all()
    np.testing.assert_allclose(left[0], (d - d[0]) / ratio, atol=0.15 / ratio)

    def agreement(sign):
        back = move(gt, torch.from_numpy(-sign * left.astype(np.float64)))[:, 3, 3:-3, 3:-3].flatten()
        return float(torch.corrcoef(torch.stack([back, pan[:, 0, 3:-3, 3:-3].flatten()]))[0, 1])

    assert agreement(1) > agreement(0) > agreement(-1)


def test_displacement_that_varies_or_is_not_found(tmp_path, monkeypatch):
    pan, ms = landscape(256)
    d = torch.tensor([[(2.0, 0.0)] * 3 + [(2.0, 1.0)]], dtype=torch.float64)
    one = torch.ones(1, 4, dtype=torch.float64)
    field = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    field[:, 1, 1] = 4.0  # columns, from 0 in PAN's first row to 4 in its last
    found = Registration(d, one, d, one, field, "affine")
    monkeypatch.setattr("pansharp_fast.data.simulate.measure", lambda *_, **__: found)
    paths = both(tmp_path, pan, ms)
    for frame, own in (("ms", (0, 0, 0, 1)), ("pan", (0, 0, 0, 0))):
        out = tmp_path / f"{frame}.h5"
        simulate(*paths, out, register="auto", frame=frame, patch=16, overlap=0)
        with h5py.File(out) as file:
            left = file["displacement"][:]
        np.testing.assert_allclose(left[..., 0], 0, atol=1e-6)
        np.testing.assert_allclose(left[..., 1] - left[:, :1, 1] - np.array(own) / 4, 0, atol=1e-6)
        rows = np.unique(left[:, 0, 1].round(4))
        np.testing.assert_allclose(np.diff(rows), 16 / 64, atol=0.01)  # 64 PAN rows of 256, 4 PAN pixels, ratio 4

    none = Registration(0 * d, 0 * one, 0 * d, one, None, "none")
    monkeypatch.setattr("pansharp_fast.data.simulate.measure", lambda *_, **__: none)
    with pytest.warns(UserWarning, match="nothing trustworthy found, MS taken as it lies"):
        pair = read_pair(*paths, register="auto")
    np.testing.assert_array_equal(pair.pan, pan[0])


def test_mtf_by_sensor_metadata_or_numbers(tmp_path):
    pan, ms = landscape(256)
    paths = both(tmp_path, pan, ms)
    assert read_pair(*paths).sensor.gains(4) == (0.3,) * 4
    assert read_pair(*paths, mtf=(0.2, 0.25, 0.3, 0.35), bands=[4, 2]).sensor.gains(2) == (0.35, 0.25)
    assert read_pair(*paths, sensor="QB", bands=[4, 2, 1, 3]).sensor.gains(4) == (0.22, 0.32, 0.34, 0.30)
    with rasterio.open(paths[1], "r+") as file:
        file.update_tags(ns="IMAGERY", SATELLITEID="QB02")
    assert read_pair(*paths).sensor.name == "QB"
    with pytest.raises(ValueError, match="sensor WV3: expected 8 bands, got 4"):
        read_pair(*paths, sensor="WV3")
    with pytest.raises(ValueError, match="mtf: expected 1 or 4 gains between 0 and 1, got"):
        read_pair(*paths, mtf=[0.3, 0.3])
    arguments = ["simulate", *map(str, paths), str(tmp_path / "t.h5"), "--mtf", "0.2,0.3,0.3,0.4", "--patch", "16"]
    result = CliRunner().invoke(main, [*arguments, "--overlap", "0", "--register", "auto", "--frame", "pan"])
    assert result.exit_code == 0, result.output
    with h5py.File(tmp_path / "t.h5") as file:
        np.testing.assert_array_equal(file.attrs["mtf"], (0.2, 0.3, 0.3, 0.4))
        images = simulate_pair(read_pair(*paths, mtf=[0.2, 0.3, 0.3, 0.4]))
        assert not np.array_equal(images["ms"][0], images["ms"][1] / 2)
    assert PanCollection(tmp_path / "t.h5", peak=4000).bands == 4


def test_shift_in_the_frame_of_pan(tmp_path):
    """Every band is moved to PAN, whose pixels stay; nothing that left MS or is void becomes gt."""
    pan, ms = landscape(320)
    ms[2, 60, 30] = -1
    pair = read_pair(*both(tmp_path, pan, ms, nodata=-1), shift=(8, -4), frame="pan")
    np.testing.assert_array_equal(pair.pan, pan[0])
    hole = np.zeros((80, 80), bool)
    hole[60 - 2, 30 + 1] = True
    near = ndimage.binary_dilation(hole, np.ones((35, 35)))  # interpolation reaches 11 pixels, and the displacement
    assert not pair.valid[58, 31]
    assert pair.valid[~near][:1].size
    np.testing.assert_allclose(
        pair.ms[:, 14:-14, 14:-14][:, ~near[14:-14, 14:-14]], ms[:, 16:-12, 13:-15][:, ~near[14:-14, 14:-14]], rtol=1e-5
    )
    assert not pair.valid[-2:].any()
    assert not pair.valid[:, 0].any()
    assert pair.valid[16:40, 16:-16].all()


def test_training_refuses_other_ratios(tmp_path):
    pan, ms = landscape(240, 3)
    simulate(*both(tmp_path, pan, ms, ms_grid=GRID * Affine.scale(3)), tmp_path / "t.h5", patch=24, overlap=0)
    with pytest.raises(ValueError, match=r"expected ratio 4 and phase 2, .* got ratio 3 and phase 1.5"):
        PanCollection(tmp_path / "t.h5", peak=4000)


def test_outputs_are_neither_inputs_nor_each_other(scene):
    folder, _, _ = scene
    before = {path: path.read_bytes() for path in folder.iterdir()}
    paths = folder / "pan.tif", folder / "ms.tif"
    with pytest.raises(ValueError, match="valid_out: expected another file than OUT"):
        simulate(*paths, folder / "a.h5", sensor="QB", valid_out=folder / "a.h5")
    with pytest.raises(FileExistsError, match="OUT: expected a new file"):
        simulate(*paths, paths[0], sensor="QB")
    with pytest.raises(FileNotFoundError, match="valid_out: expected an existing folder"):
        simulate(*paths, folder / "a.h5", sensor="QB", valid_out=folder / "none" / "b.h5")
    with pytest.raises(ValueError, match="PAN: expected local files, got"):
        simulate("/vsicurl/http://localhost:9/a.tif", paths[1], folder / "a.h5", sensor="QB", local_only=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_nodata_and_nan_stay_out(tmp_path):
    ms = np.full((4, 64, 64), 100, np.float32)
    ms += np.arange(64, dtype=np.float32)
    ms[1, 20, 20] = -9999
    pan = np.full((1, 256, 256), 90, np.float32)
    pan[0, 200, 210] = np.nan
    write(tmp_path / "ms.tif", ms, nodata=-9999)
    write(tmp_path / "pan.tif", pan, nodata=-9999)
    with pytest.raises(ValueError, match="PAN: expected finite values or declared nodata"):
        read_pair(tmp_path / "pan.tif", tmp_path / "ms.tif")
    pair = read_pair(tmp_path / "pan.tif", tmp_path / "ms.tif", nodata=np.nan)
    assert np.argwhere(~pair.valid).tolist() == [[20, 20], [50, 52]]
    images = simulate_pair(pair, "QB")
    assert np.argwhere(~images["valid"]).tolist() == [
        [y, x] for y, x in np.ndindex(16, 16) if max(abs(y - 5), abs(x - 5)) < 2 or max(abs(y - 12), abs(x - 13)) < 2
    ]
    for patch in patches(images, 16, 0):
        assert patch["gt"].min() > 90
        assert np.isfinite(patch["pan"]).all()


def test_shift_is_the_displacement_of_ms(tmp_path):
    """MS shows at p + shift what PAN shows at p: PAN is moved down and right by it."""
    rng = np.random.default_rng(0)
    content = rng.uniform(1, 2047, (1, 64 + 8, 64 + 8)).astype(np.float32)
    write(tmp_path / "pan.tif", content[:, 4 + 3 : 68 + 3, 4 - 2 : 68 - 2])  # lies 3 rows up and 2 columns right
    write(tmp_path / "ms.tif", np.ones((4, 16, 16), np.float32))
    pair = read_pair(tmp_path / "pan.tif", tmp_path / "ms.tif", shift=(3, -2))
    np.testing.assert_array_equal(pair.pan[3:, :-2], content[0, 4 + 3 : 68, 4 : 68 - 2])
    assert not pair.valid[0].any()
    assert not pair.valid[:, -1].any()
    assert pair.valid[1:, :-1].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensor": "WV3"}, "sensor WV3: expected 8 bands, got 4"),
        ({"sensor": "QB", "patch": 30}, "patch: expected a multiple of 4"),
        ({"sensor": "QB", "patch": 128}, "patch: expected a size that fits"),
        ({"sensor": "QB", "overlap": 16}, "overlap: expected 0 to 15"),
        ({"sensor": "QB", "valid_out": "v.h5", "valid_share": 1.5}, "valid_share: expected"),
        ({"sensor": "nowhere"}, "sensor: expected one of"),
    ],
)
def test_refusals_leave_nothing_behind(scene, options, message):
    folder, _, _ = scene
    if "valid_out" in options:
        options = options | {"valid_out": folder / options["valid_out"]}
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError, match=message):
        simulate(folder / "pan.tif", folder / "ms.tif", folder / "out.h5", **options)
    assert sorted(folder.iterdir()) == before


def test_refused_pairs(scene):
    folder, pan, _ = scene
    write(folder / "two.tif", np.concatenate([pan, pan]))
    write(folder / "cut.tif", pan[:, :240])
    with pytest.raises(ValueError, match="PAN: expected 1 band, got 2"):
        read_pair(folder / "two.tif", folder / "ms.tif")
    with pytest.raises(ValueError, match="MS: expected sizes that stand to PAN's 240 x 328 in one ratio, got 66 x 82"):
        read_pair(folder / "cut.tif", folder / "ms.tif")
    with pytest.raises(OSError, match="PAN: expected a readable raster, got"):
        read_pair(folder / "none.tif", folder / "ms.tif")
