"""Losses against brute force: models whose every probability is known without a forward."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dape.errors import UserError
from dape.evaluate.perplexity import measure, token_losses
from dape.evaluate.protocols import LAST_TOKENS, Windows, choose_blocks, protocol

VOCAB = 7
GENERATOR = np.random.default_rng(0)
DOCUMENTS = [GENERATOR.choice(VOCAB, n, p=np.arange(1, 8) / 28) for n in (1300, 40, 2700)]
TEXT_LENGTHS = np.array([len(document) for document in DOCUMENTS])


class Counting:
    """Predicts from how often each token came before: p(t) = (count_t + 1) / (tokens + VOCAB)."""

    def __call__(self, input_ids, logits_to_keep, use_cache):
        assert not use_cache
        counts = torch.nn.functional.one_hot(input_ids, VOCAB).double().cumsum(1) + 1
        logits = (counts / counts.sum(-1, keepdim=True)).log()
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def brute_force(document, target, context):
    """Return -log p of one token given the `context` tokens before it."""
    seen = Counter(document[target - context : target].tolist())
    return -math.log((seen[int(document[target])] + 1) / (context + VOCAB))


def evaluate(name, lengths, length, stride=None, batch_tokens=4096):
    blocks = choose_blocks(
        protocol(name, lengths, stride), TEXT_LENGTHS, documents=9, blocks=9, seed=0
    )
    windows = blocks.windows(length)
    return windows, token_losses(
        Counting(), DOCUMENTS.__getitem__, windows, batch_tokens=batch_tokens
    )


def test_last_counts_the_last_256_tokens_of_the_window_and_no_others():
    windows, losses = evaluate("last", [256, 1024], 1024)
    places = [(0, 1024), (2, 1024), (2, 2048)]
    expected = [
        [
            brute_force(DOCUMENTS[document], last - back, 1024 - back)
            for back in range(LAST_TOKENS - 1, -1, -1)
        ]
        for document, last in places
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    mean = measure(losses, windows, np.array([256, 512])).loss
    over_all_tokens = np.mean(
        [
            brute_force(DOCUMENTS[document], last - back, 1024 - back)
            for document, last in places
            for back in range(1024)
        ]
    )
    assert mean == pytest.approx(np.mean(expected), rel=1e-6)
    assert abs(mean - over_all_tokens) > 1e-3


@pytest.mark.parametrize("length", [64, 256])
def test_sliding_equals_brute_force(length):
    _, losses = evaluate("sliding", [64, 256], length, stride=32)
    stops = [257 + 32 * round(n) for n in np.linspace(0, (1300 - 257) // 32, 9)]
    expected = [
        brute_force(DOCUMENTS[0], stop - 32 + n, length - 31 + n)
        for stop in stops
        for n in range(32)
    ]
    np.testing.assert_allclose(losses[:9].ravel(), expected, rtol=1e-5)


@pytest.mark.parametrize("length", [64, 256])
def test_non_overlapping_equals_brute_force(length):
    _, losses = evaluate("non_overlapping", [64, 256], length)
    expected = [brute_force(DOCUMENTS[0], n + 1, n % length + 1) for n in range(5 * 256)]
    np.testing.assert_allclose(losses.ravel()[: 5 * 256], expected, rtol=1e-5)


def test_batches_change_nothing_and_report_every_token_fed():
    windows, together = evaluate("last", [16, 64], 64)
    fed = []
    alone = token_losses(
        Counting(), DOCUMENTS.__getitem__, windows, batch_tokens=1, advance=fed.append
    )
    np.testing.assert_array_equal(together, alone)
    assert fed == [64] * len(windows.ends)


def test_bits_per_byte_and_perplexity_are_exact():
    windows, losses = evaluate("last", [16, 64], 64)
    bytes_of_token = np.array([1, 2, 3, 4, 1, 2, 3])
    owners = np.unique(windows.documents)
    sizes = {document: 0 for document in owners.tolist()}
    for document, end in zip(windows.documents.tolist(), windows.ends, strict=True):
        sizes[document] += bytes_of_token[DOCUMENTS[document][end - 16 : end]].sum()
    measured = measure(losses, windows, np.array(list(sizes.values())))
    nats = float(losses.astype(np.float64).sum())
    assert measured.perplexity == pytest.approx(math.exp(nats / losses.size), rel=1e-12)
    assert measured.bits_per_byte == pytest.approx(
        nats / math.log(2) / sum(sizes.values()), rel=1e-12
    )


def test_documents_are_weighed_by_their_tokens_and_are_the_units_of_the_error():
    windows, losses = evaluate("last", [256, 1024], 1024)
    measured = measure(losses, windows, np.array([1, 1]))
    first, second = losses[0].mean(), losses[1:].mean()
    assert measured.document_losses == pytest.approx([first, second], rel=1e-6)
    assert measured.loss == pytest.approx((first + 2 * second) / 3, rel=1e-6)
    residuals = (first - measured.loss, 2 * (second - measured.loss))
    expected = math.sqrt(2 * (residuals[0] ** 2 + residuals[1] ** 2)) / 3
    assert measured.loss_error == pytest.approx(expected, rel=1e-4)


def test_the_error_over_many_documents_is_that_of_the_bootstrap():
    generator = np.random.default_rng(2)
    blocks = generator.integers(1, 6, 300)
    owner = np.repeat(np.arange(300), blocks)
    windows = Windows(64, 16, owner, np.full(len(owner), 64))
    levels = generator.normal(3.0, 0.5, 300)[owner]
    losses = generator.normal(levels[:, None], 0.2, (len(owner), 16)).astype(np.float32)
    sums = np.bincount(owner, weights=losses.sum(axis=1, dtype=np.float64))
    drawn = generator.integers(0, 300, (4000, 300))
    means = sums[drawn].sum(axis=1) / (16 * blocks[drawn].sum(axis=1))
    assert measure(losses, windows, None).loss_error == pytest.approx(means.std(), rel=0.04)


def test_one_document_has_no_standard_error():
    windows, losses = evaluate("last", [2048], 2048)
    assert measure(losses, windows, np.array([256])).loss_error is None


def test_context_bins_cover_the_scored_positions_and_average_them():
    windows, losses = evaluate("non_overlapping", [64], 64)
    bins = measure(losses, windows, np.array([1, 1])).contexts
    firsts, lasts, means = zip(*bins, strict=True)
    assert firsts[0] == 1 and lasts[-1] == 64
    assert all(first == last + 1 for first, last in zip(firsts[1:], lasts[:-1], strict=True))
    assert (firsts[-1], lasts[-1]) == (46, 64)
    assert means[-1] == pytest.approx(losses[:, 45:64].mean(), rel=1e-6)


def test_a_hopeless_model_has_an_infinite_perplexity_not_an_error():
    windows, losses = evaluate("last", [16], 16)
    measured = measure(np.full_like(losses, 1000.0), windows, np.array([16, 16, 16]))
    assert measured.perplexity == math.inf
    assert json.loads(json.dumps(measured.loss)) == 1000.0


def test_running_out_of_memory_names_the_length_and_the_remedy():
    def hungry(**_):
        raise torch.OutOfMemoryError

    blocks = choose_blocks(protocol("last", [16]), TEXT_LENGTHS, documents=1, blocks=1, seed=0)
    with pytest.raises(UserError, match=r"length 16 with 1 window .* lower --batch-tokens"):
        token_losses(hungry, DOCUMENTS.__getitem__, blocks.windows(16), batch_tokens=16)
