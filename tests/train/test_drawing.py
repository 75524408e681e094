"""A model that starts in parts is the one that starts whole."""

import pytest
import torch

from dape import DapeConfig, DapeForCausalLM
from dape.train import drawing
from dape.train.drawing import Drawing, own_rows

SIZES = {"vocab_size": 33, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("scheme", ["dape-kerple", "dape-fire", "transformer-xl", "learned"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_keeps_its_rows_of_the_model_of_one_device(monkeypatch, scheme, tied):
    monkeypatch.setattr(drawing, "LARGE", 20)
    config = DapeConfig(scheme=scheme, tie_word_embeddings=tied, train_length=16, **SIZES)
    torch.manual_seed(1)
    whole, after = DapeForCausalLM(config), torch.rand(1)
    expected = dict(whole.named_parameters())
    for rank in range(3):
        torch.manual_seed(1)
        with Drawing(torch.device("cpu"), rank, ranks=3) as mode:
            model = DapeForCausalLM(config)
        assert torch.rand(1) == after, "as many random numbers were drawn"
        parameters, kept = dict(model.named_parameters()), mode.of(model)
        assert parameters.keys() == expected.keys()
        assert kept.keys() == {name for name, each in parameters.items() if each.is_meta}
        assert kept.keys() == {name for name, each in expected.items() if each.numel() > 20}
        for name, right in expected.items():
            if name in kept:
                assert torch.equal(kept[name], own_rows(right, rank, 3))
            else:
                assert torch.equal(parameters[name], right)


def test_a_filling_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(drawing, "LARGE", 20)
    with (
        Drawing(torch.device("cpu"), 0, 2),
        pytest.raises(NotImplementedError, match="filled in a buffer"),
    ):
        torch.empty(30).exponential_()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 9])
def test_rows_of_all_ranks_are_the_whole(ranks):
    """As FSDP2: ceil(rows / ranks) rows each, fewer or none for the last."""
    whole, most = torch.arange(10).view(5, 2), -(-5 // ranks)
    for rank in range(ranks):
        assert torch.equal(own_rows(whole, rank, ranks), whole[rank * most : (rank + 1) * most])
