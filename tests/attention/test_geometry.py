"""The bands and blocks of the fused kernels: what they cover, and how large they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dape.attention.fused.geometry import ALIGNMENT, Extent, bands_of


@st.composite
def extents(draw):
    batch, rows, keys = (draw(st.integers(1, most)) for most in (3, 700, 700))
    offset = draw(st.integers(-100, 400))
    return Extent(batch, rows, keys, offset, draw(st.booleans()), draw(st.integers(1, 9)))


@pytest.mark.parametrize("cut", [False, True])
@given(extent=extents(), room=st.integers(1, 60))
def test_every_visible_pair_is_in_one_band(cut, extent, room):
    scores = room * ALIGNMENT**2 * extent.numbers
    covered = torch.zeros(extent.batch, extent.rows, extent.keys, dtype=torch.int)
    for band in bands_of(extent, scores, cut):
        covered[band.batch, band.rows, band.keys] += 1
        assert band.shift == extent.offset + band.rows.start - band.keys.start
        assert band.rows.start % ALIGNMENT == band.keys.start % ALIGNMENT == 0
    assert covered.max() == 1
    if extent.causal:
        slots = torch.arange(extent.rows)[:, None] + extent.offset
        covered = covered[:, torch.arange(extent.keys) <= slots]
    assert (covered == 1).all()


@pytest.mark.parametrize("cut", [False, True])
@given(extent=extents(), room=st.integers(1, 60))
def test_a_band_knows_the_keys_of_earlier_rows_and_the_last_of_its_rows(cut, extent, room):
    seen = torch.zeros(extent.batch, extent.rows, extent.keys, dtype=torch.bool)
    for band in bands_of(extent, room * ALIGNMENT**2 * extent.numbers, cut):
        earlier = seen[band.batch, : band.rows.start].any(1)[:, band.keys]
        assert torch.equal(earlier, (torch.arange(band.sizes[2]) < band.summed).expand_as(earlier))
        seen[band.batch, band.rows, band.keys] = True
        visible = extent.visible(band.rows.stop)
        assert band.last == seen[band.batch, band.rows, visible - 1].all()


@given(extent=extents(), room=st.integers(1, 60))
def test_a_band_fits_the_scratch_or_is_as_low_as_may_be(extent, room):
    scores = room * ALIGNMENT**2 * extent.numbers
    for cut in (False, True):
        for band in bands_of(extent, scores, cut):
            batch, rows, keys = band.sizes
            padded = batch * rows * -(-keys // ALIGNMENT) * ALIGNMENT * extent.numbers
            assert padded <= scores or (batch == 1 and rows <= ALIGNMENT)


def test_long_sequences_are_cut_into_blocks_near_a_square():
    extent = Extent(1, 131072, 131072, 0, True, 12)
    lowest = [
        min(band.sizes[1] for band in bands_of(extent, 2**28, cut) if band.rows.stop < 131072)
        for cut in (False, True)
    ]
    assert lowest[0] < 200 and lowest[1] > 2000
