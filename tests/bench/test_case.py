"""The problems of a benchmark: the recipes' shapes, and inputs that hide nothing."""

from pathlib import Path

import pytest
import torch
import yaml
from cases import case

from dape.bench.case import SHAPES, build, draw, shape
from dape.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_recipes(name):
    model = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"]
    heads = model["num_attention_heads"]
    assert shape(name) == (heads, model["hidden_size"] // heads)


def test_a_shape_may_be_heads_times_width():
    assert shape("5x48") == (5, 48)
    for wrong in ("5", "5x", "0x8", "125M"):
        with pytest.raises(UserError, match=f"'{wrong}' is neither .*125m.* nor heads x head_dim"):
            shape(wrong)


@pytest.mark.parametrize(
    ("scores", "size"),
    [(3 * 4 * 64, (4, 8)), (3 * 4 * 64 - 1, (2, 8)), (3 * 64 - 1, (1, 4)), (1, (1, 2))],
)
def test_a_case_shrinks_in_batch_and_then_in_length(scores, size):
    small = case(batch=4, length=8).at_most(scores)
    assert (small.batch, small.length) == size


def test_the_seed_decides_inputs_and_parameters():
    def drawn(seed):
        one = case(seed=seed)
        return [*draw(one, 2)[1], *build(one).named_parameters.values()]

    assert all(map(torch.equal, drawn(3), drawn(3)))
    assert not any(map(torch.equal, drawn(3), drawn(4)))


def test_sets_of_inputs_differ_and_have_the_dtype():
    first, second = draw(case(dtype="bf16"), 2)
    for one, other in zip(first, second, strict=True):
        assert one.shape == (2, 3, 9, 4) and one.dtype == torch.bfloat16
        assert not torch.equal(one, other)


@pytest.mark.parametrize("scheme", ["talking-heads-kerple", "cope", "dape-fire", "transformer-xl"])
def test_no_parameter_is_zero_and_building_draws_from_no_other_generator(scheme):
    before = torch.get_rng_state()
    parameters = build(case(scheme=scheme)).named_parameters
    assert parameters and all(p.any() and p.dtype == torch.float32 for p in parameters.values())
    assert torch.equal(before, torch.get_rng_state())
