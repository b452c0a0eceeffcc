"""`pansharp-fast sharpen`: good runs, and every kind of bad input with its one line, exit code and clean folder."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine

from pansharp_fast.models import PANCrafter, preset, save_model

from ..inference.conftest import GRID
from .test_cli import run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change(path: Path, pixels: np.ndarray | None = None, **profile) -> Path:
    """Rewrite a raster with other pixels or other facts."""
    with rasterio.open(path) as file:
        old, options = file.read(), file.profile
    pixels = old if pixels is None else pixels
    count, height, width = pixels.shape
    options.update(count=count, height=height, width=width, dtype=pixels.dtype, **profile)
    with rasterio.open(path, "w", **options) as file:
        file.write(pixels)
    return path


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


def test_sharpen_writes_scene_preview_and_summary(scene, weights, tmp_path):
    pan, ms = scene()
    out, preview = tmp_path / "out.tif", tmp_path / "look.png"
    code, text, err = run(
        "sharpen", str(pan), str(ms), str(out), "--weights", str(weights), "--preview", str(preview),
        "--tile", "128", "--overlap", "32", "--dtype", "float32", "--nodata", "-1", "--co", "compress=lzw",
    )  # fmt: skip
    assert code == 0, err
    assert text.startswith(f"{out}: 200 x 240, 4 bands float32, pancrafter; ")
    assert "s per megapixel" in text
    with rasterio.open(out) as file:
        assert file.dtypes == ("float32",) * 4
        assert file.nodata == -1
        assert file.profile["compress"] == "lzw"
    assert preview.stat().st_size > 1000


def test_quiet_prints_nothing_and_overwrite_replaces(scene, weights, tmp_path):
    pan, ms = scene(80, 96)
    out = tmp_path / "out.tif"
    out.write_text("old")
    args = ("sharpen", str(pan), str(ms), str(out), "--weights", str(weights), "--quiet")
    assert run(*args)[0] == 1
    assert out.read_text() == "old"
    assert run(*args, "--overwrite") == (0, "", "")
    assert read(out).shape == (4, 80, 96)


def test_precision_and_bands(scene, weights, tmp_path):
    pan, ms = scene(80, 96, "float32")
    args = ("sharpen", str(pan), str(ms), "--weights", str(weights), "--quiet")
    assert run(*args, str(tmp_path / "a.tif"))[0] == 0
    assert run(*args, str(tmp_path / "b.tif"), "--precision", "bf16", "--bands", "1,2,3,4")[0] == 0
    difference = np.abs(read(tmp_path / "a.tif") - read(tmp_path / "b.tif"))
    assert 0 < difference.max() < 0.01 * 2047


def test_values_above_the_peak_are_reported(scene, weights, tmp_path):
    pan, ms = scene(80, 96)
    out = str(tmp_path / "out.tif")
    code, _, err = run("sharpen", str(pan), str(ms), out, "--weights", str(weights), "--peak", "1023", "--quiet")
    assert code == 0
    assert err.startswith("Warning: peak: expected at least the largest value 12")


def other_crs(pan: Path, ms: Path) -> None:
    change(ms, crs=None)


def far_away(pan: Path, ms: Path) -> None:
    change(ms, transform=Affine.translation(100000, 0) * GRID * Affine.scale(4))


def beyond_the_projection(pan: Path, ms: Path) -> None:
    change(ms, crs="EPSG:4326", transform=Affine(2, 0, 900, 0, -2, 900))


def ratio_two(pan: Path, ms: Path) -> None:
    change(ms, transform=GRID * Affine.scale(2))


def ratio_two_by_size(pan: Path, ms: Path) -> None:
    change(pan, crs=None, transform=Affine.identity())
    change(ms, read(ms).repeat(2, 1).repeat(2, 2), crs=None, transform=Affine.identity())


def three_bands(pan: Path, ms: Path) -> None:
    change(ms, read(ms)[:3])


def swapped(pan: Path, ms: Path) -> None:
    change(pan, read(pan).repeat(4, 0))


def nan(pan: Path, ms: Path) -> None:
    pixels = read(ms).astype(np.float32)
    pixels[2, 30, 40] = np.nan
    change(ms, pixels)


def infinity(pan: Path, ms: Path) -> None:
    pixels = read(pan).astype(np.float32)
    pixels[0, 30, 40] = np.inf
    change(pan, pixels)


def all_nodata(pan: Path, ms: Path) -> None:
    change(ms, np.zeros_like(read(ms)), nodata=0)


def complex_pixels(pan: Path, ms: Path) -> None:
    change(ms, read(ms).astype(np.complex64))


def one_pixel_wide(pan: Path, ms: Path) -> None:
    change(pan, read(pan)[:, :, :1], crs=None, transform=Affine.identity())
    change(ms, read(ms)[:, :, :2], crs=None, transform=Affine.identity())


def truncated(pan: Path, ms: Path) -> None:
    change(ms, compress="deflate", tiled=False, blockysize=8)
    content = ms.read_bytes()
    ms.write_bytes(content[: len(content) * 2 // 3])


def truncated_header(pan: Path, ms: Path) -> None:
    pan.write_bytes(pan.read_bytes()[:60])


def no_image(pan: Path, ms: Path) -> None:
    pan.write_text("These are not pixels.")


def empty(pan: Path, ms: Path) -> None:
    ms.write_bytes(b"")


def missing(pan: Path, ms: Path) -> None:
    ms.unlink()


BAD_SCENES = {
    other_crs: "MS: expected a CRS like PAN's, EPSG:32631, got none",
    far_away: "MS: expected to overlap PAN, columns 0 to 240 and rows 0 to 200 of its grid, got columns 2000",
    beyond_the_projection: "MS: expected a place in PAN's CRS EPSG:32631, got",
    ratio_two: "ratio: expected MS pixels 4 times the size of PAN's, as the weights want, got 2 x 2",
    ratio_two_by_size: "ratio: expected MS pixels 4 times the size of PAN's, as the weights want, got 2 x 2",
    three_bands: "MS: expected 4 bands, as the weights have, got 3",
    swapped: "PAN: expected 1 band, got 4",
    nan: "MS: expected finite values or declared nodata, got NaN or infinity",
    infinity: "PAN: expected finite values or declared nodata, got NaN or infinity",
    all_nodata: "PAN and MS: expected a pixel that holds data in both, got none",
    complex_pixels: "MS: expected integers or real numbers, got complex64",
    one_pixel_wide: "MS: expected sizes that stand to PAN's 200 x 1 in one ratio, got 50 x 2",
    truncated: "MS: expected a readable raster, got",
    truncated_header: "PAN: expected a readable raster, got",
    no_image: "PAN: expected a readable raster, got",
    empty: "MS: expected a readable raster, got",
    missing: "MS: expected a readable raster, got",
}


@pytest.mark.parametrize("spoil", BAD_SCENES, ids=lambda spoil: spoil.__name__)
def test_bad_scene(spoil, scene, weights, tmp_path):
    pan, ms = scene()
    spoil(pan, ms)
    before = files(tmp_path)
    code, out, err = run(
        "sharpen", str(pan), str(ms), str(tmp_path / "out.tif"), "--weights", str(weights),
        "--tile", "96", "--overlap", "16", "--quiet",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert err.startswith(f"Error: {BAD_SCENES[spoil]}"), err
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == before, "nothing is left behind"
    assert list(tmp_path.rglob(".sharpen*")) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--weights", "no-such-name"], 1, "weights: expected a file or one of"),
        (["--weights", "{tmp}/none.safetensors"], 1, "weights: expected a file, got"),
        (
            ["--weights", "{tmp}/corrupt.safetensors"],
            1,
            "weights: expected a safetensors file, got a damaged file",
        ),
        (["--weights", "{tmp}/pickled.pt"], 1, "weights: expected a checkpoint of this package, got the pickled file"),
        (["--weights", "{tmp}/eight.safetensors"], 1, "MS: expected 8 bands, as the weights have, got 4"),
        (["--tile", "100"], 1, "tile: expected a positive multiple of 16, got 100"),
        (["--overlap", "256"], 1, "tile: expected more than twice the overlap of 256, got 512"),
        (["--peak", "0"], 1, "peak: expected a positive number, got 0"),
        (["--nodata", "nan"], 1, "nodata: expected a value that uint16 holds, got nan"),
        (["--nodata", "70000"], 1, "nodata: expected a value that uint16 holds, got 70000"),
        (["--bands", "1,2,3,9"], 1, "bands: expected numbers from 1 to 4, got 9"),
        (["--bands", "1,2"], 1, "MS: expected 4 bands, as the weights have, got 2"),
        (["--device", "abacus"], 1, "device: expected auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--preview", "{tmp}/nowhere/look.png"], 1, "preview: expected an existing folder, got"),
        (["--preview", "{tmp}/pan.tif"], 1, "preview: expected a new file, got existing"),
        (["--dtype", "complex64"], 2, "Invalid value for '--dtype'"),
        (["--tile", "big"], 2, "Invalid value for '--tile'"),
        (["--bands", "red"], 2, "Invalid value for '--bands': expected numbers such as 2,3,5,7, got 'red'"),
        (["--co", "lzw"], 2, "Invalid value for '--co': expected KEY=VALUE, got 'lzw'"),
        (["--precision", "int4"], 2, "Invalid value for '--precision'"),
        (["fourth.tif"], 2, "Got unexpected extra argument"),
    ],
)
def test_bad_options(options, code, message, scene, weights, tmp_path):
    pan, ms = scene(80, 96)
    content = weights.read_bytes()
    (tmp_path / "corrupt.safetensors").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "pickled.pt")
    small = preset("tiny", bands=8, hidden_sizes=(4, 4), depth=(1, 1), attention_scales=(), num_heads=1)
    save_model(tmp_path / "eight.safetensors", PANCrafter(small))
    before = files(tmp_path)
    options = [option.format(tmp=tmp_path) for option in options]
    args = ["sharpen", str(pan), str(ms), str(tmp_path / "out.tif"), "--quiet", "--weights", str(weights), *options]
    actual, out, err = run(*args)
    assert err.startswith(f"Error: {message}"), err
    assert (actual, out) == (code, "")
    assert len(err.splitlines()) == 1
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/out.tif", "OUT: expected an existing folder, got"),
        ("pan.tif", "OUT: expected another file than the input, got"),
        ("", "OUT: expected a file name, got the folder"),
    ],
)
def test_bad_target(out, message, scene, weights, tmp_path):
    pan, ms = scene(80, 96)
    before = files(tmp_path)
    code, _, err = run(
        "sharpen", str(pan), str(ms), str(tmp_path / out), "--weights", str(weights), "--quiet", "--overwrite"
    )
    assert code == 1
    assert err.startswith(f"Error: {message}"), err
    assert files(tmp_path) == before


def limited(size: int | None, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process whose files may not grow beyond `size` bytes."""

    def limit() -> None:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    command = [sys.executable, "-m", "pansharp_fast", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)


@pytest.mark.parametrize(
    ("options", "missing"),
    [([], 0.5), ([], 0.002), (["--cog"], 0.5), (["--preview", "{tmp}/look.png"], 0.1)],
    ids=["early", "while closing", "cog", "preview"],
)
def test_full_disk(options, missing, scene, weights, tmp_path):
    """A file that cannot grow to its size, as on a full disk: one line, exit code 1, no trace."""
    pan, ms = scene(400, 400, "float32")
    out = tmp_path / "out.tif"
    options = [option.format(tmp=tmp_path) for option in options]
    args = ["sharpen", str(pan), str(ms), str(out), "--weights", str(weights), "--quiet", *options]
    assert run(*args) == (0, "", "")
    size = out.stat().st_size
    out.unlink()
    (tmp_path / "look.png").unlink(missing_ok=True)
    before = files(tmp_path)
    done = limited(int(size * (1 - missing)), *args)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: OUT: expected to write"), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert files(tmp_path) == before
    assert list(tmp_path.glob(".*")) == []


def test_one_line_in_a_real_process(scene, weights, tmp_path):
    """What libraries log on their own does not reach standard error."""
    pan, ms = scene()
    truncated(pan, ms)
    done = limited(None, "sharpen", str(pan), str(ms), str(tmp_path / "out.tif"), "--weights", str(weights), "--quiet")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("Error: MS: expected a readable raster, got")


def test_interrupted_run_leaves_nothing(scene, weights, tmp_path, monkeypatch):
    pan, ms = scene()
    before = files(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pansharp_fast.inference.output.Output.write", interrupt)
    code, _, _ = run("sharpen", str(pan), str(ms), str(tmp_path / "out.tif"), "--weights", str(weights), "--quiet")
    assert code == 1
    assert files(tmp_path) == before
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_stopped_run_leaves_nothing(number, scene, weights, tmp_path):
    """Batch systems and closed terminals stop a run by a signal: unfinished files go, others stay."""
    pan, ms = scene(1600, 1600)
    before = files(tmp_path)
    command = [sys.executable, "-m", "pansharp_fast", "sharpen", str(pan), str(ms), str(tmp_path / "out.tif")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ["--weights", str(weights), "--tile", "96", "--overlap", "32", "--preview", str(tmp_path / "look.png")]

    def listen() -> None:  # a shell's background jobs ignore some signals, and so would their children
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        [*command, *options], env=environment, stderr=subprocess.DEVNULL, preexec_fn=listen
    ) as process:
        while not list(tmp_path.glob(".sharpen-*/*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        process.wait(300)
    assert process.returncode == (1 if number == signal.SIGINT else 128 + number)
    assert files(tmp_path) == before
    assert list(tmp_path.glob(".*")) == []


def test_near_infrared_tagged_alpha(scene, weights, tmp_path):
    """One line of warning where its values are no mask's, the way out in every message, an image where it is named."""
    pan, ms = scene(80, 96, "uint8")
    pixels = np.clip(read(ms) // 4 + 20, 1, 250).astype(np.uint8)
    pixels[3, 4:8, 4:8] = 0
    change(ms, pixels, photometric="RGB", alpha="YES")
    out = str(tmp_path / "out.tif")
    text = "band 4 of MS is tagged alpha and taken as a mask (bands 1,2,3,4 takes it as an image)"
    code, printed, err = run("sharpen", str(pan), str(ms), out)
    assert (code, err) == (0, f"Warning: MS: {text}, but it looks like an image\n")
    assert text in printed
    assert read(Path(out)).shape[0] == 3
    code, _, err = run("sharpen", str(pan), str(ms), out, "--overwrite", "--weights", str(weights))
    assert code == 1
    assert f"Error: MS: expected 4 bands, as the weights have, got 3 (choose some with bands); {text}" in err
    code, printed, err = run("sharpen", str(pan), str(ms), out, "--overwrite", "--bands", "1,2,3,4")
    assert (code, err) == (0, "")
    assert "hold data" not in printed, "all of it does"
    assert read(Path(out)).shape[0] == 4
