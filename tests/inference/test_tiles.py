"""Plans of tiles cover an axis once, and blending restores what the tiles were cut from."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pansharp_fast.inference.tiles import blend, plan

sizes = st.tuples(st.integers(0, 6), st.integers(1, 8)).map(lambda n: (16 * (2 * n[0] + n[1]), 16 * n[0]))


@given(length=st.integers(1, 3000), size=sizes)
@settings(deadline=None, max_examples=100)
def test_plan_covers_the_axis(length, size):
    tile, overlap = size
    spans = plan(length, tile, overlap)
    assert spans[0].read_start == spans[0].start == 0
    assert spans[-1].read_stop == spans[-1].stop == length
    for span in spans:
        assert 0 <= span.read_start <= span.start < span.stop <= span.read_stop <= length
        assert span.read_stop - span.read_start <= tile
        assert span.read_start % 8 == 0
        assert span.stop - span.start >= span.ramp_in + span.ramp_out
    for left, right in itertools.pairwise(spans):
        assert left.ramp_out == right.ramp_in == left.stop - right.start
        assert left.read_stop >= min(length, left.stop + overlap // 2)
        assert right.read_start <= max(0, right.start - overlap // 2)
    total = torch.zeros(length)
    for span in spans:
        total[span.start : span.stop] += span.weights()
    torch.testing.assert_close(total, torch.ones(length))


@given(height=st.integers(1, 400), width=st.integers(1, 400), size=sizes)
@settings(deadline=None, max_examples=25)
def test_blend_restores_the_image(height, width, size):
    image = torch.rand(2, height, width, generator=torch.Generator().manual_seed(height * 401 + width))
    rows, columns = plan(height, *size), plan(width, *size)
    out = torch.full_like(image, float("nan"))
    for top, left, piece in blend(rows, columns, lambda r, c: image[:, r.start : r.stop, c.start : c.stop]):
        target = out[:, top : top + piece.shape[1], left : left + piece.shape[2]]
        assert target.shape == piece.shape
        assert target.isnan().all(), "every pixel is finished once"
        target.copy_(piece)
    torch.testing.assert_close(out, image)


def test_blend_weighs_neighbours():
    rows, columns = plan(16, 512, 64), plan(600, 512, 64)
    pieces = list(blend(rows, columns, lambda r, c: torch.full((r.stop - r.start, c.stop - c.start), float(c.start))))
    joined = torch.cat([piece for _, _, piece in pieces], 1)[0]
    ramp = joined[384 : 384 + columns[1].ramp_in]
    assert joined[383] == 0
    assert joined[384 + columns[1].ramp_in] == 384
    assert (ramp.diff() > 0).all()


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        (500, 64, "tile: expected a positive multiple of 16, got 500"),
        (0, 0, "tile: expected a positive multiple of 16, got 0"),
        (512, 60, "overlap: expected 0 or a positive multiple of 16, got 60"),
        (512, -16, "overlap: expected 0 or a positive multiple of 16, got -16"),
        (128, 64, "tile: expected more than twice the overlap of 64, got 128"),
    ],
)
def test_plan_refuses(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        plan(1000, tile, overlap)
