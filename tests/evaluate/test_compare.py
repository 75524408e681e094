"""Groups of seeds and the tests between them, against scipy and by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from dape.errors import UserError
from dape.evaluate.compare import check_comparable, compare, group, split
from dape.figures.tables import significance
from dape.positions.scheme import SCHEMES
from evaluations import LENGTHS, make

KERPLE = [[2.10, 2.0, 2.1, 2.3, 2.6], [2.12, 2.1, 2.3, 2.5, 2.9], [2.08, 2.0, 2.1, 2.2, 2.5]]
DAPE = [[2.07, 1.9, 1.8, 1.7, 1.7], [2.10, 1.9, 1.9, 1.8, 1.7], [2.07, 1.9, 1.8, 1.7, 1.6]]


def seeds(scheme, losses):
    return [make(scheme, each, seed=seed) for seed, each in enumerate(losses)]


def test_seeds_of_one_recipe_are_one_group_with_its_metrics():
    groups = group([*seeds("kerple", KERPLE), *seeds("dape-kerple", DAPE)])
    assert [each.label for each in groups] == ["kerple", "dape-kerple"]
    np.testing.assert_allclose(groups[0].values("loss"), KERPLE)
    np.testing.assert_allclose(groups[1].values("perplexity"), np.exp(DAPE))


def test_other_settings_are_another_group_told_apart_by_the_run():
    small = make("kerple", KERPLE[0])
    large = make("kerple", KERPLE[1], settings="of a larger one", run="runs/large")
    assert [each.label for each in group([small, large])] == [
        "kerple (runs/kerple-0)",
        "kerple (runs/large)",
    ]


def test_a_seed_of_other_settings_is_no_further_seed():
    """A training at another rate with seed 1 beside the seed 0 of the first rate."""
    first = make("kerple", KERPLE[0], seed=0)
    other = make("kerple", KERPLE[1], seed=1, settings="of another rate")
    assert [len(each.evaluations) for each in group([first, other])] == [1, 1]


@pytest.mark.parametrize("other", [{"data": "beef"}, {"bytes": [100] * 20}, {"split": "train"}])
def test_runs_measured_on_other_tokens_are_no_seeds_of_each_other(other):
    """Bits per byte allow for other corpora, and a mean over both would be of neither."""
    runs = [*seeds("kerple", KERPLE), *seeds("dape-kerple", DAPE)]
    runs[2] = replace(runs[2], targets=replace(runs[2].targets, **other))
    check_comparable(runs, "bits_per_byte")
    groups = group(runs)
    assert [len(each.evaluations) for each in groups] == [2, 1, 3]
    labels = ["kerple (runs/kerple-0)", "kerple (runs/kerple-2)", "dape-kerple"]
    assert [each.label for each in groups] == labels
    comparisons = compare(groups)
    assert {each.candidate for each in comparisons} == {"dape-kerple"}
    expected = np.mean((np.array(DAPE) - np.array(KERPLE))[:2, -1])
    assert comparisons[-1].difference == pytest.approx(expected)


def test_lengths_trained_at_tell_groups_of_a_scheme_apart():
    short = make("kerple", KERPLE[0], settings="short")
    long = make("kerple", KERPLE[1], settings="long", train_length=2048, run="runs/long")
    assert [each.label for each in group([short, long])] == ["kerple at 128", "kerple at 2,048"]


def test_models_without_a_recipe_are_never_seeds_of_each_other():
    models = [make("llama", KERPLE[0], settings=None, run=folder) for folder in ("one", "two")]
    assert [each.label for each in group(models)] == ["llama (one)", "llama (two)"]


def test_runs_trained_on_other_texts_in_the_same_folder_are_no_seeds_of_each_other():
    """Every model is compared with the model of its own texts."""
    texts = ("old", "new", "new")
    runs = [
        make(scheme, each, seed=seed, trained_on=text)
        for scheme, losses in (("kerple", KERPLE), ("dape-kerple", DAPE))
        for seed, (each, text) in enumerate(zip(losses, texts, strict=True))
    ]
    groups = group(runs)
    names = ("kerple", "dape-kerple")
    labels = [f"{name} (runs/{name}-{seed})" for name in names for seed in (0, 1)]
    found = [(each.label, len(each.evaluations)) for each in groups]
    assert found == list(zip(labels, (1, 2, 1, 2), strict=True))
    found = {each.candidate: each for each in compare(groups) if each.length == LENGTHS[-1]}
    assert {name: each.baseline for name, each in found.items()} == {
        labels[1]: labels[0],
        labels[2]: labels[0],
        labels[3]: labels[1],
    }
    expected = np.mean((np.array(DAPE) - np.array(KERPLE))[1:, -1])
    assert found[labels[3]].difference == pytest.approx(expected)


def test_a_record_that_does_not_know_its_texts_is_a_seed_of_one_that_does():
    runs = seeds("kerple", KERPLE)
    runs[1] = make("kerple", KERPLE[1], seed=1, trained_on="some")
    assert [len(each.evaluations) for each in group(runs)] == [3]
    runs[2] = make("kerple", KERPLE[2], seed=2, trained_on="others")
    assert [len(each.evaluations) for each in group(runs)] == [1, 1, 1]


def test_a_second_training_of_a_seed_is_no_further_seed():
    again = make("kerple", KERPLE[0], seed=0, run="runs/again")
    groups = group([*seeds("kerple", KERPLE), again, *seeds("dape-kerple", DAPE)])
    labels = ["kerple (runs/kerple-0)", "kerple (runs/again)", "dape-kerple"]
    assert [each.label for each in groups] == labels
    np.testing.assert_allclose(groups[0].values("loss"), KERPLE)
    (*_, last) = compare(groups)
    ours, theirs = np.array(DAPE)[:, -1], np.array(KERPLE)[:, -1]
    assert (last.candidate, last.baseline, last.over_seeds.pairs) == (labels[2], labels[0], 3)
    assert last.difference == pytest.approx(np.mean(ours - theirs))
    assert last.over_seeds.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_the_t_test_is_that_of_scipy_on_the_losses_of_shared_seeds():
    runs = [
        *seeds("kerple", KERPLE),
        *reversed(seeds("dape-kerple", DAPE)),
        make("dape-kerple", DAPE[0], seed=9),
    ]
    comparisons = compare(group(runs))
    assert [each.length for each in comparisons] == list(LENGTHS)
    for place, each in enumerate(comparisons):
        ours, theirs = np.array(DAPE)[:, place], np.array(KERPLE)[:, place]
        assert (each.candidate, each.baseline) == ("dape-kerple", "kerple")
        assert each.over_seeds.pairs == 3
        assert each.over_seeds.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
        for difference in (each.difference, each.over_seeds.difference):
            assert difference == pytest.approx(np.mean(ours - theirs)), "without the seed 9"
        assert each.over_documents.difference == pytest.approx(each.difference)
        assert each.left_out == 1
    assert "Runs of a seed that the other scheme lacks" in significance(comparisons).note


def test_the_bootstrap_averages_the_losses_of_a_document_over_seeds():
    (first, *_) = compare(group([*seeds("kerple", KERPLE), *seeds("dape-kerple", DAPE)]))
    by_document = [share * np.mean([2.07, 2.10, 2.07]) for share in (0.9, 1.0, 1.1)]
    against = [share * np.mean([2.10, 2.12, 2.08]) for share in (0.9, 1.0, 1.1)]
    assert first.over_documents.pairs == 20
    assert first.over_documents.difference == pytest.approx(np.mean(by_document) - np.mean(against))


@pytest.mark.parametrize("scheme", ["kerple", "dape-kerple"])
def test_a_refused_length_leaves_the_comparisons_at_the_others(scheme):
    whole = [*seeds("kerple", KERPLE), *seeds("dape-kerple", DAPE)]
    partly = [
        make(each.subject.scheme, [*losses[:1], None, *losses[2:]], seed=each.subject.seed)
        if each.subject.scheme == scheme and each.subject.seed == 1
        else each
        for each, losses in zip(whole, [*KERPLE, *DAPE], strict=True)
    ]
    check_comparable(partly, "perplexity")
    first, _, *rest = compare(group(whole))
    assert compare(group(partly)) == [first, *rest]


def test_a_group_has_no_number_where_a_run_refused():
    (each,) = group(seeds("learned", [[2.0, None, None, None, 2.1], [2.2, 2.3, None, 2.4, 2.5]]))
    expected = [[2.0, np.nan, np.nan, np.nan, 2.1], [2.2, 2.3, np.nan, 2.4, 2.5]]
    np.testing.assert_array_equal(each.values("loss"), expected)
    assert list(each.refused.items()) == [(n, f"{n} is too long") for n in (256, 512, 1024)]


def test_a_single_seed_leaves_the_test_over_documents():
    (first, *_) = compare(group([make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0])]))
    assert first.over_seeds is None
    assert first.over_documents.pairs == 20


@pytest.mark.parametrize(
    ("order", "pairs"),
    [
        (
            ["kerple", "alibi", "dape-alibi", "dape-kerple"],
            {("alibi", "kerple"), ("dape-alibi", "alibi"), ("dape-kerple", "kerple")},
        ),
        (["dape-kerple", "kerple"], {("dape-kerple", "kerple")}),
        (["dape-kerple", "dape3-kerple"], {("dape3-kerple", "dape-kerple")}),
        (["dape-add-kerple", "alibi"], {("dape-add-kerple", "alibi")}),
    ],
)
def test_baselines_are_the_bare_encoding_or_the_first_bare_scheme(order, pairs):
    comparisons = compare(group([make(scheme, KERPLE[0]) for scheme in order]))
    assert {(each.candidate, each.baseline) for each in comparisons} == pairs


def test_the_baseline_of_an_adapter_was_trained_at_its_length():
    runs = [
        make(scheme, KERPLE[0], train_length=length, settings=f"{length}", run=f"{scheme}-{length}")
        for length in (128, 512)
        for scheme in ("kerple", "dape-kerple")
    ]
    runs.append(make("dape3-kerple", DAPE[0], train_length=64))
    pairs = dict((each.candidate, each.baseline) for each in compare(group(runs)))
    assert pairs == {
        "kerple at 512": "kerple at 128",
        "dape-kerple at 128": "kerple at 128",
        "dape-kerple at 512": "kerple at 512",
        "dape3-kerple": "kerple at 128",
    }


def test_names_of_schemes_split_into_adapter_and_encoding():
    for name, scheme in SCHEMES.items():
        adapter, encoding = split(name)
        assert name == (f"{adapter}-{encoding}" if adapter else encoding)
        assert (scheme.bias, scheme.rotation) == (
            SCHEMES[encoding].bias,
            SCHEMES[encoding].rotation,
        )
        assert SCHEMES[encoding].adapter is None or not adapter
    assert split("dape-add-kerple-power") == ("dape-add", "kerple-power")
    assert split("a-model-of-others") == ("", "a-model-of-others")


def test_perplexities_of_other_tokens_are_refused_and_bits_per_byte_are_not():
    here, there = make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0])
    there = replace(there, targets=replace(there.targets, data="decade"))
    for metric in ("perplexity", "loss"):
        with pytest.raises(UserError, match=rf"{metric} of runs/dape-kerple-0 .*bits_per_byte"):
            check_comparable([here, there], metric)
    check_comparable([here, there], "bits_per_byte")
    assert compare(group([here, there])) == []


def test_other_lengths_are_refused_for_every_metric():
    here = make("kerple", KERPLE[0])
    there = make("dape-kerple", DAPE[0][:2], lengths=LENGTHS[:2])
    with pytest.raises(UserError, match="different lengths"):
        check_comparable([here, there], "bits_per_byte")


def test_other_protocols_are_refused_for_every_metric():
    here, there = make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0])
    there = replace(there, targets=replace(there.targets, protocol="sliding"))
    with pytest.raises(UserError, match="by different protocols"):
        check_comparable([here, there], "bits_per_byte")


def test_a_run_that_is_given_twice_counts_as_one_seed():
    runs = [*seeds("kerple", KERPLE), *seeds("dape-kerple", DAPE)]
    assert compare(group([*runs, *runs])) == compare(group(runs))
    (alone,) = group([runs[0], runs[0]])
    assert alone.values("loss").shape == (1, len(LENGTHS))


@pytest.mark.parametrize(("documents", "tested"), [(19, False), (20, True), (21, True)])
def test_few_documents_leave_no_test_over_them(documents, tested):
    pairs = (("kerple", KERPLE[0]), ("dape-kerple", DAPE[0]))
    comparisons = compare(group([make(*each, documents=documents) for each in pairs]))
    assert {each.over_documents is not None for each in comparisons} == {tested}
