"""Classical methods on registered bands, over arrays and whole scenes: place, tiles, frames, ratios, options."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

import pansharp_fast
from pansharp_fast import metrics
from pansharp_fast.classical import METHODS, fuse
from pansharp_fast.data import get_sensor
from pansharp_fast.data.observation import observe
from pansharp_fast.data.registration import Registration
from pansharp_fast.inference import sharpen_scene

from .conftest import GRID
from .local_model import LocalModel

D = [[1.6, -0.9], [1.5, -1.0], [1.7, -0.8], [2.2, 0.4]]
GAINS = (0.3,) * 4


def sharp(side: int = 256, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(pan [1,1,H,W], gt [1,4,H,W]): blocks of four materials with texture, float64."""
    rng = np.random.default_rng(seed)
    image = np.full((4, side, side), 300.0)
    for _ in range(side * side // 90):
        y, x = rng.integers(0, side, 2)
        h, w = rng.integers(3, 22, 2)
        image[:, y : y + h, x : x + w] = rng.uniform(150, 1300) * rng.uniform(0.7, 1.3, (4, 1, 1))
    gt = torch.from_numpy(image * (1 + 0.03 * rng.standard_normal((1, side, side))))[None]
    return (gt * torch.tensor([0.2, 0.3, 0.3, 0.2]).view(4, 1, 1)).sum(1, keepdim=True), gt


def pair(ratio: float = 4, phase=None, side: int = 256, d=D):
    """(pan, ms, gt), MS displaced by d; gt in PAN's place."""
    pan, gt = sharp(side)
    size = (int(side / ratio), int(side / ratio))
    return pan, observe(gt, size, gains=GAINS, ratio=ratio, phase=phase, d=torch.tensor(d)), gt


def inner_ergas(fused, gt, ratio: float = 4) -> float:
    return float(metrics.ergas(torch.as_tensor(fused), gt, ratio, cut=24))


@pytest.fixture
def files(tmp_path):
    def write(pan, ms, *, dtype: str = "float32", grid=None, **options) -> tuple[Path, Path]:
        ratio = pan.shape[-1] / ms.shape[-1]
        for name, image, transform in (("pan", pan, GRID), ("ms", ms, grid or GRID @ Affine.scale(ratio))):
            pixels = np.asarray(image[0])
            if np.dtype(dtype).kind != "f":
                pixels = pixels.round()
            profile = {"count": len(pixels), "height": pixels.shape[1], "width": pixels.shape[2], "dtype": dtype}
            with rasterio.open(
                tmp_path / f"{name}.tif",
                "w",
                driver="GTiff",
                crs="EPSG:32631",
                transform=transform,
                **profile,
                **options,
            ) as file:
                file.write(pixels.astype(dtype))
        return tmp_path / "pan.tif", tmp_path / "ms.tif"

    return write


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


@pytest.mark.parametrize("method", METHODS)
def test_registration_takes_the_misfit_away(method):
    pan, ms, gt = pair()
    off, auto, given = (
        inner_ergas(pansharp_fast.sharpen(pan, ms, method=method, register=register, back_projection=2), gt)
        for register in ("off", "auto", Registration.given(D, 4))
    )
    assert auto < 0.9 * off
    assert auto < 1.05 * given


def test_auto_is_bt_h():
    pan, ms, _ = pair(side=128)
    assert torch.equal(pansharp_fast.sharpen(pan, ms), pansharp_fast.sharpen(pan, ms, method="bt-h"))


@pytest.mark.parametrize(("ratio", "phase"), [(2, None), (3, None), (4, 2.0), (6, (1.2, 3.4)), (5, None), (8, None)])
def test_any_ratio_and_phase(ratio, phase):
    d = [[ratio / 4 * v for v in one] for one in D]
    pan, ms, gt = pair(ratio, phase, side=(384 if ratio > 4 else 256) // ratio * ratio, d=d)
    fused = pansharp_fast.sharpen(pan, ms, ratio=ratio, phase=phase)
    plain = pansharp_fast.sharpen(pan, ms, ratio=ratio, phase=phase, method="exp", back_projection=0)
    assert inner_ergas(fused, gt) < 0.6 * inner_ergas(plain, gt)


def test_frames():
    """In MS's frame each band lies where its own MS band does: what the sensor sees of it, undisplaced, is MS."""
    pan, ms, _ = pair()
    given = Registration.given(D, 4)
    options = {"register": given, "back_projection": 2}
    for frame, d in (("pan", torch.tensor(D)), ("ms", None)):
        fused = pansharp_fast.sharpen(pan, ms, frame=frame, **options)
        seen = observe(fused, (64, 64), gains=GAINS, ratio=4, d=d)
        assert float((seen - ms)[..., 8:-8, 8:-8].abs().mean() / ms.mean()) < 0.02, frame
    swapped = observe(
        pansharp_fast.sharpen(pan, ms, frame="ms", **options), (64, 64), gains=GAINS, ratio=4, d=torch.tensor(D)
    )
    assert float((swapped - ms)[..., 8:-8, 8:-8].abs().mean() / ms.mean()) > 0.05


def test_tiles_do_not_show(files, tmp_path):
    pan, ms, _ = pair(side=640)
    paths = files(pan, ms)
    results = []
    for tile, overlap in ((1024, 64), (208, 64), (256, 64)):
        sharpen_scene(*paths, tmp_path / "out.tif", tile=tile, overlap=overlap, overwrite=True)
        results.append(read(tmp_path / "out.tif"))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=0.02)  # of 1500
    # Beside nodata as well.
    ms[:, :, 40:52, 30:70] = -1
    paths = files(pan, ms, nodata=-1)
    results = []
    for tile, overlap in ((1024, 64), (208, 64)):
        sharpen_scene(*paths, tmp_path / "out.tif", tile=tile, overlap=overlap, overwrite=True, register="off")
        results.append(read(tmp_path / "out.tif"))
    assert 0.8 < (results[0] != -1).mean() < 0.99
    np.testing.assert_allclose(results[1], results[0], atol=0.02)


def test_scene_and_arrays_agree_and_the_file_says_what_was_done(files, tmp_path):
    pan, ms, _ = pair()
    summary = sharpen_scene(
        *files(pan, ms),
        tmp_path / "out.tif",
        save_registration=tmp_path / "d.json",
        creation_options={"COMPRESS": "LZW"},
    )
    arrays = pansharp_fast.sharpen(np.asarray(pan, np.float32), np.asarray(ms, np.float32), nodata=float("nan"))
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), arrays[0])
    with rasterio.open(tmp_path / "out.tif") as file:
        tags = file.tags()
        assert np.isnan(file.nodata), "moved bands leave pixels without data"
    assert tags["PANSHARP_METHOD"] == "bt-h"
    assert json.loads(tags["PANSHARP_REGISTRATION"])["d"] == summary.registration.d.tolist()
    np.testing.assert_allclose(summary.registration.d[0], D, atol=0.1)
    assert "MS lies (down, right) PAN pixels off PAN: (+1." in summary.text("out.tif")
    assert 0 < summary.left < 0.1
    again = sharpen_scene(*files(pan, ms), tmp_path / "again.tif", register=tmp_path / "d.json")
    np.testing.assert_array_equal(read(tmp_path / "again.tif"), read(tmp_path / "out.tif"))
    assert torch.equal(again.registration.d, summary.registration.d)


def test_a_band_s_result_does_not_depend_on_the_bands_chosen_beside_it(files, tmp_path):
    pan, ms, _ = pair()
    paths = files(pan, ms)
    for name, bands in (("all", None), ("two", [4, 2])):
        sharpen_scene(*paths, tmp_path / f"{name}.tif", method="exp", bands=bands, back_projection=0)
    np.testing.assert_array_equal(read(tmp_path / "two.tif"), read(tmp_path / "all.tif")[[3, 1]])


def test_shift_by_hand_moves_bands_and_nothing_is_invented(files, tmp_path):
    pan, ms, _ = pair()
    summary = sharpen_scene(*files(pan, ms, nodata=-1), tmp_path / "out.tif", shift=(8, -12))
    out = read(tmp_path / "out.tif")
    assert summary.registration.model == "given"
    assert (out[:, -8:] == -1).all()
    assert (out[:, :, :12] == -1).all()
    assert (out[:, :-8, 12:] != -1).all()
    with pytest.raises(ValueError, match="shift: expected none beside a registration of its own"):
        sharpen_scene(*files(pan, ms), tmp_path / "out.tif", shift=(1, 1), register="off", overwrite=True)


def test_ms_beyond_pan_s_edge_is_used(files, tmp_path):
    """PAN cut out of the middle: with MS on all sides nothing is void, however the bands lie."""
    pan, ms, _ = pair()
    inside = pan[..., 48:208, 48:208]
    paths = files(inside, ms, grid=GRID @ Affine.translation(-48, -48) @ Affine.scale(4), nodata=-1)
    assert sharpen_scene(*paths, tmp_path / "out.tif", shift=(8, -12)).valid == 1
    assert (read(tmp_path / "out.tif") != -1).all()


def test_masked_arrays_and_nodata_values():
    pan, ms, _ = pair(side=128)
    pan, ms = np.asarray(pan).astype(np.uint16), np.asarray(ms).astype(np.uint16)
    mask = np.zeros(ms.shape, bool)
    mask[0, 2, 10:14, 20:24] = True
    plain = pansharp_fast.sharpen(pan, ms, register="off")
    held = []
    for junk in (0, 60000):
        spoilt = np.where(mask, junk, ms).astype(np.uint16)
        masked = pansharp_fast.sharpen(pan, np.ma.masked_array(spoilt, mask), register="off")
        assert isinstance(masked, np.ma.MaskedArray)
        assert masked.dtype == np.uint16
        void = np.zeros((128, 128), bool)
        void[40:56, 80:96] = True
        np.testing.assert_array_equal(masked.mask, np.broadcast_to(void, masked.shape))
        # Only what lies near is changed, and not by what stands under the mask.
        far = np.zeros_like(void)
        far[:, :40] = True
        assert np.abs(masked.data[..., far].astype(int) - plain[..., far]).max() < 20
        held.append(masked.compressed())
    np.testing.assert_array_equal(held[0], held[1])
    nan = np.where(mask, np.nan, ms.astype(np.float32))
    out = pansharp_fast.sharpen(pan.astype(np.float32), nan, register="off", nodata=np.nan)
    np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(void, out.shape))
    tensors = (torch.from_numpy(x) for x in (pan.astype(np.float32), np.where(mask, -1, ms.astype(np.float32))))
    out = pansharp_fast.sharpen(*tensors, register="off", nodata=-1)
    np.testing.assert_array_equal(out == -1, np.broadcast_to(void, out.shape))
    with pytest.raises(ValueError, match="ms: expected finite values, got NaN or infinity"):
        pansharp_fast.sharpen(pan.astype(np.float32), nan)


def test_clipping_is_told(files, tmp_path):
    pan, ms, _ = pair(side=128)
    summary = sharpen_scene(*files(pan, ms), tmp_path / "out.tif", dtype="uint8", register="off")
    assert 0.5 < summary.clipped < 1
    assert f"{100 * summary.clipped:.3f} % clipped to uint8" in summary.text("x")
    assert read(tmp_path / "out.tif").max() == 255


def test_mtf_by_sensor_gains_or_metadata(files, tmp_path):
    pan, ms, _ = pair(side=128)
    paths = files(pan, ms)
    results = {}
    gains = {"default": {}, "sensor": {"sensor": "QB"}, "mtf": {"mtf": get_sensor("QB").mtf_ms}, "one": {"mtf": [0.3]}}
    for name, options in gains.items():
        sharpen_scene(*paths, tmp_path / "out.tif", method="mtf-glp-hpm", overwrite=True, **options)
        results[name] = read(tmp_path / "out.tif")
    np.testing.assert_array_equal(results["one"], results["default"])
    np.testing.assert_array_equal(results["mtf"], results["sensor"])
    assert not np.array_equal(results["sensor"], results["default"])
    with rasterio.open(paths[1], "r+") as file:
        file.update_tags(ns="IMAGERY", SATELLITEID="QB02")
    sharpen_scene(*paths, tmp_path / "out.tif", method="mtf-glp-hpm", overwrite=True)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), results["sensor"])
    with pytest.raises(ValueError, match="mtf: expected 1 or 4 gains between 0 and 1"):
        sharpen_scene(*paths, tmp_path / "out.tif", mtf=[0.3, 0.3], overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method: expected auto or one of exp, brovey"),
        ({"method": "gsa", "weights": "tiny"}, "method: expected none beside weights"),
        ({"frame": "sky"}, "frame: expected one of pan, ms, got 'sky'"),
        ({"back_projection": -1}, "back_projection: expected auto or a number from 0, got -1"),
        ({"back_projection": "many"}, "back_projection: expected auto or a number from 0, got 'many'"),
        ({"band_weights": [1, 2, 3, 4]}, "band_weights: expected 4 numbers for method brovey"),
        ({"method": "brovey", "band_weights": [1, 2]}, "band_weights: expected 4 numbers for method brovey"),
        ({"ratio": 1}, r"ratio: expected MS pixels 1\.5 to 16 times"),
        ({"register": Registration.given((0, 0), 3)}, "registration: expected 4 bands, got 3"),
        ({"sensor": "Hubble"}, "sensor: expected one of WV2"),
    ],
)
def test_bad_options(options, message):
    pan, ms, _ = pair(side=64)
    with pytest.raises(ValueError, match=message):
        pansharp_fast.sharpen(pan, ms, **options)


def test_whole_images_equal_tiles_and_gradients_flow():
    pan, ms, _ = pair(side=128)
    d = torch.tensor(D)
    whole = fuse("bt-h", pan, ms, d=d, back_projection=1)
    tiled = pansharp_fast.sharpen(pan, ms, register=Registration.given(D, 4), back_projection=1)
    inner = slice(24, -24)
    assert float((whole - tiled)[..., inner, inner].abs().max() / ms.mean()) < 0.03
    pan, ms = (x[..., : 32 // s, : 32 // s].clone().requires_grad_() for x, s in ((pan, 1), (ms, 4)))
    fuse("bt-h", pan, ms, d=d, back_projection=1).square().mean().backward()
    assert float(pan.grad.abs().sum()) > 0
    assert float(ms.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["qb", "gf2", "ikonos", "wv2", "wv3", "landsat"])
def test_native_pairs_need_no_options(shared, name, tmp_path):
    folder = shared / "data" / "native"
    summary = sharpen_scene(folder / f"{name}_pan.tif", folder / f"{name}_ms.tif", tmp_path / "out.tif")
    assert summary.valid > 0.95
    expected = {"qb": (2.2, -2.2), "gf2": (1.5, 0.3), "ikonos": (-0.4, -0.3), "landsat": (0, 0)}
    if name in expected:
        np.testing.assert_allclose(summary.registration.d[0, :3].mean(0), expected[name], atol=0.15)
    assert np.abs(read(tmp_path / "out.tif").astype(float)).max() > 0


def test_threads_that_sharpen_at_once(files, tmp_path):
    """Eight at a time, arrays and files, classical and a network: each result is what one alone gives."""
    pan, ms, _ = pair(side=128)
    paths = files(pan, ms)

    def work(k: int) -> np.ndarray:
        weights = {"weights": LocalModel()} if k % 2 else {}
        if k % 4 < 2:
            return np.asarray(pansharp_fast.sharpen(pan, ms, **weights))[0]
        sharpen_scene(*paths, tmp_path / f"{k}.tif", dtype="float64", **weights)
        return read(tmp_path / f"{k}.tif")

    alone = [work(k) for k in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for k, result in enumerate(pool.map(work, range(4, 20))):
            np.testing.assert_array_equal(result, alone[k % 4])


@pytest.mark.parametrize(
    ("scale", "words"), [(1 / 5000, "times the largest of the images"), (4, "at least the largest")]
)
def test_networks_warn_of_values_that_do_not_suit_their_peak(scale, words):
    pan, ms, _ = pair(side=64)
    with pytest.warns(UserWarning, match=f"peak: expected .*{words}"):
        pansharp_fast.sharpen(pan * scale, ms * scale, weights=LocalModel())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pansharp_fast.sharpen(pan * scale, ms * scale)
