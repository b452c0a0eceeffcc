"""Allowed values: one list for the library and the command line."""

import subprocess
import sys
import warnings

import pytest
import torch
from click.testing import CliRunner

from pansharp_fast import options
from pansharp_fast.cli import main
from pansharp_fast.diffusion import Sampling
from pansharp_fast.inference import Sharpener
from pansharp_fast.training import load_config, recipe_class


def config(**values):
    return load_config(recipe_class("pancrafter").config_class, None, train="a", valid="b", out="c", **values)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [("auto", "auto"), ("float32", "float32"), ("fp32", "float32"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_both_spellings_of_a_precision_everywhere(spelling, name):
    assert options.precision(spelling) == name
    assert config(precision=spelling).precision == name
    assert Sharpener(precision=spelling).precision == name
    for command in ("sharpen", "evaluate"):
        parameter = next(p for p in main.commands[command].params if p.name == "precision")
        context = main.commands[command].make_context(command, [], resilient_parsing=True)
        assert parameter.process_value(context, spelling) == name


def test_unknown_values_are_refused_with_the_list():
    message = "precision: expected one of auto, float32, bfloat16, got 'int4'"
    for refuse in (options.precision, lambda value: config(precision=value), lambda value: Sharpener(precision=value)):
        with pytest.raises(ValueError, match=message):
            refuse("int4")
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, dpm\+\+, got 'euler'"):
        Sampling(sampler="euler")
    result = CliRunner().invoke(main, ["sharpen", "a", "b", "c", "--precision", "int4"])
    assert result.exit_code == 2
    assert "expected one of auto, float32, bfloat16, got 'int4'" in result.output


@pytest.mark.parametrize("native", [True, False])
def test_auto_follows_the_cpu_and_emulation_warns_once(monkeypatch, native):
    monkeypatch.setattr(options, "_has_bfloat16", lambda kind: native)
    options._warn_of_emulation.cache_clear()
    cpu = torch.device("cpu")
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)

    def dtype(name):
        with options.autocast(name, cpu):
            return layer(x).dtype

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dtype("auto") == (torch.bfloat16 if native else torch.float32)
        assert dtype("float32") == torch.float32
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [dtype("bf16"), dtype("bfloat16")] == [torch.bfloat16] * 2
    assert [str(each.message) for each in caught] == (
        []
        if native
        else [
            "precision: expected float32 or auto on a CPU without bfloat16 units, got bfloat16, which takes 8 to 10 "
            "times as long as float32 there"
        ]
    )


def test_training_chooses_precision_by_the_device_unless_told():
    assert config().precision == "auto"
    assert config(precision="float32").precision == "float32"


@pytest.mark.parametrize("name", ["auto", "", None])
def test_device_auto(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert options.device(name) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert options.device(name) == torch.device("cuda")


def test_sharpen_with_a_model_that_has_no_shipped_weights():
    result = CliRunner().invoke(main, ["sharpen", "a.tif", "b.tif", "c.tif", "--model", "uknow-student"])
    assert result.exit_code == 2
    assert result.output == (
        "Error: --weights: expected a file with weights of uknow-student (none come with the package), got none\n"
    )


def test_warnings_are_one_line():
    code = (
        "import warnings\n"
        "from pansharp_fast.cli import main\n"
        "main.command('warn')(lambda: warnings.warn('something: expected this, got that'))\n"
        "main(['warn'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "Warning: something: expected this, got that\n"
