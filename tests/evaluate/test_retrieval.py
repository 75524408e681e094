"""Retrieval by models whose every answer is known: they copy what they see, or cannot see it."""

import math
import re
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dape.data.tokenizer import byte
from dape.errors import UserError
from dape.evaluate.prompts import Prompt, passkey
from dape.evaluate.retrieval import Retrieval, evaluate_retrieval, load
from dape.evaluate.subject import Subject
from dape.evaluate.trials import Cell, Plan, retrieve, score
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM
from evaluations import PROVENANCE

VOCAB = 257
SURE = 0.9  # what a copying model gives the token that it copies
PHRASE = len("The pass key is")
ANSWER = len(" 12345")


class Copying:
    """Gives `SURE` to the token after the last place where the last tokens occurred before.

    It sees `window` tokens; without such a place all tokens are alike to it. `misread` maps a
    position of the answer's tokens to how many other tokens it puts before the right one there.
    """

    def __init__(self, window=10**6, misread=()):
        self.window, self.misread = window, dict(misread)

    def __call__(self, input_ids, logits_to_keep, use_cache):
        assert not use_cache
        rows = [self.row(row.tolist(), logits_to_keep) for row in input_ids]
        return SimpleNamespace(logits=torch.tensor(rows))

    def row(self, tokens, kept):
        ends = range(len(tokens) - kept + 1, len(tokens) + 1)
        return [self.logits(tokens[max(0, n - self.window) : n], n - ends[0]) for n in ends]

    def logits(self, seen, place):
        phrase = bytes(seen[-PHRASE:])
        found = bytes(seen[:-1]).rfind(phrase)
        if found < 0:
            return [0.0] * VOCAB
        logits = [math.log((1 - SURE) / (VOCAB - 1))] * VOCAB
        logits[seen[found + PHRASE]] = math.log(SURE)
        for other in range(self.misread.get(place, 0)):
            logits[200 + other] = 1.0  # bytes that no number has
        return logits


def cells(model, plan):
    return retrieve(model, passkey(byte()), plan, batch_tokens=3000)


def test_a_model_that_copies_finds_every_number_at_every_length_and_depth():
    plan = Plan(lengths=(300, 700), depths=(0.0, 0.4, 1.0), trials=3, seed=0)
    found, refused = cells(Copying(), plan)
    assert refused == {}
    places = [(cell.length, cell.depth) for cell in found]
    assert places == [(300, 0.0), (300, 0.4), (300, 1.0), (700, 0.0), (700, 0.4), (700, 1.0)]
    for cell in found:
        assert (cell.exact, cell.accuracy, cell.rank) == (1, 1, 1)
        assert cell.log_probability == pytest.approx(ANSWER * math.log(SURE), rel=1e-5)


@pytest.mark.parametrize("window", [150, 300, 420])
def test_a_model_finds_no_number_beyond_its_window(window):
    plan = Plan(lengths=(600,), depths=tuple(np.linspace(0, 1, 21)), trials=2, seed=0)
    found, _ = cells(Copying(window), plan)
    prompts = passkey(byte())
    visible = 0
    for cell in found:
        text = bytes(prompts.make(600, cell.depth, 0, seed=0).tokens.tolist()).decode()
        hidden = re.search(r"The pass key is \d{5}\.", text).start()
        sees = hidden >= len(text) - ANSWER - window
        visible += sees
        alone = -ANSWER * math.log(VOCAB)  # every token alike, the right one no better than any
        expected = (1, 1, 1, ANSWER * math.log(SURE)) if sees else (0, 0, VOCAB, alone)
        got = (cell.exact, cell.accuracy, cell.rank, cell.log_probability)
        assert got == pytest.approx(expected, rel=1e-5)
    assert 0 < visible < 21


def test_one_wrong_token_spoils_the_number_and_counts_as_one():
    plan = Plan(lengths=(300,), depths=(0.5,), trials=4, seed=0)
    ((cell,), _) = cells(Copying(misread={5: 1, 2: 3}), plan)
    assert cell.exact == 0
    assert cell.accuracy == pytest.approx(4 / 6)
    assert cell.rank == pytest.approx((4 * 1 + 2 + 4) / 6)


def test_scores_are_means_over_all_trials():
    """A model that misreads a token of every second number, the first, third and fifth of six."""
    models = cycle([Copying(misread={5: 1}), Copying()])
    plan = Plan(lengths=(300,), depths=(0.0, 1.0), trials=3, seed=0)
    first, second = retrieve(
        lambda **asked: next(models)(**asked), passkey(byte()), plan, batch_tokens=1
    )[0]
    assert (first.exact, second.exact) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (first.accuracy, second.accuracy) == (pytest.approx(16 / 18), pytest.approx(17 / 18))
    assert (first.rank, second.rank) == (pytest.approx(20 / 18), pytest.approx(19 / 18))


def test_a_tie_and_no_number_at_all_are_the_worst_rank():
    prompt = passkey(byte()).make(300, 0.5, 0, seed=0)
    for value in (0.0, math.nan):

        def constant(input_ids, logits_to_keep, use_cache, value=value):
            return SimpleNamespace(logits=torch.full((1, logits_to_keep, VOCAB), value))

        ((ranks, _),) = score(constant, [prompt], "cpu")
        assert ranks.tolist() == [VOCAB] * ANSWER


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DapeConfig(
        scheme="dape-kerple",
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return DapeForCausalLM(config).eval()


def test_exact_is_what_greedy_decoding_gives(model):
    """By `generate`, token by token through the cache."""
    prompt = passkey(byte()).make(300, 0.5, 0, seed=0)
    asked = torch.from_numpy(prompt.tokens[:-ANSWER])[None]
    greedy = model.generate(
        asked, max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=False, pad_token_id=256
    )
    ((ranks, _),) = score(model, [Prompt(greedy[0].numpy(), ANSWER)], "cpu")
    assert ranks.tolist() == [1] * ANSWER
    other = greedy[0].numpy().copy()
    other[-2] = (other[-2] + 1) % 256
    ((ranks, _),) = score(model, [Prompt(other, ANSWER)], "cpu")
    assert (ranks[:4] == 1).all() and ranks[4] > 1


def test_ranks_and_probabilities_are_those_of_the_whole_forward_in_float64(model):
    """Answers of other lengths in one batch, as tokenizers that join digits have them.

    A model may also give the logits of all tokens.
    """
    prompts = [
        Prompt(passkey(byte()).make(300, depth, 0, seed=0).tokens, answer)
        for depth, answer in ((0.1, 6), (0.9, 2), (0.5, 4))
    ]
    found = score(model, prompts, "cpu")
    found += score(lambda input_ids, **asked: model(input_ids=input_ids), prompts, "cpu")
    for prompt, (ranks, log_probabilities) in zip(prompts * 2, found, strict=True):
        tokens = torch.from_numpy(prompt.tokens)[None]
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0].double()
        for back in range(1, prompt.answer + 1):
            row, target = logits[-back - 1], int(tokens[0, -back])
            place = sorted(row.tolist(), reverse=True).index(row[target].item()) + 1
            assert ranks[-back] == place
            expected = (row[target] - row.logsumexp(0)).item()
            assert log_probabilities[-back] == pytest.approx(expected, abs=1e-4)
        assert len(ranks) == len(log_probabilities) == prompt.answer


def test_a_length_that_prompt_or_model_refuse_is_told_and_left_out():
    def short(input_ids, logits_to_keep, use_cache):
        if input_ids.shape[1] > 400:
            raise UserError("400 is all I read")
        return Copying()(input_ids, logits_to_keep, use_cache)

    told = []
    found, refused = retrieve(
        short,
        passkey(byte()),
        Plan((50, 400, 401), (0.25, 0.5), trials=2, seed=0),
        batch_tokens=1,
        announce=lambda *what: told.append(what),
    )
    assert [cell.length for cell in found] == [400, 400]
    assert refused == {50: "the prompt alone has 252 tokens", 401: "400 is all I read"}
    assert told[1] == (400, "exact 100%")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"depths": (0.5, -0.1)}, "depth=-0.1 must be at least 0"),
        ({"depths": (1.1,)}, "depth=1.1 must be at most 1"),
        ({"depths": (math.nan,)}, "depth=nan must be a finite number"),
        ({"trials": 0}, "trials=0 must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"tasks": ("passkey", "paskey")}, "unknown task 'paskey'"),
    ],
)
def test_questions_that_are_none_are_refused_before_a_model_is_opened(asked, message):
    with pytest.raises(UserError, match=message):
        evaluate_retrieval("nowhere", **asked)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    record = Retrieval(
        subject=Subject(
            run=str(tmp_path),
            scheme="kerple",
            train_length=16,
            seed=0,
            settings="those of a recipe",
            parameters=10,
        ),
        task="passkey",
        data=None,
        plan=Plan((300, 600), (0.0, 0.5), trials=3, seed=7),
        cells=[Cell(300, 0.0, 1.0, 1.0, 1.0, -0.1), Cell(300, 0.5, 0.0, 0.5, 9.0, -4.5)],
        refused={600: "too long"},
        provenance=PROVENANCE | {"seed": 7},
    )
    record.save(tmp_path / "retrieval" / "passkey.json")
    assert load(tmp_path / "retrieval" / "passkey.json") == record
    assert record.with_cells(record.cells[::-1], {600: "too long"}) == record
    values = record.values("rank")
    assert values[:, 0].tolist() == [1, 9] and np.isnan(values[:, 1]).all()
    with pytest.raises(
        UserError, match="the retrieval is missing; run `dape eval retrieval --tasks needle`"
    ):
        load(tmp_path / "retrieval" / "needle.json")
