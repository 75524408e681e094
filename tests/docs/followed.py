"""Tests of what the recipes of CONTRIBUTING.md add, for the copy in which they were followed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import XGLMConfig, XGLMForCausalLM

import dape
from dape.attention.fused.formed import form_of
from dape.cli import main
from dape.evaluate.protocols import choose_blocks, protocol
from dape.figures.tables import describe_targets
from dape.positions.adapter import Temperature
from dape.positions.bias import SquareRoot
from dape.train.optimize import adamw
from dape.train.recipe import Recipe, override


def test_square_root():
    module = SquareRoot(num_heads=3).double()
    i, j = torch.tensor([4, 9]), torch.tensor([0, 4])
    roots = torch.tensor([[2, 0], [3, 5**0.5]], dtype=torch.float64)
    expected = torch.stack([-roots / h for h in (1, 2, 3)])
    torch.testing.assert_close(module(i, j), expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of a parameter that is none
def test_the_table_of_square_root_by_its_form():
    qkv, found = torch.randn(3, 1, 3, 40, 8), []
    for formed in (True, False):
        module = SquareRoot(num_heads=3)
        if formed:
            assert form_of(module)[0].endswith("SquareRoot")
        out = dape.attention(*qkv, module, backend="triton" if formed else "reference")
        (out * torch.linspace(-1, 2, 8)).sum().backward()
        found.append((out, module.strength.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_temperature():
    module = Temperature(num_heads=2).double()
    torch.nn.init.constant_(module.weight, 0.5)
    scores, bias = torch.randn(2, 1, 2, 3, 4).double()
    assert torch.equal(module(scores, bias[0]), 1.5 * (scores + bias[0]))
    config = dape.DapeConfig(
        scheme="rope", vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=3
    )
    dape.retrofit(dape.DapeForCausalLM(config), "temperature")


def test_double():
    tensors = torch.randn(3, 1, 2, 5, 4).bfloat16()
    scores = (tensors[0].double() @ tensors[1].double().mT / 2).tril()
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = (scores.softmax(-1) @ tensors[2].double()).bfloat16()
    assert torch.equal(dape.attention(*tensors, backend="double"), expected)
    with pytest.raises(dape.UserError, match="'double' cannot serve this call: the scores would"):
        dape.attention(*torch.zeros(3, 1, 1, 4097, 1), backend="double")


def test_amsgrad_reaches_the_optimizer(tmp_path, capsys):
    for value in (False, True):
        settings = override(Recipe(), {"optimizer": {"amsgrad": value}}).optimizer
        assert adamw(torch.nn.Linear(2, 2), settings).defaults["amsgrad"] is value
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("optimizer: {amsgrad: true}")
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "--help"])
    assert "--optimizer.amsgrad" in capsys.readouterr().out


def test_final_scores_the_last_token_of_each_window():
    rule = protocol("final", [4, 8])
    chosen = choose_blocks(rule, np.array([20]), documents=1, blocks=9, seed=0)
    for length in (4, 8):
        windows = chosen.windows(length)
        assert windows.scored == 1 and [int(end) - 1 for end in windows.ends] == [8, 16]


@pytest.fixture
def xglm():
    """Return a model whose weights are far from their start, with tokens and their mask."""
    sizes = {"d_model": 24, "num_layers": 2, "attention_heads": 6, "ffn_dim": 20}
    model = XGLMForCausalLM(XGLMConfig(vocab_size=61, eos_token_id=None, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids, mask = torch.randint(2, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 1, 0
    return model, ids, mask


@torch.no_grad()
def test_xglm_starts_unchanged_and_reads_its_cache(xglm):
    model, ids, mask = xglm
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    mounted = dape.retrofit(model)
    found = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    for parameter in mounted.adapters.parameters():
        parameter.add_(torch.randn_like(parameter))
    whole = model(ids, use_cache=False).logits
    assert (whole[1] - expected[1]).abs().max() > 1e-2
    first = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 7:], rtol=0, atol=1e-4)


def test_tables_describe_final():
    targets = SimpleNamespace(
        protocol="final", block=1, tokens=[1, 1], documents=[0, 3], split="test", bos=False
    )
    groups = [SimpleNamespace(evaluations=[SimpleNamespace(targets=targets)])]
    assert "the last token of each window" in describe_targets(groups)


def test_commands_know_final(tmp_path, capsys):
    for command in (["eval", "nowhere"], ["plot", "nowhere", "--out", "x.md"]):
        assert main([*command, "--protocol", "final"])
        assert "invalid choice" not in capsys.readouterr().err
