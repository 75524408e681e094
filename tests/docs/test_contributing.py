import pytest
import torch
from pages import blocks

import dape
from dape.positions import bias as bias_module
from dape.positions import scheme


@pytest.fixture
def example(monkeypatch):
    definition, line = blocks("CONTRIBUTING.md", "python")
    names = dict(vars(bias_module))
    exec(definition, names)
    base = eval(line, {**vars(scheme), **names})
    for added in (base, scheme.compose(scheme.ADAPTERS["dape"], base)):
        monkeypatch.setitem(scheme.SCHEMES, added.name, added)
    return names["SquareRoot"]


def test_the_bias_is_its_formula(example):
    module = example(num_heads=3).double()
    i, j = torch.tensor([4, 9]), torch.tensor([0, 4])
    roots = torch.tensor([[2, 0], [3, 5**0.5]], dtype=torch.float64)
    expected = torch.stack([-roots / h for h in (1, 2, 3)])
    torch.testing.assert_close(module(i, j), expected, rtol=1e-6, atol=0)


def test_its_schemes_decode_from_a_cache_as_in_one_pass(example):
    for name in ("square-root", "dape-square-root"):
        config = dape.DapeConfig(
            scheme=name, vocab_size=11, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
        )
        model = dape.DapeForCausalLM(config).eval()
        tokens = torch.randint(11, (2, 9))
        whole = model(tokens).logits
        first = model(tokens[:, :6], use_cache=True)
        rest = model(tokens[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(rest.logits, whole[:, 6:], rtol=0, atol=1e-6)
