"""GeoTIFF pairs to training patches by Wald's protocol."""

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pansharp_fast.cli import main
from pansharp_fast.data.mtf import decimate, mtf_filter
from pansharp_fast.data.pairs import read_pair
from pansharp_fast.data.resample import imresize, interp23
from pansharp_fast.data.simulate import patches, simulate, simulate_pair

rasterio = pytest.importorskip("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def write(path, image, nodata=None, names=()):
    profile = {"driver": "GTiff", "count": image.shape[0], "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", dtype=image.dtype.name, nodata=nodata, **profile) as file:
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


def test_nodata_and_nan_stay_out(tmp_path):
    ms = np.full((4, 64, 64), 100, np.float32)
    ms += np.arange(64, dtype=np.float32)
    ms[1, 20, 20] = -9999
    pan = np.full((1, 256, 256), 90, np.float32)
    pan[0, 200, 210] = np.nan
    write(tmp_path / "ms.tif", ms, nodata=-9999)
    write(tmp_path / "pan.tif", pan, nodata=-9999)
    pair = read_pair(tmp_path / "pan.tif", tmp_path / "ms.tif")
    assert np.argwhere(~pair.valid).tolist() == [[20, 20], [50, 52]]
    images = simulate_pair(pair, "QB")
    assert np.argwhere(~images["valid"]).tolist() == [
        [y, x] for y, x in np.ndindex(16, 16) if max(abs(y - 5), abs(x - 5)) < 2 or max(abs(y - 12), abs(x - 13)) < 2
    ]
    for patch in patches(images, 16, 0):
        assert patch["gt"].min() > 90
        assert np.isfinite(patch["pan"]).all()


def test_shift_moves_pan_onto_ms(tmp_path):
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
    write(folder / "half.tif", pan[:, ::2, ::2])
    with pytest.raises(ValueError, match="PAN: expected one band, got 2"):
        read_pair(folder / "two.tif", folder / "ms.tif")
    with pytest.raises(ValueError, match="PAN: expected 264 x 328 pixels, 4 times those of MS, got 132 x 164"):
        read_pair(folder / "half.tif", folder / "ms.tif")
    with pytest.raises(rasterio.errors.RasterioIOError):
        read_pair(folder / "none.tif", folder / "ms.tif")
