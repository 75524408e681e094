"""The model under `torch.compile`: one graph for every length, the same loss and gradients."""

import pytest
import torch
from models import grown, tokens
from pretrained import move, of_one_layer, pretrained
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers import CompileConfig

import dape
from dape.positions.scheme import ADAPTERS, BASES

# A convolution over 5 or 7 keys has the operators of one over 3 keys, in longer sums.
COMPILED = [*BASES, *(f"{name}-kerple" for name in ADAPTERS if name not in ("dape5", "dape7"))]


@pytest.mark.unhooked
@pytest.mark.parametrize("block", ["paper", "modern"])
def test_one_graph_serves_every_length(block):
    torch.compiler.reset()
    model = grown(scheme="dape-kerple", num_hidden_layers=1, block=block).train()
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


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["dape-kerple", "llama"])
@torch.no_grad()
def test_masks_and_positions_may_come_with_a_later_length(name):
    """The length is a symbol then, and the length of the first mask is a number."""
    torch.compiler.reset()
    if name == "llama":
        model = of_one_layer(pretrained(name, torch.float64))
        move(dape.retrofit(model, bias="kerple").adapters, 0.3)
    else:
        model = grown(scheme=name, num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    causal, positions = torch.ones(8, 8, dtype=torch.bool).tril(), torch.arange(6)
    both = {"attention_mask": torch.ones(3, 6, dtype=torch.long), "position_ids": positions[None]}
    calls = [
        (tokens(2, 4), {}),
        (tokens(3, 6), both),
        (tokens(2, 8), {"attention_mask": causal[None, None]}),
    ]
    for ids, given in calls:
        ours, theirs = (f(ids, use_cache=False, **given).logits for f in (compiled, model))
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.unhooked
@pytest.mark.parametrize("scheme", COMPILED)
def test_every_scheme_compiles_whole(scheme):
    torch.compiler.reset()
    model = grown(scheme=scheme, num_hidden_layers=1).eval()  # random positions are for training
    ids = tokens(2, 11)

    def step(function):
        model.zero_grad()
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)

    ours = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for mine, theirs in zip(ours, step(model), strict=True):
        assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.unhooked
@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-fire", "rope"])
def test_generating_with_a_static_cache_compiles_whole(scheme):
    """As `generate` does by itself on a GPU: a graph for the prompt, and one for every token."""
    torch.compiler.reset()
    counters.clear()
    model = grown(scheme=scheme, num_hidden_layers=1)
    ids, mask = tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    if scheme != "dape3-fire":  # which refuses hidden tokens between others
        mask[1, 2] = 0
    options = {
        "attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": "static",
    }  # fmt: skip
    whole = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    whole._compile_all_devices = True
    compiled = model.generate(ids, compile_config=whole, **options)
    assert counters["stats"]["unique_graphs"] == 2
    assert torch.equal(compiled, model.generate(ids, **options))
