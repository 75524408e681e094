"""What mounted adapters compute: DAPE's formula inside each model's own code, in float64.

The formula is put where each model's own code can be reached without the package: an attention
function of the tests', with transformers' own masks, or the softmax of models that have no such
function.
"""

import itertools

import pytest
import torch
from models import fresh
from pretrained import ALIBI, NAMES, VOCABULARY, move, padded, pretrained, tokens
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import dape
from textbook import alibi_slopes, dape_v2, kerple, leaky_relu

OWN_CODE = ("bloom", "mpt", "falcon")
INTERFACE = [name for name in NAMES if not name.startswith((*OWN_CODE, "dape"))]


def f(adapter, inputs):
    """W2 leaky(W1 x + b1) + b2 at each query and key."""
    w1, w2 = adapter.weight_in[..., 0].double(), adapter.weight_out[..., 0].double()
    hidden = torch.einsum("dc,bcqk->bdqk", w1, inputs) + adapter.bias_in.double()[:, None, None]
    return (
        torch.einsum("hd,bdqk->bhqk", w2, leaky_relu(hidden))
        + adapter.bias_out.double()[:, None, None]
    )


def distances(rows, keys):
    return (torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)).double()


def textbook_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs
):
    """softmax(A + f([A; B]) + mask) v, or A + f(A) without a bias."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    inputs, bias = scores, module.position_bias
    if bias is not None:
        delta = distances(*scores.shape[2:]).abs().flatten()
        shift = kerple(bias.p.double(), bias.a.double())(delta).view(scores.shape[1:])
        inputs = torch.cat([scores, shift.expand_as(scores)], dim=1)
    weights = (scores + f(module.adapter, inputs) + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def textbook_taps(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """softmax(A + f([A; B])) v, each query over the keys that it sees, f along these keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    p, a = module.position_bias.p.double(), module.position_bias.a.double()
    bias = kerple(p, a)(distances(*scores.shape[2:]).abs().flatten()).view(scores.shape[1:])
    names = ("weight_in", "bias_in", "weight_out", "bias_out")
    parameters = (module.adapter.get_parameter(name).double() for name in names)
    logits_of = dape_v2(*parameters, residual=False)
    out = torch.zeros_like(query)
    for row, i in itertools.product(range(scores.shape[0]), range(scores.shape[2])):
        seen = (attention_mask[row % attention_mask.shape[0], 0, i] == 0).nonzero().flatten()
        weights = logits_of(scores[row, :, i], bias[:, i], seen.tolist()).softmax(-1)
        out[row, :, i] = torch.einsum("hk,hkd->hd", weights, value[row][:, seen])
    return out.transpose(1, 2), None


AttentionInterface.register("textbook", textbook_attention)
AttentionMaskInterface.register("textbook", eager_mask)
AttentionInterface.register("taps", textbook_taps)
AttentionMaskInterface.register("taps", eager_mask)


def mounted(name, bias, **options):
    """Return a float64 model whose adapters have learned something."""
    model = pretrained(name, torch.float64)
    handle = dape.retrofit(model, bias=bias, **options)
    move(handle.adapters.double(), 0.3)
    for module in handle.attentions:
        module._forward_pre_hooks.clear()  # which refuse attentions but the package's own
    return model


@pytest.mark.parametrize("bias", ["kerple", None])
@pytest.mark.parametrize("name", INTERFACE)
def test_scores_become_a_and_f_inside_the_models_own_code(name, bias):
    model, ids = mounted(name, bias), tokens(2, 12)
    with torch.no_grad():
        ours = model(ids, use_cache=False).logits
        model.config._attn_implementation = "textbook"
        for module in model.modules():
            if hasattr(module, "adapter") and bias is None:
                module.position_bias = None
        theirs = model(ids, use_cache=False).logits
        model.config._attn_implementation = "eager"
        own = model(ids, use_cache=False).logits
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (ours - own).abs().max() > 0.01, "or the adapters did nothing"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_f_goes_along_the_keys_that_a_query_sees(name):
    """Windows drop keys, and Gemma 2 caps the scores that f reads."""
    model, ids = mounted(name, "kerple", adapter="dape3"), tokens(2, 9)
    with torch.no_grad():
        ours = model(ids, use_cache=False).logits
        model.config._attn_implementation = "taps"
        theirs = model(ids, use_cache=False).logits
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_distances_are_those_of_the_positions_of_the_caller(name, monkeypatch):
    model, ids = mounted(name, "kerple"), tokens(2, 6)
    positions = torch.tensor([0, 3, 4, 8, 9, 13])
    given = {"attention_mask": torch.ones_like(ids), "position_ids": positions[None]}
    apart = (positions[:, None] - positions).double()
    monkeypatch.setitem(globals(), "distances", lambda *_: apart)
    with torch.no_grad():
        ours = model(ids, use_cache=False, **given).logits
        model.config._attn_implementation = "textbook"
        theirs = model(ids, use_cache=False, **given).logits
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_the_same_beside_padding(name):
    model = mounted(name, "kerple")
    ids, mask = padded()
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, use_cache=False).logits
        model.config._attn_implementation = "textbook"
        theirs = model(ids, attention_mask=mask, use_cache=False).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-9, atol=1e-9)


def key_bias(name, heads, length):
    """What the models with code of their own add to the score of each key."""
    slopes = alibi_slopes(heads)[:, None]
    positions = torch.arange(length).double()
    if name == "mpt":
        return slopes * (positions - (length - 1))
    if name == "falcon-alibi":
        return (slopes.bfloat16() * positions.bfloat16()).double() / 2  # heads of four
    return slopes * positions if name in ALIBI else torch.zeros(heads, length).double()


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(OWN_CODE)])
def test_the_same_for_models_with_code_of_their_own(name, monkeypatch):
    """Their softmax is given the logits that the formula makes of what it is given."""
    model, ids = mounted(name, None), tokens(2, 12)
    heads = model.config.num_attention_heads
    shift = key_bias(name, heads, 12)[:, None]
    bias = shift - shift.mT
    added = 2 if name == "falcon-alibi" else 1  # its eager code adds ALiBi twice
    with torch.no_grad():
        ours = model(ids, use_cache=False).logits
    modules = [module for module in model.modules() if hasattr(module, "adapter")]
    adapters = [module.adapter for module in modules]
    softmax, order = torch.nn.functional.softmax, iter(adapters)

    def with_adapter(logits, dim, dtype=None):
        scores = logits.double() - added * shift
        pair = [scores, bias.expand_as(scores)] if name in ALIBI else [scores]
        seen = torch.ones(12, 12).tril().bool()
        change = f(next(order), torch.cat(pair, dim=1)).masked_fill(~seen, 0)
        return softmax(scores + shift + change, dim=dim)

    for module in modules:
        del module.forward
    model.config._attn_implementation = "eager"
    monkeypatch.setattr(torch.nn.functional, "softmax", with_adapter)
    with torch.no_grad():
        theirs = model(ids, use_cache=False).logits
    assert next(order, None) is None
    # MPT takes its scores and ALiBi to float32 on the way.
    assert_close(ours, theirs, rtol=0, atol=1e-6 if name == "mpt" else 1e-9)


@pytest.mark.parametrize("heads", [4, 6, 16])
def test_falcons_alibi_is_its_own_tensor_less_that_of_the_query(heads):
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    from dape.model.retrofit.architectures import FalconALiBi

    theirs = (
        build_alibi_tensor(torch.ones(1, 700, dtype=torch.long), heads, torch.float32).view(
            heads, 700
        )
        / 3**0.5
    )
    query, key = torch.tensor([5, 300, 699]), torch.arange(700)
    expected = theirs[:, None, :] - theirs[:, query, None]
    assert_close(FalconALiBi(heads, head_dim=3)(query, key), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("base", ["rope", "alibi"])
def test_a_model_of_ours_becomes_that_of_the_scheme_with_the_adapter(base):
    model, ids = mounted(f"dape-{base}", None), tokens(2, 12)
    whole = fresh(scheme=f"dape-{base}", vocab_size=VOCABULARY).double()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(model(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)


def test_each_form_of_the_adapter_is_the_one_the_table_promises():
    plain = dape.retrofit(pretrained("llama")).adapters[0]
    assert plain["adapter"].inputs == "scores" and "position_bias" not in plain
    new = dape.retrofit(pretrained("llama"), bias="kerple").adapters[0]
    assert (new["adapter"].inputs, new["adapter"].residual) == ("concat", False)
    assert isinstance(new["position_bias"], dape.Kerple)
    own = dape.retrofit(pretrained("bloom")).adapters[0]
    assert (own["adapter"].inputs, own["adapter"].residual) == ("concat", True)
    assert "position_bias" not in own
