"""docs/official.md does what it says: the lines run, the commands train as the releases do."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from pansharp_fast import training
from pansharp_fast.cli import main
from pansharp_fast.compat import from_official
from pansharp_fast.models import (
    FSAConfig,
    FSAStudent,
    FSATeacher,
    PANCrafter,
    PriorConfig,
    PriorNet,
    load_model,
    preset,
)

TEXT = (Path(__file__).parents[1] / "docs" / "official.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = dict(re.findall(r"^\| .*? \| `(train (\w+) .*?)` \|$", TEXT, re.MULTILINE))


def test_four_lines_make_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = PANCrafter(preset("released", bands=8))
    (tmp_path / "best_reduced").mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "best_reduced/model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 4
    exec(BLOCKS[0], {})
    loaded = load_model("pancrafter.safetensors", bands=8)
    assert loaded.config.attention_keys == "released"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_lines_for_the_diffusion_networks():
    priors = PriorNet(PriorConfig.preset("released", bands=8)).state_dict()
    states = {
        "prior": priors,
        "student": FSAStudent(FSAConfig.preset("released", bands=8, teacher=False)).state_dict(),
        "teacher": FSATeacher(FSAConfig(bands=8, res_blocks=3)).state_dict(),
    }
    for line in BLOCKS[1].strip().splitlines():
        name = line.split(" = ")[0]
        values = {
            "from_official": from_official,
            "tensors": states[name],
            "prior_tensors": {"model_state_dict": priors},
        }
        exec(line, values)
        assert values[name].config.highpass_pan
    assert values["teacher"].prior is not None


OFFICIAL = {
    "pancrafter": {
        "preset": "released", "lr": 1e-4, "weight_decay": 0.01, "warmup": 100, "steps": 50_000, "batch_size": 48,
        "schedule": "cosine", "seed": 2025, "clip": 0.0, "ema": 0.0, "precision": "float32", "pan_weight": 1.0,
        "pan_share": 1.0, "sam_weight": 0.0,
    },
    "prior": {"preset": "released"},
    "teacher": {
        "preset": "released", "lr": 1e-4, "weight_decay": 1e-4, "warmup": 0, "steps": 400_000, "batch_size": 32,
        "schedule": "step", "milestones": (100_000, 200_000, 350_000), "seed": 2025, "clip": 0.003, "ema": 0.995,
        "ema_start": 20_000, "precision": "float32", "prediction": "sample", "sample_steps": 25, "prior": "PRIOR",
    },
    "student": {
        "preset": "released", "steps": 300_000, "batch_size": 32, "clip": 0.003, "knowledge": "released",
        "augment": False, "teacher": "TEACHER",
    },
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_settings_of_the_releases(monkeypatch, command):
    seen = []

    def train(name, config, resume, progress, **overrides):
        kind = training.recipe_class(name).config_class
        seen.append((name, training.load_config(kind, config, **overrides)))
        return {}

    monkeypatch.setattr(training, "train", train)
    arguments = [*shlex.split(command), "--train", "a.h5", "--valid", "b.h5", "--out", "c", "--sensor", "WV3"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    [(name, config)] = seen
    assert name == COMMANDS[command]
    assert {key: getattr(config, key) for key in OFFICIAL[name]} == OFFICIAL[name]


def test_every_script_has_its_command():
    assert sorted(COMMANDS.values()) == sorted(OFFICIAL) == sorted(training.RECIPES)
