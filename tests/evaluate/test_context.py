"""Use of the context: distances by brute force, gains of models whose losses are known."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dape.errors import UserError
from dape.evaluate.context import (
    NEVER,
    context_use,
    evaluate_context,
    last_occurrence,
    load,
    tally,
    window_needed,
)
from dape.evaluate.evaluation import evaluate
from dape.evaluate.gains import by_adapter, by_length, check_comparable, gain
from dape.evaluate.opening import open_model
from dape.evaluate.plan import plan
from dape.evaluate.protocols import protocol
from dape.evaluate.watch import Watch
from dape.model.modeling import DapeForCausalLM
from dape.runs import RunFolder, unfinished
from evaluations import PROVENANCE
from folders import make_run, prepare

ORIGIN = PROVENANCE | {"precision": "fp32"}
LENGTHS = [16, 32, 64, 128]
BLOCK = 16
SURE, UNSURE = 0.1, 4.0  # nats of a token that is seen in the context, and of another


def brute_force(symbols):
    """O(n^2): the nearest earlier place of the same symbol."""
    back = (
        [d for d in range(1, i + 1) if symbols[i - d] == symbols[i]] for i in range(len(symbols))
    )
    return [min(found, default=NEVER) for found in back]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_distances_are_those_of_brute_force(symbols):
    assert last_occurrence(np.array(symbols)).tolist() == brute_force(symbols)


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 12), st.integers(2, 9))
def test_a_window_holds_an_occurrence_from_the_length_that_is_needed_on(seed, fed, scored, vocab):
    """Windows of every length are cut out and searched."""
    tokens = np.random.default_rng(seed).integers(0, vocab, fed + 1)
    scored = min(scored, fed)
    needed = window_needed(tokens, scored)
    for length in range(1, fed + 1):
        context = tokens[-1 - length : -1]
        for place in range(scored):
            if scored - place > length:
                continue  # this window does not reach the token
            before = context[: length - (scored - place) + 1].tolist()
            target = tokens[len(tokens) - scored + place]
            assert (needed["token"][place] <= length) == (target in before)
            pairs = list(pairwise(before))
            assert (needed["pair"][place] <= length) == ((before[-1], target) in pairs)


class Copying(torch.nn.Module):
    """Knows what follows; it gives `SURE` if that stands within the last `reach` tokens it sees.

    It finds the window in the text of the documents, in bytes.
    """

    def __init__(self, documents, vocab, reach):
        super().__init__()
        self.documents = [bytes(tokens[:-1].tolist()) for tokens in documents]
        self.vocab, self.reach = vocab, reach

    def forward(self, input_ids, logits_to_keep, use_cache):
        rows = [self.row(bytes(row.tolist()), logits_to_keep) for row in input_ids]
        return SimpleNamespace(logits=torch.tensor(rows, dtype=torch.float64))

    def row(self, window, kept):
        ((text, start),) = [(t, t.find(window)) for t in self.documents if window in t]
        ends = range(len(window) - kept + 1, len(window) + 1)
        return [self.logits(window[:end], text[start + end]) for end in ends]

    def logits(self, seen, target):
        loss = SURE if target in seen[-self.reach :] else UNSURE
        logits = [math.log(-math.expm1(-loss) / (self.vocab - 1))] * self.vocab
        logits[target] = -loss
        return logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run whose corpus has documents of 200 characters, of 60 different ones."""
    folder = tmp_path_factory.mktemp("context")
    letters = "".join(chr(code) for code in range(33, 93))
    data = prepare(folder, sizes=[260, 300, 180, 220], letters=letters)
    return open_model(make_run(folder / "run", data, "kerple"))


def measured(run, monkeypatch, reach, **changes):
    corpus = run.corpus(None)
    documents = [corpus.split("test").document(n) for n in range(4)]
    model = Copying(documents, corpus.vocab_size, reach)
    monkeypatch.setattr(type(run), "loaded", lambda *_: nullcontext(model))
    asked = plan(corpus, "test", protocol("last", LENGTHS), LENGTHS, documents=9, blocks=2, seed=0)
    found = context_use(run, asked, device=torch.device("cpu"), batch_tokens=512, provenance=ORIGIN)
    subject = replace(found.subject, run=f"runs/{reach}-{changes.get('scheme')}")
    return replace(found, subject=replace(subject, **changes))


def occurrences(run, record, what):
    """Return document, distance and needed window of each scored token, by brute force."""
    corpus = run.corpus(None)
    part = corpus.split("test")
    asked = plan(corpus, "test", protocol("last", LENGTHS), LENGTHS, documents=9, blocks=2, seed=0)
    longest = asked.windows[-1]
    for index, end in zip(longest.documents.tolist(), longest.ends.tolist(), strict=True):
        tokens = part.document(index).tolist()
        for target in range(end - BLOCK, end):
            near = [
                distance
                for distance in range(1, target + 1 - (what == "pair"))
                if tokens[target - distance] == tokens[target]
                and (what == "token" or tokens[target - distance - 1] == tokens[target - 1])
            ]
            distance = min(near, default=NEVER)
            yield index, distance, distance + end - 1 - target + (what == "pair")


@pytest.mark.parametrize("reach", [1, 20, 48, 10**6])
@pytest.mark.parametrize("what", ["token", "pair"])
def test_the_gain_is_in_the_bins_that_the_model_can_reach(run, monkeypatch, reach, what):
    """A bin gains the fraction of its tokens that the long window holds and the short does not."""
    record = measured(run, monkeypatch, reach)
    (found,) = by_length([record], what)
    token = dict(enumerate(occurrences(run, record, "token")))
    edges = [0, *LENGTHS, NEVER * 2]
    for place, (least, most) in enumerate(pairwise(edges)):
        saved = [
            (UNSURE - SURE)
            * (
                (token[number][1] <= reach and token[number][2] <= LENGTHS[-1])
                - (token[number][1] <= reach and token[number][2] <= LENGTHS[0])
            )
            for number, (_, _, needed) in enumerate(occurrences(run, record, what))
            if least < needed <= most
        ]
        assert found.gains[place].tokens == len(saved)
        if saved:
            assert found.gains[place].mean == pytest.approx(np.mean(saved), abs=1e-5)
    if what == "token":
        within, *means, nowhere = [round(each.mean, 4) for each in found.gains]
        assert within == nowhere == 0
        full = UNSURE - SURE
        if reach == 48:
            assert means[0] == full > means[1] > 0 == means[2]
        elif reach == 10**6:
            assert means == [full] * 3
        elif reach == 1:
            assert abs(found.total.mean) < 1e-6


def test_an_adapter_gains_where_it_reaches_and_its_base_does_not(run, monkeypatch):
    records = [
        measured(run, monkeypatch, 1, seed=0),
        measured(run, monkeypatch, 10**6, scheme="dape-kerple", seed=0),
        measured(run, monkeypatch, 1, scheme="alibi", seed=0),
        measured(run, monkeypatch, 1, scheme="dape-fire", seed=0),
    ]
    (found,) = by_adapter(records, "token")
    assert found.name == "dape-kerple over kerple"
    full = pytest.approx(UNSURE - SURE, abs=0.5)
    assert [each.mean for each in found.gains] == [full] * 4 + [pytest.approx(0, abs=1e-6)]
    (short,) = by_adapter(records, "token", length=16)
    assert [each.mean for each in short.gains[1:]] == [pytest.approx(0, abs=1e-6)] * 4
    assert short.gains[0].mean == full


def test_the_base_of_an_adapter_was_trained_at_its_length(run, monkeypatch):
    records = []
    for length in (16, 64):
        for scheme in ("kerple", "dape-kerple"):
            made = measured(run, monkeypatch, 1, scheme=scheme, train_length=length)
            about = {"settings": f"{length}", "run": f"{scheme}-{length}"}
            records.append(replace(made, subject=replace(made.subject, **about)))
    names = ["dape-kerple at 16 over kerple at 16", "dape-kerple at 64 over kerple at 64"]
    assert [each.name for each in by_adapter(records, "token")] == names


def test_the_base_of_an_adapter_was_trained_on_its_texts(run, monkeypatch):
    records = []
    for text in ("old", "new"):
        for scheme in ("kerple", "dape-kerple"):
            made = measured(run, monkeypatch, 1, scheme=scheme)
            about = {"trained_on": text, "run": f"{scheme}-{text}"}
            records.append(replace(made, subject=replace(made.subject, **about)))
    names = [f"dape-kerple (dape-kerple-{x}) over kerple (kerple-{x})" for x in ("old", "new")]
    assert [each.name for each in by_adapter(records, "token")] == names


def test_seeds_of_a_scheme_are_averaged(run, monkeypatch):
    records = [measured(run, monkeypatch, reach, seed=reach) for reach in (1, 10**6)]
    (both,), (alone,) = by_length(records, "token"), by_length(records[1:], "token")
    means = [each.mean for each in both.gains]
    assert means == pytest.approx([each.mean / 2 for each in alone.gains], abs=1e-6)


def test_losses_by_position_fall_where_the_first_repetition_can_stand(run, monkeypatch):
    record = measured(run, monkeypatch, 10**6)
    assert (record.positions[0][0], record.positions[-1][1]) == (1, 128)
    losses = {last: loss for _, last, loss in record.positions}
    assert losses[1] > losses[16] > losses[128]


def test_a_tally_counts_every_token_once_in_its_document_and_bin():
    needed = np.array([[3, 10], [11, NEVER], [10, 20]])
    losses = [np.arange(6.0).reshape(3, 2), 10 * np.arange(6.0).reshape(3, 2)]
    found = tally(needed, losses, np.array([0, 1, 1]), [10, 20])
    assert found.tokens == [[2, 1], [0, 2], [0, 1]]
    assert found.losses[0] == [[1, 4], [0, 2 + 5], [0, 3]]
    assert found.losses[1] == [[10, 40], [0, 70], [0, 30]]
    alone = tally(np.array([[3]]), [np.ones((1, 1))], np.array([0]), [10, 20])
    assert alone.tokens == [[1], [0], [0]] and alone.losses == [[[1.0], [0.0], [0.0]]]


def test_the_interval_is_that_of_the_mean_over_documents():
    """Documents of equal size: the standard error is that of a mean."""
    rng = np.random.default_rng(0)
    saved = rng.normal(0.3, 1.0, 200) * 50
    found = gain(saved, np.full(200, 50))
    means = saved / 50
    error = means.std(ddof=1) / math.sqrt(200)
    assert found.mean == pytest.approx(means.mean())
    assert (found.low, found.high) == pytest.approx(
        (means.mean() - 1.96 * error, means.mean() + 1.96 * error), abs=0.1 * error
    )


def test_the_interval_of_two_documents_is_from_the_one_to_the_other():
    """Of four equally likely draws, one is twice the first, and one twice the second."""
    found = gain(np.array([2.0, 12.0]), np.array([2, 4]))
    assert (found.mean, found.low, found.high) == (14 / 6, 1.0, 3.0)


def test_draws_without_a_document_with_tokens_say_nothing():
    found = gain(np.array([2.0, 6.0, 0.0, 0.0, 0.0]), np.array([1, 3, 0, 0, 0]))
    assert (found.mean, found.low, found.high) == (2.0, 2.0, 2.0)


def test_no_tokens_have_no_gain_and_one_document_no_interval():
    assert gain(np.zeros(3), np.zeros(3, dtype=int)).mean is None
    alone = gain(np.array([0.0, 6.0]), np.array([0, 4]))
    assert (alone.tokens, alone.mean, alone.low, alone.high) == (4, 1.5, None, None)


def test_what_is_saved_is_what_is_loaded(run, monkeypatch, tmp_path):
    record = measured(run, monkeypatch, 20)
    path = RunFolder(tmp_path).evaluation("context")
    record.save(path)
    assert path == tmp_path / "evaluation" / "context.json" and load(path) == record
    with pytest.raises(UserError, match="run `dape eval context` on the model"):
        load(RunFolder(tmp_path).evaluation("context", None, "validation"))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("lengths", [16], r"lengths \[16\]: give two lengths or more"),
        ("lengths", [32, 16], r"lengths \[32, 16\]: give two lengths or more"),
        ("lengths", [16, 32, 64], "the tally of token has not each bin and document"),
        ("tallies", lambda old: {"token": old["token"]}, r"tallies of \['token'\], not of"),
        ("tallies", lambda old: old | {"pair": replace(old["pair"], tokens=[])}, "of pair has not"),
        ("tallies", lambda old: old | {"pair": replace(old["pair"], losses=[[]])}, "of pair has n"),
    ],
)
def test_a_record_of_other_bins_is_refused(run, monkeypatch, name, damage, message):
    record = measured(run, monkeypatch, 1)
    changed = damage(record.tallies) if callable(damage) else damage
    with pytest.raises(UserError, match=message):
        replace(record, **{name: changed})


class Counted(Watch):
    """A `Watch` that stops the evaluation after a number of tokens."""

    def __init__(self, most=math.inf):
        self.most, self.fed, self.expected, self.kept, self.notes = most, 0, 0, [], []

    def begin(self, tokens):
        self.expected = tokens

    def advance(self, tokens):
        self.fed += tokens
        if self.fed > self.most:
            raise KeyboardInterrupt

    def announce(self, name, length, outcome):
        self.kept.append(length)

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_killed_evaluation_goes_on_and_ends_as_if_nothing_had_been(run, tmp_path, done):
    lengths, asked = [16, 32, 64], {"out": tmp_path, "documents": 3}
    (expected,) = evaluate_context(run.folder, None, lengths, **asked, watch=(whole := Counted()))
    file = tmp_path / "run" / "evaluation" / "context.json"
    file.unlink()
    most = sum(lengths[:done]) * whole.expected // sum(lengths)
    with pytest.raises(KeyboardInterrupt):
        evaluate_context(run.folder, None, lengths, **asked, watch=Counted(most))
    assert not file.exists() and unfinished(file).exists() == (done > 0)
    (found,) = evaluate_context(run.folder, None, lengths, **asked, watch=(watch := Counted()))
    assert watch.kept == lengths[:done] and watch.fed == watch.expected == whole.expected
    assert watch.notes == whole.notes == []
    assert load(file).tallies == found.tallies == expected.tallies
    assert found.positions == expected.positions
    assert [each.name for each in file.parent.iterdir()] == ["context.json"]


def test_what_was_measured_is_measured_anew_when_anything_is_different(run, tmp_path):
    def kept(lengths=(16, 32), **changes):
        watch = Counted()
        asked = {"out": tmp_path, "documents": 3} | changes
        evaluate_context(run.folder, None, lengths, **asked, watch=watch)
        return watch.kept, len(watch.notes)

    assert kept() == ([], 0) and kept() == ([16, 32], 0) and kept(again=True) == ([], 0)
    assert kept(lengths=(16, 32, 64)) == kept(documents=1) == ([], 1), "the old file is replaced"
    assert kept(documents=1) == ([16, 32], 0) and kept(documents=2) == ([], 1)


def test_the_tokens_are_of_the_split_and_of_the_seed_asked_for(run, tmp_path):
    def targets(measure, **asked):
        (found,) = measure(run.folder, None, [16, 32], out=tmp_path, again=True, **asked)
        return found.targets

    asked = [{"documents": 2, "blocks": 1, "seed": seed} for seed in range(4)]
    found = [targets(evaluate_context, **each) for each in asked]
    assert found == [targets(evaluate, **each) for each in asked]
    assert [each.tokens for each in found] == [[BLOCK] * 2] * 4
    assert len({tuple(each.documents) for each in found}) > 1, "the seed chooses the documents"
    other = targets(evaluate_context, split="validation")
    assert (other.split, other.documents) == ("validation", [0]), "its only document"


@pytest.mark.parametrize(
    ("name", "value"), [("seed", -1), ("documents", 0), ("blocks", 0), ("batch_tokens", 0)]
)
def test_numbers_of_an_evaluation_that_are_none_are_refused(run, name, value):
    with pytest.raises(UserError, match=f"{name}={value} must be at least"):
        evaluate_context(run.folder, None, [16, 32], **{name: value})


def test_a_folder_in_16_bits_is_measured_as_modules_in_float32(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = DapeForCausalLM.from_pretrained(run.folder.model).bfloat16()
    folder = shutil.copytree(run.folder, tmp_path / "run")
    network.save_pretrained(folder / "model")
    asked = {"corpus": run.corpus(None), "lengths": [16, 32], "documents": 3}
    found = evaluate_context([folder, network.float(), network], **asked)
    assert [each.subject.run for each in found] == [str(folder), "models[1]", "models[2]"]
    for each in found[1:]:
        assert (each.tallies, each.positions) == (found[0].tallies, found[0].positions)
        assert each.subject.weights is None
    assert [*tmp_path.iterdir()] == [folder], "modules in memory have no folder"


def test_records_of_other_tokens_are_not_compared(run, monkeypatch):
    one = measured(run, monkeypatch, 1)
    check_comparable([one, measured(run, monkeypatch, 1, scheme="alibi")])
    for other in ({"lengths": [8, 32, 64, 128]}, {"targets": replace(one.targets, data="another")}):
        with pytest.raises(UserError, match="were not scored on the same tokens"):
            check_comparable([one, replace(one, **other)])


def test_the_use_of_the_context_is_measured_in_the_precision_asked_for(run, tmp_path):
    asked = {"out": tmp_path, "documents": 3, "seed": 3}
    (exact,) = evaluate_context(run.folder, None, [16, 32], **asked)
    assert exact.provenance["seed"] == 3
    (close,) = evaluate_context(run.folder, None, [16, 32], **asked, precision="bf16")
    assert exact.provenance["precision"] == "fp32" and close.provenance["precision"] == "bf16"
    theirs, ours = (each.tallies["token"].losses for each in (exact, close))
    assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-2, atol=1e-3)
    assert ours != theirs
    with pytest.raises(UserError, match="unknown precision 'int8'"):
        evaluate_context(run.folder, None, [16, 32], **asked, precision="int8")
