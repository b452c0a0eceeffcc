"""YAML files from strangers: a configuration, or a refusal in one line."""

from hypothesis import given
from hypothesis import strategies as st

from pansharp_fast.training import load_config
from pansharp_fast.training.config import TrainConfig

from .mutations import fuzz_settings

NEEDED_LINES = "train: a\nvalid: b\nout: c\n"
TOKENS = [
    "!!", "!", "&a", "*a", "[", "]", "{", "}", ": ", "- ", "? ", "\n", " ", "steps", "lr", "1", "e", "<<", "'", '"',
    "|",
    ">", "%", "@", "#", "---", "\t", "~", "null", ".inf", "0x", "true", "é", "\x00", "2001-01-01", "1:2:3", ",",
]  # fmt: skip


@fuzz_settings
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(TOKENS), max_size=40).map("".join)), st.booleans())
def test_any_text_is_a_configuration_or_refused(tmp_path, text, valid_before):
    (tmp_path / "c.yaml").write_bytes(((NEEDED_LINES if valid_before else "") + text).encode(errors="replace"))
    message = ""
    try:
        load_config(TrainConfig, tmp_path / "c.yaml")
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
