"""What the built wheel and the source distribution hold, and that the wheel works outside the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


#: Where `make build` compiles: what is compiled there is not compiled again.
BUILD = ROOT / "build" / "cmake"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Path of the wheel, linked from the objects of the build; without CUDA where the build is."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = folder / "setup.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder / 'build'}\n[egg_info]\negg_base = {folder}\n")
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(settings)}
    if not (BUILD / "CMakeFiles" / "_C_cuda.dir").is_dir():
        environment["PANSHARP_FAST_CUDA"] = "0"
    build("--wheel", ROOT, folder, environment)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Path of the source distribution of a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("sdist")
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build("--sdist", source, folder, {**os.environ})
    (path,) = folder.glob("*.tar.gz")
    return path


def build(kind, source, out, environment):
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(source)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pansharp_fast"}
    assert not [name for name in names if "test" in name.lower()]
    assert "pansharp_fast/kernels/__init__.py" in names
    assert "pansharp_fast/_C.so" in names


@pytest.mark.slow
def test_wheel_holds_weights_and_sample_scenes(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "pansharp_fast/weights/tiny.safetensors" in names
    scenes = [name for name in names if name.startswith("pansharp_fast/sample_scenes/") and name.endswith(".tif")]
    assert len(scenes) == 6
    licence = [name for name in names if name.startswith("pansharp_fast/sample_scenes/") and name.endswith(".md")]
    assert licence, "the scenes' attribution must travel with them"


@pytest.mark.slow
def test_sdist_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert expected <= names, sorted(expected - names)
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert any(name.endswith(".cu") for name in names)


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    """Unpacked beside the environment's other packages: the library loads, and the distribution adds no `kernels`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.util, pathlib, torch, pansharp_fast;"
        f"assert pathlib.Path(pansharp_fast.__file__).is_relative_to({str(tmp_path)!r}), pansharp_fast.__file__;"
        "from pansharp_fast._extension import load_error; assert load_error('_C') is None, load_error('_C');"
        "assert importlib.util.find_spec('kernels') is None;"
        "q = torch.randn(1, 16, 5, 7);"
        "print(pansharp_fast.ops.cm3a(q, q, q, q, q, num_heads=2, backend='cpu')[0].shape)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 16, 5, 7])" in result.stdout


def test_import_is_light():
    """`import pansharp_fast` pulls in nothing that only scenes, training or plots need."""
    code = (
        "import sys, pansharp_fast;"
        "heavy = {'rasterio', 'h5py', 'matplotlib', 'diffusers', 'torchmetrics', 'skimage', 'click', 'rich', 'triton'};"
        "loaded = heavy & set(sys.modules); assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
