"""Checkpoints from strangers: whatever the file says, it is refused in one line and allocates nothing."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pansharp_fast.models import (
    CheckpointError,
    FSAConfig,
    FSAStudent,
    FSATeacher,
    PANCrafter,
    PriorConfig,
    PriorNet,
    Universal,
    UniversalConfig,
    load_model,
    preset,
    save_model,
)

from .mutations import fuzz_settings

NAMES = ("pancrafter", "prior", "teacher", "student", "universal")
NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 65, 10**9, 10**30, 2**62, 2**63, 2**64, 1.5, float("nan"), float("inf"), True]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=10), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name -> bytes of a small checkpoint."""
    path = tmp_path_factory.mktemp("checkpoints") / "model.safetensors"
    config = {"inner_channel": 8, "channel_mults": (1, 2), "attn_res": (16,), "res_blocks": 1}
    models = (
        PANCrafter(preset("tiny", hidden_sizes=(8, 8), depth=(1, 1), num_heads=2)),
        PriorNet(PriorConfig.preset("tiny", bands=4)),
        FSATeacher(FSAConfig(bands=4, prior=PriorConfig(bands=4, hidden=8, blocks=1), **config)),
        FSAStudent(FSAConfig(bands=4, **config)),
        Universal(UniversalConfig(band_width=8, trunk_width=8, depth=(0, 1), num_heads=2)),
    )
    contents = {}
    for name, model in zip(NAMES, models, strict=True):
        save_model(path, model)
        contents[name] = path.read_bytes()
    return contents


def split(content):
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def joined(header, data):
    line = json.dumps(header).encode()
    return len(line).to_bytes(8, "little") + line + data


def check(path, content):
    """Loads, or is refused in one short line."""
    path.write_bytes(content)
    message = ""
    try:
        load_model(path)
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000


@fuzz_settings
@given(name=st.sampled_from(NAMES), data=st.data())
def test_bytes(files, tmp_path, name, data):
    content = bytearray(files[name])
    header = len(split(files[name])[0])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.one_of(st.integers(0, 16), st.integers(0, header), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    check(tmp_path / "m.safetensors", bytes(content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))]))


@fuzz_settings
@given(
    name=st.sampled_from(NAMES),
    number=st.integers(0, 1000),
    field=st.sampled_from(["dtype", "shape", "data_offsets"]),
    value=st.one_of(
        VALUES, st.lists(NUMBERS, max_size=5), st.sampled_from(["F64", "BOOL", "U8", "F8_E4M3", "I64", "BF16"])
    ),
)
@example(name="prior", number=0, field="shape", value=[2**62, 0])
@example(name="prior", number=0, field="dtype", value="F8_E4M3")
@example(name="prior", number=0, field="data_offsets", value=[0, 2**63])
def test_headers(files, tmp_path, name, number, field, value):
    header, data = split(files[name])
    tensors = [key for key in header if key != "__metadata__"]
    header[tensors[number % len(tensors)]][field] = value
    check(tmp_path / "m.safetensors", joined(header, data))


@fuzz_settings
@given(name=st.sampled_from(NAMES), number=st.integers(0, 100), value=VALUES)
@example(name="pancrafter", number=0, value=10**9)
@example(name="pancrafter", number=1, value=[10**9, 10**9])
@example(name="pancrafter", number=2, value=[1] * 1000)
@example(name="teacher", number=0, value=None)
@example(name="student", number=3, value=[10**9])
def test_configurations(files, tmp_path, name, number, value):
    header, data = split(files[name])
    config = json.loads(header["__metadata__"]["config"])
    keys = list(config)
    config[keys[number % len(keys)]] = value
    header["__metadata__"]["config"] = json.dumps(config)
    check(tmp_path / "m.safetensors", joined(header, data))


@fuzz_settings
@given(name=st.sampled_from(NAMES), key=st.sampled_from(["architecture", "config", "metadata"]), value=st.text())
@example(name="prior", key="config", value="[" * 100_000)
@example(name="prior", key="metadata", value="[1]")
@example(name="prior", key="config", value='{"bands": ' + "9" * 5000 + "}")
@example(name="prior", key="architecture", value="x" * 100_000)
@example(name="prior", key="architecture", value="uknow-teacher")
def test_metadata(files, tmp_path, name, key, value):
    header, data = split(files[name])
    header["__metadata__"][key] = value
    check(tmp_path / "m.safetensors", joined(header, data))


ABSURD = [
    {"hidden_sizes": [16384, 16384]},
    {"hidden_sizes": [10**6, 10**6]},
    {"bands": 10**8},
    {"depth": [10**8, 10**8]},
    {"depth": [64, 64], "hidden_sizes": [16384, 16384]},
    {"ka": 10**5 + 1},
    {"mlp_ratio": 1e12},
    {"s_embed_size": 10**10, "modulation": "embedding"},
]


def test_a_small_file_allocates_little(files, tmp_path):
    """In a process that may hold 4 GiB (torch itself takes some 2 of address space) each is refused in one line."""
    paths = []
    for number, changes in enumerate(ABSURD):
        header, data = split(files["pancrafter"])
        config = json.loads(header["__metadata__"]["config"]) | changes
        header["__metadata__"]["config"] = json.dumps(config)
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(joined(header, data))
    code = (
        "import resource, sys\n"
        "from pansharp_fast.models import CheckpointError, load_model\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        load_model(path)\n"
        "    except CheckpointError as error:\n"
        "        assert chr(10) not in str(error)\n"
        "        print('refused')\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, 'memory'\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["refused"] * len(ABSURD)


def test_other_dtypes_of_files_are_read(tmp_path):
    model = PriorNet(PriorConfig.preset("tiny", bands=4))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        save_model(tmp_path / "m.safetensors", model.to(dtype))
        assert next(load_model(tmp_path / "m.safetensors").parameters()).dtype == torch.float32


def test_the_same_content_gives_the_same_bytes(tmp_path):
    model = PriorNet(PriorConfig.preset("tiny", bands=4))
    for number in range(8):
        save_model(tmp_path / f"{number}.safetensors", model, {"step": 3, "validation": {"psnr": 1.5}})
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("saved", ["safetensors", "pickle"])
def test_a_raw_official_file_names_the_way(tmp_path, saved):
    from safetensors.torch import save_file

    state = PriorNet(PriorConfig.preset("tiny", bands=4)).state_dict()
    path = tmp_path / "model.safetensors"
    if saved == "safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save({"model_state_dict": state}, path)
    with pytest.raises(CheckpointError, match=r"compat.from_official and save_model .* see docs/official.md"):
        load_model(path)
