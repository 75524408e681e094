"""What is compared computes what it says, and says why where it cannot."""

import pytest
import torch
from cases import case
from torch.nn.attention import flex_attention
from torch.testing import assert_close

from dape.bench import flex, methods, parity
from dape.bench.case import FORWARD, TRAINING, Parts, build, draw, step
from dape.bench.methods import METHODS, chosen, sdpa_default
from dape.errors import UserError


@pytest.fixture
def graphs(monkeypatch):
    """Compile to graphs that run as they are, and let FlexAttention differentiate them on a CPU."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiled(f, backend="aot_eager", **options)
    )
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    monkeypatch.setattr(flex, "check", lambda case, parts: None)


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # what the compiler looks at
@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("textbook-compiled", "dape-kerple"),
        ("chunked-compiled", "dape-kerple"),
        ("chunked-compiled", "dape3-fire"),
        ("flex", "kerple"),
        ("flex", "alibi"),
        ("flex", "nope"),
        ("flex-table", "kerple"),
        ("flex-table", "t5"),
    ],
)
def test_what_is_compiled_equals_float64_with_every_gradient(graphs, monkeypatch, name, scheme):
    monkeypatch.setattr(methods, "CHUNK", 48)  # the last block is smaller
    one = case(scheme=scheme, length=256 if "flex" in name else 128, batch=1)
    checks = list(parity.checks_at(one, [METHODS[name]]))
    for check in checks:
        assert check.missing is None and check.within(check.worst), check
    forward, training = (set(check.errors) for check in checks)
    assert forward == {"output"}
    parameters = build(one).named_parameters
    assert training == {"output", "query", "key", "value", *parameters}


@pytest.mark.parametrize("length", [128, 512])
def test_the_mask_of_flexattention_is_the_one_it_makes_itself(length):
    device = torch.device("cpu")
    ours = flex.causal_mask(length, device)
    theirs = flex_attention.create_block_mask(
        lambda b, h, i, j: j <= i, None, None, length, length, device=device
    )
    assert torch.equal(ours.to_dense(), theirs.to_dense()) and ours.shape == theirs.shape
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    at = torch.arange(length)
    assert torch.equal(ours.mask_mod(0, 0, at[:, None], at), torch.ones(length, length).tril() > 0)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("flex", {"scheme": "fire"}, "no score_mod is written for FIRE"),
        ("flex-table", {"scheme": "fire"}, "FIRE depends on more than the distance"),
        ("flex-table", {"scheme": "nope"}, "the scheme has no bias for a table"),
        ("flex", {"scheme": "dape-kerple"}, "scores of a single head"),
        ("flex", {"scheme": "kerple", "device": torch.device("cuda")}, "not a multiple of 128"),
        ("flex", {"scheme": "kerple"}, "no backward pass on a CPU"),
        ("sdpa-cudnn", {}, "cuDNN needs a CUDA GPU"),
    ],
)
def test_a_case_that_cannot_be_expressed_has_a_reason(name, changes, reason):
    one = case(**changes)
    parts = build(case(scheme=one.scheme))
    if changes.get("device"):
        parts = Parts(None, None)  # the length is looked at before anything is made
    with pytest.raises(UserError, match=reason):
        METHODS[name].prepare(one, parts)


def test_a_step_gives_the_gradients_for_the_cotangent():
    one = case(scheme="kerple", dtype="fp32")
    parts, (inputs,) = build(one), draw(one, 1)

    def attend(query, key, value):
        return (
            query * parts.bias.raw_p[:, None, None] + 2 * key + 3 * value + parts.bias.raw_a.sum()
        )

    out, query, key, value, p, a = step(attend, inputs, parts, TRAINING)
    assert_close(query, inputs.cotangent * parts.bias.raw_p[:, None, None])
    assert_close(key, 2 * inputs.cotangent)
    assert_close(value, 3 * inputs.cotangent)
    assert_close(p, (inputs.cotangent * inputs.query).sum((0, 2, 3)))
    assert_close(a, inputs.cotangent.sum().expand(3))
    (alone,) = step(attend, inputs, parts, FORWARD)
    assert torch.equal(alone, out) and out.requires_grad and not alone.requires_grad


def test_the_yardstick_comes_first_and_each_method_once():
    assert [m.name for m in chosen(("cuda", "textbook", "cuda"))] == ["sdpa", "cuda", "textbook"]
    assert [m.name for m in chosen(("cuda", "sdpa"))] == ["sdpa", "cuda"]
    assert [m.name for m in chosen(())] == list(METHODS)
    with pytest.raises(UserError, match="unknown method 'cudda'; did you mean 'cuda'"):
        chosen(("cudda",))


def test_the_default_of_pytorch_is_named():
    (inputs,) = draw(case(), 1)
    assert sdpa_default(inputs) == "FLASH_ATTENTION"  # on a CPU
