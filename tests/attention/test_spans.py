"""The results of spans of keys, merged, against softmax over all spans in float64."""

import pytest
import torch
from torch.testing import assert_close

from dape.attention.fused.problem import Result
from dape.attention.fused.spans import combine, parts_of, tile_of

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(torch.cuda.is_available(), reason="computed by Triton's interpreter"),
]


@pytest.mark.parametrize("limit", [None, 6.0, 9.0])
@pytest.mark.parametrize(
    ("spans", "heads", "rows", "width"),
    [(64, 3, 1, 40), (2, 2, 257, 64), (4, 260, 1, 16), (8, 5, 67, 24), (2, 1, 20, 128)],
)
def test_merged_spans_are_a_softmax_over_all_keys(spans, heads, rows, width, limit):
    shape = 2, heads, rows
    flag = torch.zeros(1 if limit else 0, dtype=torch.int32)
    out = torch.full((2, rows, heads, width), torch.nan).half().transpose(1, 2)
    lse, rest = torch.full(shape, torch.nan), torch.full_like(out, torch.nan)
    found = Result(out, lse, rest, flag)
    parts, parts_lse = parts_of(found, spans)
    parts.normal_(), parts_lse.uniform_(-5, 5)
    parts_lse[0, 1] = -torch.inf
    parts_lse[:, 0, 0, rows // 2] = -torch.inf  # no visible key
    parts[:, 0, 0, rows // 2] = 0
    parts_lse[-1, 1, -1, -1] = 8  # the largest, in the last row
    asks = {"gate": flag, "GATED": -1, "LIMIT": limit}
    combine(parts, parts_lse, asks | ({} if limit else {"gate": lse}), found)

    weight = parts_lse.double().softmax(0).nan_to_num(0.0)
    expected = (weight[..., None] * parts.double()).sum(0)
    assert_close(found.out.double() + found.rest.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(found.lse, parts_lse.double().logsumexp(0).float(), rtol=1e-6, atol=1e-6)
    most = found.lse.max().item()
    assert 8 <= most < 9
    assert not limit or flag.item() == (most > limit)


def test_a_program_merges_many_rows_where_rows_are_many():
    assert tile_of(2, 16, 1024, 64) == (32, 64)
    assert tile_of(4, 16, 33, 80) == (8, 128)
    assert tile_of(2, 600, 1, 64) == (1, 64)
    assert tile_of(64, 8, 64, 64) == (1, 16)
