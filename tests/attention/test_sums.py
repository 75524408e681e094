"""Partial sums of programs, added up by kernels, against float64 loops."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dape.attention.fused.sums import add_up, fold

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(torch.cuda.is_available(), reason="computed by Triton's interpreter"),
]
PROBLEM = SimpleNamespace(gated=lambda: {"gate": torch.zeros(1, dtype=torch.int32), "GATED": -1})
UNIT = torch.tensor(0.25)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("terms", "slots", "reach", "first", "step", "count"),
    [(3, 24, 36, -31, 4, 70), (1, 7, 32, -15, 16, 100), (70, 3, 32, 40, 16, 90)],
)
def test_lines_fold_onto_their_distances(terms, slots, reach, first, step, count, transposed):
    columns = 5
    lines = torch.randn(terms, slots, reach, columns + 1)
    if transposed:
        lines = lines.transpose(2, 3).contiguous().transpose(2, 3)
    expected = torch.zeros(count, columns, dtype=torch.float64)
    for slot in range(slots):
        for line in range(reach):
            distance = abs(first + slot * step + line)
            if distance < count:
                expected[distance] += lines[:, slot, line, :columns].double().sum(0) / 4
    table = torch.full((count, columns), torch.nan)
    fold(PROBLEM, lines, first, step, UNIT, table)
    assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("terms", "slots"), [(1, 1), (3, 5), (4, 300)])
def test_matrices_of_slots_are_summed_into_two_tables(terms, slots):
    rows, columns, room = 3, 5, (4, 8)
    sums = torch.randn(terms, slots, 2 * 32 + 16)  # the end of a slot holds other sums
    expected = sums[..., :64].double().sum((0, 1)).view(2, *room)[..., :rows, :columns] / 4
    tables = torch.full((2, rows, columns), torch.nan)
    add_up(PROBLEM, sums[..., :64], room, UNIT, tables[0], tables[1])
    assert_close(tables.double(), expected, rtol=1e-5, atol=1e-5)
