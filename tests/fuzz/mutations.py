"""Damaged files, and what a reader may do with them."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

#: Damaged files by target that once failed: tried first, for ever.
KEPT = Path(__file__).parent / "inputs"
#: Examples of each target; PANSHARP_FAST_FUZZ=100000 searches for hours.
EXAMPLES = int(os.environ.get("PANSHARP_FAST_FUZZ", "40"))

fuzz_settings = settings(
    max_examples=EXAMPLES,
    deadline=10_000,
    derandomize="PANSHARP_FAST_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@st.composite
def damaged(draw: Any, content: bytes, words: tuple[bytes, ...] = ()) -> bytes:
    """`content` with bytes changed, cut out, repeated or cut off; most often in its first kilobyte.

    Args:
        content: a good file.
        words: sequences to look for, after which changes are likely to matter.
    """
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        if not data:
            break
        spots = [st.integers(0, len(data) - 1), st.integers(0, min(1023, len(data) - 1))]
        places = [place for word in words if (place := data.find(word)) >= 0]
        if places:
            spots.append(st.sampled_from(places).flatmap(lambda at: st.integers(at, at + 24)))
        at = min(draw(st.one_of(spots)), len(data) - 1)
        kind = draw(st.sampled_from(["set", "set", "set", "extreme", "remove", "repeat", "cut"]))
        if kind == "set":
            data[at] = draw(st.integers(0, 255))
        elif kind == "extreme":
            value = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\0\0\0\x80"]))
            data[at : at + len(value)] = value
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at:]
    return bytes(data)


def survives(read: Callable[[], object], *refusals: type[BaseException]) -> None:
    """`read` succeeds, or fails by one of `refusals`."""
    with contextlib.suppress(*refusals):
        read()


def kept(target: str) -> list[bytes]:
    """Damaged files of a target that once failed."""
    return [path.read_bytes() for path in sorted(KEPT.glob(f"{target}-*"))]
