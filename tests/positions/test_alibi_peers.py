"""ALiBi against two published models that carry it, also where the heads are no power of two."""

import pytest
import torch
from torch.testing import assert_close

from dape.positions.bias import ALiBi

# BLOOM and MPT add a bias that depends on the key alone: the same for a softmax, row by row.


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 71, 112])
@pytest.mark.parametrize("peer", ["bloom", "mpt"])
def test_rows_differ_from_the_peer_s_by_a_constant(peer, heads):
    if peer == "bloom":
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        theirs = build_alibi_tensor(torch.ones(1, 16, dtype=torch.long), heads, torch.float32)
    else:
        from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

        theirs = build_mpt_alibi_tensor(heads, 16)
    positions = torch.arange(16)
    ours, theirs = ALiBi(heads)(positions, positions), theirs.view(heads, 1, 16).expand(-1, 16, -1)
    for i in range(16):
        row, peer_row = ours[:, i, : i + 1], theirs[:, i, : i + 1]
        # Of up to 15: a few roundings of float32.
        assert_close(row - row[:, -1:], peer_row - peer_row[:, -1:], rtol=0, atol=4e-6)
