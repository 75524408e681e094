"""The model under `torch.compile`: one graph for every length, the same loss and gradients."""

import pytest
import torch
from models import grown, tokens
from torch.testing import assert_close


@pytest.mark.unhooked
def test_one_graph_serves_every_length():
    torch.compiler.reset()
    model = grown(scheme="dape-kerple", num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(function, ids):
        model.zero_grad()
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())

    for length in (9, 13, 21):
        ids = tokens(2, length)
        torch._dynamo.mark_dynamic(ids, 1)
        stance = "default" if length == 9 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            ours = step(compiled, ids)
        for mine, theirs in zip(ours, step(model, ids), strict=True):
            assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
