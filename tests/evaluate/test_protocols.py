"""Which tokens each protocol scores, against enumerations written out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.evaluate.plan import plan
from dape.evaluate.protocols import choose_blocks, protocol
from folders import learned_tokenizer, prepare


def scored_targets(name, lengths, stride, text_lengths, blocks=10**6):
    """Return, for each length, the list of (document, target, tokens of context) scored."""
    rule = protocol(name, lengths, stride)
    chosen = choose_blocks(rule, np.array(text_lengths), documents=10**6, blocks=blocks, seed=0)
    result = {}
    for length in lengths:
        windows = chosen.windows(length)
        result[length] = [
            (int(document), int(end) - back, length - back + 1)
            for document, end in zip(windows.documents, windows.ends, strict=True)
            for back in range(windows.scored, 0, -1)
        ]
    return result


def test_last_scores_the_last_256_tokens_of_each_window_of_the_longest_length():
    targets = scored_targets("last", [256, 1024], None, [1024, 1025, 3000])
    starts = [(1, 769), (2, 769), (2, 1793)]
    assert targets[1024] == [
        (document, start + n, 769 + n) for document, start in starts for n in range(256)
    ]
    assert targets[256] == [
        (document, start + n, n + 1) for document, start in starts for n in range(256)
    ]


def test_last_scores_the_shortest_length_where_that_is_below_256():
    targets = scored_targets("last", [16, 64], None, [65])
    assert [target for _, target, _ in targets[64]] == list(range(49, 65))
    assert [context for _, _, context in targets[64]] == list(range(49, 65))
    assert [context for _, _, context in targets[16]] == list(range(1, 17))


def test_sliding_moves_by_the_stride_and_scores_only_what_is_new():
    targets = scored_targets("sliding", [8, 16], 4, [30])
    assert [target for _, target, _ in targets[16]] == list(range(13, 29))
    assert [context for _, _, context in targets[16]] == [13, 14, 15, 16] * 4
    assert [context for _, _, context in targets[8]] == [5, 6, 7, 8] * 4


@pytest.mark.parametrize("stride", [1, 4])
def test_the_least_and_the_greatest_stride_score_each_token_once(stride):
    targets = scored_targets("sliding", [4, 8], stride, [21])
    for length in (4, 8):
        assert [target for _, target, _ in targets[length]] == list(range(9 - stride, 21))
    assert {context for _, _, context in targets[4]} == set(range(5 - stride, 5))


def test_every_token_of_a_window_is_fed():
    chosen = choose_blocks(protocol("last", [4, 8]), np.array([25]), documents=1, blocks=9, seed=0)
    assert [chosen.windows(length).tokens for length in (4, 8)] == [3 * 4, 3 * 8]


def test_windows_of_one_token_score_each_token():
    chosen = choose_blocks(protocol("last", [1]), np.array([5]), documents=9, blocks=9, seed=0)
    windows = chosen.windows(1)
    assert (windows.ends - 1).tolist() == [1, 2, 3, 4] and windows.tokens == 4


def test_non_overlapping_scores_every_token_of_consecutive_windows():
    targets = scored_targets("non_overlapping", [4, 12], None, [26])
    assert [target for _, target, _ in targets[4]] == list(range(1, 25))
    assert [context for _, _, context in targets[4]] == [1, 2, 3, 4] * 6
    assert [context for _, _, context in targets[12]] == list(range(1, 13)) * 2


@given(
    rule=st.sampled_from([("last", None), ("sliding", 3), ("non_overlapping", None)]),
    text_lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6).map(lambda n: [*n, 40]),
    blocks=st.integers(1, 4),
)
def test_every_length_scores_the_same_targets_once_inside_the_text(rule, text_lengths, blocks):
    lengths = [4, 8, 16, 32]
    by_length = scored_targets(rule[0], lengths, rule[1], text_lengths, blocks)
    expected = [place[:2] for place in by_length[32]]
    assert len(set(expected)) == len(expected) > 0
    for length, places in by_length.items():
        assert [place[:2] for place in places] == expected
        for document, target, context in places:
            assert 1 <= context <= length
            assert target - context >= 0
            assert target < text_lengths[document]


def test_blocks_of_a_long_document_are_spread_evenly_over_it():
    rule = protocol("last", [10], None)
    chosen = choose_blocks(rule, np.array([1001]), documents=1, blocks=3, seed=0)
    assert chosen.stops.tolist() == [11, 511, 1001]


def test_documents_are_drawn_by_the_seed_among_those_long_enough():
    rule = protocol("last", [10], None)
    text_lengths = np.where(np.arange(100) % 2, 11, 10)
    draws = [
        choose_blocks(rule, text_lengths, documents=5, blocks=1, seed=seed).documents.tolist()
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(set(draw)) == 5 and all(n % 2 for n in draw) for draw in draws)
    assert draws == [sorted(draw) for draw in draws], "in the order of the losses of documents"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lst", [4]), "unknown protocol 'lst'; did you mean 'last'"),
        (("last", []), "of 1 token or more"),
        (("last", [0, 4]), "of 1 token or more"),
        (("last", [4], 2), "protocol last has no stride"),
        (("sliding", [4]), "protocol sliding needs a stride; .* --stride TOKENS"),
        (("sliding", [4, 8], 0), "stride 0: must be from 1 to the shortest length, 4"),
        (("sliding", [4, 8], 5), "stride 5: must be from 1 to the shortest length, 4"),
        (("non_overlapping", [4, 6, 8]), r"lengths \[6\].*divisors of the longest, 8"),
    ],
)
def test_what_does_not_fit_the_protocol_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        protocol(*arguments)


def test_a_corpus_without_long_documents_is_refused_and_its_longest_named():
    rule = protocol("last", [64], None)
    with pytest.raises(UserError, match=r"64: no document has the required 65 .* of 3 has 64"):
        choose_blocks(rule, np.array([5, 64, 9]), documents=1, blocks=1, seed=0)


def test_the_bytes_of_a_document_are_those_of_its_scored_text(tmp_path):
    """The last eight tokens, of one byte to several, of each window of the longest length."""
    learned_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = prepare(
        tmp_path, tokenizer=tmp_path / "tokenizer", sizes=[400, 300, 200], letters="abcd"
    )
    corpus, lengths = Corpus(data), [8, 32]
    found = plan(corpus, "test", protocol("last", lengths), lengths, documents=9, blocks=3, seed=0)
    part, decode = corpus.split("test"), corpus.tokenizer().decode
    targets, longest = found.targets, found.windows[-1]
    expected = dict.fromkeys(targets.documents, 0)
    for number, stop in zip(longest.documents.tolist(), longest.ends.tolist(), strict=True):
        expected[number] += len(decode(part.document(number)[stop - 8 : stop]))
    assert targets.bytes == list(expected.values())
    assert sum(targets.bytes) > sum(targets.tokens)
