"""The code of docs/own-model.md does what the page says."""

import contextlib
import io

import pytest
import torch
from pages import execute, text
from torch.nn.functional import scaled_dot_product_attention

import dape
from dape.attention.select import BACKENDS

PAGE = "docs/own-model.md"
close = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        names = execute(PAGE)
    return {**names, "screen": screen.getvalue()}


def textbook(page, logits):
    """Return attention in float64, given the logits of every query and key."""
    later = torch.ones(256, 256, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1) @ page["value"].double()


def parts(page):
    """Return the scores A and the bias B in float64."""
    position = torch.arange(256)
    scores = page["query"].double() @ page["key"].double().mT / 8
    return scores, page["bias"](position, position).double()


def test_three_lines_are_the_formula(page):
    scores, bias = parts(page)
    logits = page["adapter"].double()(scores, bias[None])
    page["adapter"].float()
    torch.testing.assert_close(page["out"].double(), textbook(page, logits), **close)


def test_cached_decoding_is_one_pass(page):
    torch.testing.assert_close(page["rest"], page["whole"][:, 60:], **close)
    torch.testing.assert_close(page["first"], page["whole"][:, :60], **close)


def test_padding_changes_nothing(page):
    torch.testing.assert_close(page["padded"][:, :, 56:], page["alone"], **close)
    torch.testing.assert_close(page["padded_fire"][:, :, 56:], page["alone_fire"], **close)


def test_parts_of_the_keys_merge_to_the_whole(page):
    torch.testing.assert_close(page["merged"], page["out"], **close)


def test_adapters_of_ones_own_are_their_formulas(page):
    scores, bias = parts(page)
    torch.testing.assert_close(page["gated"].double(), textbook(page, scores + bias), **close)
    counts = torch.arange(1, 257).double()[:, None]
    logits = (scores + bias) * (1 + 0.1 * counts.log())
    torch.testing.assert_close(page["sharper"].double(), textbook(page, logits), **close)


def test_without_bias_and_adapter_it_is_pytorchs_own(page):
    given = [page[name] for name in ("query", "key", "value")]
    expected = scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(dape.attention(*given), expected, **close)


def test_the_refusal_and_the_order_are_those_of_the_page(page):
    assert page["screen"].strip() in text(PAGE)
    assert f"first of {', '.join(f'`{name}`' for name in [*BACKENDS][:3])} that works" in text(PAGE)
