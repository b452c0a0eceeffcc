"""Configuration files and flags."""

import dataclasses
import itertools

import pytest
from click.testing import CliRunner

from pansharp_fast.cli import main
from pansharp_fast.training import RECIPES, load_config, recipe_class
from pansharp_fast.training.config import TrainConfig
from pansharp_fast.training.loop import learning_rate

NEEDED_LINES = "train: a\nvalid: b\nout: c\n"
NEEDED = {"train": "a.h5", "valid": "b.h5", "out": "run"}


def test_flags_win_over_the_file_and_types_hold(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: a.h5\nvalid: b.h5\nout: run\nlr: 1e-3\nsteps: 100\nmilestones: [10, 20]\naugment: false\n")
    config = load_config(TrainConfig, file, steps="2e2", lr=None, ema="0.5", channels_last="false")
    assert (config.lr, config.steps, config.ema, config.milestones) == (1e-3, 200, 0.5, (10, 20))
    assert (config.augment, config.channels_last, config.peak) == (False, False, None)
    assert load_config(TrainConfig, file, milestones="5,6", peak="1023").milestones == (5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: a\nvalid: b\n", "expected train, valid, out, got none for out"),
        ("train: a\nvalid: b\nout: c\nlearning_rate: 1\n", "expected keys among .* got learning_rate"),
        ("train: a\nvalid: b\nout: c\nsteps: many\n", "steps: expected int, got 'many'"),
        ("train: a\nvalid: b\nout: c\nsteps: 1.5\n", "steps: expected int, got 1.5"),
        ("train: a\nvalid: b\nout: c\naugment: 3\n", "augment: expected bool, got 3"),
        ("train: a\nvalid: b\nout: c\nschedule: linear\n", "schedule: expected one of cosine, step, got 'linear'"),
        ("train: a\nvalid: b\nout: c\nbatch_size: 0\n", "batch_size: expected at least 1, got 0"),
        ("- a\n", "expected key: value lines, got list"),
        ("a: [\n", "expected YAML"),
    ],
)
def test_refused_configurations(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(TrainConfig, tmp_path / "c.yaml")


def test_learning_rate():
    cosine = TrainConfig(**NEEDED, lr=1.0, warmup=10, steps=110)
    rates = [learning_rate(cosine, step) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    step = TrainConfig(**NEEDED, lr=1.0, warmup=0, schedule="step", milestones=(3, 5))
    assert [learning_rate(step, i) for i in range(7)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_key_is_a_flag(name):
    result = CliRunner().invoke(main, ["train", name, "--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    for field in dataclasses.fields(recipe_class(name).config_class):
        line = next(line for line in result.output.splitlines() if f"--{field.name.replace('_', '-')} " in line)
        assert line.endswith("[required]") == (field.default is dataclasses.MISSING)


def test_unknown_recipe_is_a_usage_error():
    assert CliRunner().invoke(main, ["train", "nothing"]).exit_code == 2
    with pytest.raises(ValueError, match=r"recipe: expected one of .* got 'nothing'"):
        recipe_class("nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['id']", "without tags and aliases, got one in line 1"),
        ("train: a\nseed: !!python/name:os.system\n", "without tags and aliases, got one in line 2"),
        ("a: &a [x]\nb: &b [*a, *a]\nsteps: *b\n", "without tags and aliases, got one in line 2"),
        ("[" * 16000, "got more levels in line 1"),
        ("{" * 16000, "got more levels in line 1"),
        ("? " * 8000, "got more levels in line 1"),
        ("a: 1\n" * 4000, "expected at most 16384 bytes"),
        ("train: 2024-99-99", "expected YAML, got month must be"),
        ("steps: " + "9" * 10000, "expected YAML, got Exceeds the limit"),
        (
            f"{NEEDED_LINES}steps: 1e400",
            "steps: expected int, got '1e400'",
        ),
        (f"{NEEDED_LINES}steps: .inf", "steps: expected int, got inf"),
        (f"{NEEDED_LINES}lr: [1]", r"lr: expected float, got \[1\]"),
        (f"{NEEDED_LINES}schedule: {'x' * 9000}", "schedule: expected one of cosine, step, got 'xxx"),
        ("1: 2", "expected keys among .* got 1"),
        ("[1]: 2", "expected YAML"),
        ("\x00", "expected YAML"),
        ("\udcff", "expected YAML, got 'utf-8' codec"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        load_config(TrainConfig, tmp_path / "c.yaml")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500
