"""A, B and f(A, B) of a model against formulas in float64, and what is told of them."""

import math
from contextlib import nullcontext
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import textbook
from dape.attention import chunked
from dape.attention.call import Call
from dape.attention.fused.serves import obstacle
from dape.data.shards import Corpus, Split
from dape.errors import UserError
from dape.evaluate.capture import Recorder, Row, capture
from dape.evaluate.heads import describe
from dape.evaluate.learned import choose_document, learned_rows, smooth
from dape.evaluate.subject import Model
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM
from dape.model.retrofit import retrofit
from evaluations import PROVENANCE, make

SCHEMES = [
    *("nope", "rope", "kerple", "fire", "t5", "sandwich", "cope", "transformer-xl"),
    *("dape-kerple", "dape-fire", "dape-add-alibi", "dape-concat-kerple", "dape-bias-kerple"),
    *("dape-rope", "dape3-kerple", "dape5-nope", "talking-heads-alibi"),
]


def grown(scheme, dtype=torch.float64, **sizes):
    """Return a model each of whose parameters has moved."""
    sizes = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, **sizes}
    config = DapeConfig(scheme=scheme, num_attention_heads=4, train_length=16, **sizes)
    model = DapeForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def weights_of(model, tokens):
    """Return what the model itself says of its attention: [layer][head, query, key]."""
    with torch.no_grad():
        return [x[0] for x in model(input_ids=tokens[None], output_attentions=True).attentions]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weights_are_those_that_the_model_gives_itself(scheme):
    model, tokens = grown(scheme), torch.randint(37, (24,))
    expected = weights_of(model, tokens)
    for query in (23, 9, 0):
        rows = capture(model, tokens, query=query)
        assert [row.layer for row in rows] == [0, 1]
        for row, weights in zip(rows, expected, strict=True):
            np.testing.assert_allclose(row.weights, weights[:, query, : query + 1], atol=1e-12)
            parts = row.scores + row.residual * row.bias + row.change
            np.testing.assert_allclose(parts, row.logits, atol=1e-12)


def scores_and_bias(model, layer, tokens, query):
    """Return A and B of a Kerple model by their formulas, from the inputs of a layer."""
    with torch.no_grad():
        states = model.model(input_ids=tokens[None], output_hidden_states=True).hidden_states
    block = model.model.layers[layer]
    attention = block.self_attn
    x = torch.nn.functional.layer_norm(
        states[layer][0],
        (32,),
        block.input_layernorm.weight,
        block.input_layernorm.bias,
        model.config.layer_norm_eps,
    )
    q = (x[query] @ attention.q_proj.weight.T + attention.q_proj.bias).view(4, 8)
    k = (x[: query + 1] @ attention.k_proj.weight.T + attention.k_proj.bias).view(-1, 4, 8)
    a = torch.einsum("hd,khd->hk", q, k) / math.sqrt(8)
    distance = torch.arange(query, -1, -1, dtype=torch.float64)
    p, scale = (
        torch.log1p(torch.exp(raw))
        for raw in (attention.position_bias.raw_p, attention.position_bias.raw_a)
    )
    return a, textbook.kerple(p, scale)(distance)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("dape-kerple", {}),
        ("dape-add-kerple", {"inputs": "sum"}),
        ("dape-concat-kerple", {"residual": False}),
        ("dape-bias-kerple", {"inputs": "bias"}),
        ("dape3-kerple", {}),
    ],
)
def test_scores_bias_and_change_are_those_of_the_formulas(scheme, options):
    model, tokens, query = grown(scheme), torch.randint(37, (20,)), 17
    for layer, row in enumerate(capture(model, tokens, query=query)):
        with torch.no_grad():
            a, b = scores_and_bias(model, layer, tokens, query)
            f = model.model.layers[layer].self_attn.adapter
            parts = (f.weight_in, f.bias_in, f.weight_out, f.bias_out)
            if f.kernel_size == 1:
                flat = (x.squeeze(-1) if x.ndim == 3 else x for x in parts)
                logits = textbook.dape(*flat, **options)(a, b, list(range(query + 1)))
            else:
                logits = textbook.dape_v2(*parts, **options)(a, b, list(range(query + 1)))
        assert row.residual == options.get("residual", True)
        change = logits - a - b * row.residual
        expected = {"scores": a, "bias": b, "logits": logits, "change": change}
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(row, name), values, atol=1e-10, err_msg=name)


def test_a_row_is_found_in_whatever_block_of_rows_it_falls(monkeypatch):
    model, tokens = grown("dape3-fire"), torch.randint(37, (40,))
    queries = (0, 6, 7, 20, 39)
    whole = [capture(model, tokens, [1], query)[0] for query in queries]
    monkeypatch.setitem(chunked.SCORES_PER_BLOCK, "cpu", 7 * 4 * 40)  # seven rows a block
    for query, expected in zip(queries, whole, strict=True):
        (row,) = capture(model, tokens, [1], query)
        np.testing.assert_allclose(row.logits, expected.logits, atol=1e-12)


def test_a_layer_asked_for_twice_is_the_same_twice():
    model, tokens = grown("dape-concat-kerple"), torch.randint(37, (12,))
    one, two = capture(model, tokens, [1, 1])
    assert not one.residual and not two.residual
    np.testing.assert_array_equal(one.change, two.change)


def test_the_model_is_left_as_it_was():
    for scheme in ("dape-kerple", "rope"):
        model, tokens = grown(scheme, backend="reference"), torch.randint(37, (12,))
        adapters = [layer.self_attn.adapter for layer in model.model.layers]
        before, names = model(tokens[None]).logits, list(model.state_dict())
        capture(model, tokens)
        assert [layer.self_attn.adapter for layer in model.model.layers] == adapters
        assert list(model.state_dict()) == names and model.config.backend == "reference"
        torch.testing.assert_close(model(tokens[None]).logits, before, rtol=0, atol=0)


def test_fused_kernels_know_no_recorder_so_that_auto_takes_the_chunked_backend():
    query = torch.zeros(1, 4, 8, 8)
    adapter = grown("dape-kerple").model.layers[0].self_attn.adapter
    for each, served in ((adapter, True), (Recorder(adapter, 0, range(1)), False)):
        reason = obstacle(Call(query, query, query, None, each))
        assert (reason is None) == served


@pytest.mark.parametrize("bias", [None, "kerple", "fire"])
def test_a_retrofitted_model_shows_its_own_weights(bias):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=37, hidden_size=32, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(37, (24,))
    with pytest.raises(UserError, match=r"LlamaForCausalLM does not call dape\.attention"):
        capture(model, tokens)
    mounted = retrofit(model, bias=bias, train="all")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = weights_of(model, tokens)
    for row, weights in zip(capture(model, tokens), expected, strict=True):
        np.testing.assert_allclose(row.weights, weights[:, -1], atol=1e-6)
        assert np.abs(row.change).max() > 0.01
        assert (np.abs(row.bias).max() > 0) == (bias is not None)
    mounted.unmount()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": [0, 2]}, "layer 2 is not one of 0 to 1"),
        ({"query": 5}, "query 5 is not one of 0 to 4"),
    ],
)
def test_a_layer_or_query_there_is_not_is_refused(asked, message):
    with pytest.raises(UserError, match=message):
        capture(grown("kerple"), torch.arange(5), **asked)


def row_of(scores, bias, change, residual=True):
    scores, bias, change = (np.atleast_2d(np.asarray(x, float)) for x in (scores, bias, change))
    return Row(0, residual, scores, bias, scores + residual * bias + change)


def test_a_head_is_named_by_how_dense_its_positive_weight_is_on_far_and_near_keys():
    """Ten keys, the last four of them near: 1 on some of them, centred."""
    near, far = [0] * 6 + [1] * 4, [1] * 6 + [0] * 4
    both = [1, 0, 1, 0, 1, 0, 1, 0, 1, 0]
    rows = row_of([[0] * 10] * 3, [[0] * 10] * 3, [near, far, both])
    heads = describe(rows, far=4)
    assert [head.kind for head in heads] == ["local", "anti-local", "even"]
    assert [head.positive_far for head in heads] == pytest.approx([0, 1, 3 / 5])
    e = math.e
    assert heads[0].attention_far == pytest.approx(6 / (6 + 4 * e))
    assert heads[1].centre == pytest.approx((e * (4 + 5 + 6 + 7 + 8 + 9) + 6) / (6 * e + 4))


@pytest.mark.parametrize(
    ("far", "near", "kind"),
    [(5, 1, "anti-local"), (7, 2, "even"), (5, 4, "even"), (3, 4, "local")],
)
def test_a_head_is_named_from_twice_the_density_on(far, near, kind):
    """Of 8 far and 4 near keys: densities 2.5, 1.75, 1 / 1.6 and 1 / 2.67 times as large."""
    change = [1] * far + [0] * (8 - far) + [1] * near + [0] * (4 - near)
    (head,) = describe(row_of([0] * 12, [0] * 12, change), far=4)
    assert head.kind == kind and head.positive_far == pytest.approx(far / (far + near))


def test_a_constant_changes_no_number_and_rounding_is_no_change():
    rng = np.random.default_rng(0)
    scores, bias, change = rng.normal(size=(3, 2, 50))
    row = row_of(scores, bias, change)
    moved = row_of(scores + 3, bias - 40, change + 100)
    for one, other in zip(describe(row, 20), describe(moved, 20), strict=True):
        for name in ("positive_far", "change_far", "attention_far", "with_scores", "with_bias"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-9)
    scores, bias = scores.astype(np.float32), bias.astype(np.float32)
    added = Row(0, True, scores, 1000 * bias, scores + 1000 * bias)  # no adapter
    assert added.change.any()
    for head in describe(added, 20):
        assert head.change_far is head.with_scores is head.with_bias is None
    faint = scores + bias + np.float32(2e-5) * change.astype(np.float32)
    for n, head in enumerate(describe(Row(0, True, scores, bias, faint), 20)):
        expected = np.corrcoef(change[n], scores[n])[0, 1]
        assert head.with_scores == pytest.approx(expected, abs=0.05), "a hundred times rounding"


def test_correlations_and_shares_are_those_of_numpy():
    rng = np.random.default_rng(1)
    scores, bias = rng.normal(size=(2, 3, 64))
    change = 2 * scores - bias + rng.normal(size=(3, 64))
    for residual in (True, False):
        row = row_of(scores, bias, change, residual)
        shift = change + residual * bias
        for head, found in enumerate(describe(row, 48)):
            expected = [np.corrcoef(change[head], x[head])[0, 1] for x in (scores, bias)]
            assert [found.with_scores, found.with_bias] == pytest.approx(expected)
            positive = np.maximum(shift[head] - shift[head].mean(), 0)
            assert found.positive_far == pytest.approx(positive[:16].sum() / positive.sum())


@given(st.integers(1, 70), st.integers(1, 40))
def test_spans_keep_the_mean_of_each_span(keys, spans):
    values = np.random.default_rng(keys).normal(size=(2, keys))
    edges = np.linspace(0, keys, min(spans, keys) + 1).astype(int)
    for head, line in enumerate(smooth(values, edges)):
        expected = [values[head, a:b].mean() for a, b in pairwise(edges)]
        np.testing.assert_allclose(line, expected, rtol=1e-4, atol=1e-12)


def test_keys_must_lie_on_both_sides():
    with pytest.raises(UserError, match="far=5 must be from 1 to 4: some of 5 keys near"):
        describe(row_of([1] * 5, [0] * 5, [0] * 5), 5)


def part(*lengths):
    """Return a split of documents of so many tokens and an end of text, each of one token."""
    return Mock(
        spec=Split,
        document_lengths=np.array(lengths) + 1,
        document=lambda n: np.array([*[n] * lengths[n], 36]),
    )


def test_a_document_is_chosen_by_its_tokens_without_the_end_of_text():
    documents = part(3, 70, 65, 70)
    for length, first in ((3, 0), (4, 1), (65, 1), (70, 1)):
        assert choose_document(documents, length, None) == first
    assert choose_document(documents, 65, 2) == 2 and choose_document(documents, 70, 3) == 3
    for length, document, message in (
        (71, None, "the longest of the 4 documents of the split has 70 tokens"),
        (66, 2, "document 2 has 65 tokens, below the length 66"),
        (3, 4, "document 4 is not one of 0 to 3"),
        (3, -1, "document -1 is not one of 0 to 3"),
    ):
        with pytest.raises(UserError, match=message):
            choose_document(documents, length, document)


@pytest.mark.parametrize(("trained", "far"), [(16, 16), (23, 23), (24, 12), (30, 12), (None, 12)])
def test_by_default_three_layers_read_the_first_long_document(trained, far):
    network = grown("kerple", num_hidden_layers=5)
    model = Mock(spec=Model, train_length=trained)
    model.loaded.return_value = nullcontext(network)
    model.subject.return_value = make("kerple", [2.0] * 5).subject
    splits = {"test": part(9, 30), "validation": part(40)}
    corpus = Mock(spec=Corpus, split=splits.get, checksum="c0ffee")
    cpu = torch.device("cpu")
    found = learned_rows(model, corpus, length=24, device=cpu, provenance=PROVENANCE)
    assert (found.document, found.query, found.far) == (1, 23, far)
    expected = capture(network, torch.ones(24, dtype=torch.long), [0, 2, 4], 23)
    for layer, row in zip(found.layers, expected, strict=True):
        assert layer.layer == row.layer and layer.heads == describe(row, far)
        for name in ("scores", "bias", "change"):
            np.testing.assert_allclose(getattr(layer, name), getattr(row, name), rtol=1e-4)
    model.loaded.return_value = nullcontext(network)
    asked = {"length": 24, "split": "validation", "device": cpu, "provenance": PROVENANCE}
    other = learned_rows(model, corpus, **asked)
    assert (other.split, other.document, other.length) == ("validation", 0, 24)
    (*_, row) = capture(network, torch.zeros(24, dtype=torch.long))
    np.testing.assert_allclose(other.layers[-1].scores, row.scores, rtol=1e-4)
