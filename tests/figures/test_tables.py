"""Tables: what stands in their cells."""

import base64
import math
from dataclasses import replace

import numpy as np
import pytest

from dape.evaluate.compare import compare, group
from dape.evaluate.request import Harnessed, Score
from dape.evaluate.significance import PairedTest
from dape.figures.harness import table as table_of_scores
from dape.figures.report import drawings, findings, origin, runs_table
from dape.figures.tables import number, p_value, percent, refusal, results, significance
from evaluations import PROVENANCE, make

KERPLE = [[2.1, 2.0, 2.1, 2.3, 2.6], [2.12, 2.1, 2.3, 2.5, 2.9]]
DAPE = [[2.0, 1.9, 1.8, 1.7, 1.6], [2.1, 1.9, 1.8, 1.8, 1.7]]


@pytest.fixture
def groups():
    return group(
        [
            make(scheme, losses[seed], seed=seed)
            for scheme, losses in (("kerple", KERPLE), ("dape-kerple", DAPE))
            for seed in (0, 1)
        ]
    )


def test_results_mark_the_training_length_and_say_what_was_scored(groups):
    table = results(groups)
    assert table.header == ["scheme", "runs", "128*", "256", "512", "1,024", "2,048"]
    assert "the last 128 tokens of each window" in table.note
    assert "the same 2,560 tokens of 20 documents of the test split" in table.note
    assert "standard deviation over seeds" in table.note
    assert "beginning of a text" not in table.note
    assert "* length trained at." in table.note
    elsewhere = results(group([make("kerple", KERPLE[0], train_length=64)]))
    assert elsewhere.header[2] == "128" and "trained at" not in elsewhere.note
    longer = make("alibi", KERPLE[0], settings="longer", train_length=512)
    header = ["scheme", "runs", "128*", "256", "512*", "1,024", "2,048"]
    assert results([*groups, *group([longer])]).header == header


def test_tokens_without_a_fixed_number_of_bytes_have_no_bits_per_byte():
    runs = [make("kerple", KERPLE[0]), make("rope", KERPLE[0])]
    runs[1] = replace(
        runs[1],
        targets=replace(runs[1].targets, bytes=None),
        measurements=[replace(each, bits_per_byte=None) for each in runs[1].measurements],
    )
    first, second = results(group(runs), "bits_per_byte").rows
    assert first[2:] == [f"{loss / math.log(2) / 2:.4f}" for loss in KERPLE[0]]
    assert second[2:] == ["—"] * 5
    note = results(group(runs), "bits_per_byte").note
    assert note.endswith("— rope: tokens without a fixed number of bytes.")
    assert "bytes" not in results(group(runs)).note


def test_other_scored_tokens_are_named():
    runs = [make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0])]
    runs.append(make("rope", KERPLE[0], documents=3))
    runs[2] = replace(runs[2], targets=replace(runs[2].targets, data="other"))
    assert "differ" not in results(group(runs[:2]), "bits_per_byte").note
    begun = [replace(each, targets=replace(each.targets, bos=True)) for each in runs]
    assert "begins with the model's token for the beginning" in results(group(begun[:2])).note
    note = results(group(runs), "bits_per_byte").note
    assert "the same 2,560 tokens of 20 documents of the test split are scored" in note
    assert "The scored text differs: rope has 384 tokens of 3 documents of the test split." in note


def test_one_run_is_shown_without_a_deviation():
    table = results(group([make("kerple", KERPLE[0])]), "loss")
    assert table.rows == [["kerple", "1", "2.1000", "2.0000", "2.1000", "2.3000", "2.6000"]]
    assert "deviation" not in table.note


def test_precisions_are_named_where_they_differ():
    half = {**PROVENANCE, "precision": "bf16"}
    runs = [make("kerple", KERPLE[0]), make("dape-kerple", DAPE[0], provenance=half)]
    assert "Precision" not in results(group(runs[1:])).note
    runs[0] = replace(runs[0], provenance={**PROVENANCE, "precision": "fp32"})
    note = results(group(runs)).note
    assert "Precision of products: bf16 for dape-kerple; fp32 for kerple." in note


def test_a_loss_that_is_nan_has_no_small_p_value():
    broken = make("dape-kerple", [*DAPE[0][:-1], math.nan])
    table = significance(compare(group([make("kerple", KERPLE[0]), broken])))
    assert [row[-1] for row in table.rows] == ["+nan %", "—"]
    assert table.note.endswith(" — no p: the pairs have no spread, or a loss is not finite.")


def test_runs_whose_differences_are_all_one_number_have_no_p_over_seeds():
    runs = [make("kerple", KERPLE[0]), make("kerple", KERPLE[0], seed=1)]
    runs += [make("dape-kerple", DAPE[0]), make("dape-kerple", DAPE[0], seed=1)]
    table = significance(compare(group(runs)))
    assert table.rows[1] == ["p over 2 seeds"] + ["—"] * 5
    assert table.rows[2] == ["p over 20 documents"] + ["< 0.0002"] * 5
    assert "— no p: the pairs have no spread" in table.note
    (sentence,) = findings(group(runs), compare(group(runs)))
    assert "over 2 seeds" not in sentence and "p < 0.0002 over 20 documents" in sentence


def test_a_refused_length_is_a_dash_with_the_reason_below_and_nan_is_not():
    learned = make("learned", [2.0, 2.1, None, None, math.nan])
    table = results(group([make("kerple", KERPLE[0]), learned]), "loss")
    assert table.rows[1] == ["learned", "1", "2.0000", "2.1000", "—", "—", "nan"]
    assert table.note.endswith(" — learned refused 512, 1,024 tokens: 512 is too long.")
    assert "kerple refused" not in table.note


def test_each_reason_of_a_refusal_stands_with_its_lengths():
    table = "no learned position for row {}: the table has 128 rows"
    reasons = {64: "the prompt alone has 65 tokens", 256: table.format(255), 512: table.format(511)}
    assert refusal("gpt2", dict(reversed(reasons.items()))) == (
        "— gpt2 refused 64 tokens: the prompt alone has 65 tokens; "
        "256, 512 tokens: no learned position for row 255: the table has 128 rows."
    )


def test_changes_stand_under_their_length_where_another_is_refused(groups):
    learned = make("learned", [2.2, None, 2.3, 2.4, None])
    table = significance(compare([*groups, *group([learned])]))
    (row,) = (cells for cells in table.rows if cells[0] == "learned against kerple")
    differences = np.array([2.2, 2.3, 2.4]) - np.array(KERPLE[0])[[0, 2, 3]]  # of the shared seed
    first, third, fourth = (f"{100 * each:+.1f} %" for each in np.expm1(differences))
    assert row[1:] == [first, "—", third, fourth, "—"]
    place = table.rows.index(row)
    assert [cell == "—" for cell in table.rows[place + 1][1:]] == [False, True, False, False, True]


def test_a_single_comparison_without_documents_or_with_runs_left_out_is_noted(groups):
    whole = compare(groups)
    assert "left out" not in significance(whole).note and "Fewer" not in significance(whole).note
    last = replace(whole[-1], left_out=1, over_documents=None)
    note = significance([*whole[:-1], last]).note
    assert note.endswith(
        "Runs of a seed that the other scheme lacks are left out. "
        "Fewer than 20 documents: no p over documents."
    )


def test_changes_are_ratios_of_perplexities(groups):
    table = significance(compare(groups))
    expected = math.exp((1.6 + 1.7) / 2 - (2.6 + 2.9) / 2) - 1
    assert table.rows[0][0] == "dape-kerple against kerple"
    assert table.rows[0][-1] == f"{100 * expected:.1f} %"
    assert [row[0] for row in table.rows[1:]] == ["p over 2 seeds", "p over 20 documents"]
    assert "ttest_rel" in table.note and "scipy.stats.bootstrap" in table.note


def test_a_change_of_many_times_has_the_commas_of_a_perplexity():
    assert percent(math.log(15.0)) == "+1,400.0 %"
    assert percent(math.log(0.5)) == "-50.0 %"


def test_a_single_document_and_seed_leave_the_change_without_a_test(groups):
    lonely = [
        make(*each, documents=1) for each in (("kerple", KERPLE[0]), ("dape-kerple", DAPE[0]))
    ]
    table = significance(compare(group(lonely)))
    assert len(table.rows) == 1
    assert table.rows[0][-1] == f"{100 * (math.exp(1.6 - 2.6) - 1):.1f} %"
    assert table.note == "Fewer than 20 documents: no p over documents."


def test_the_least_that_resamples_can_show_is_no_exact_p_value(groups):
    table = significance(compare(groups))
    (row,) = (cells for cells in table.rows if cells[0] == "p over 20 documents")
    assert row[1:] == ["< 0.0002"] * 5  # each document is better at each length
    assert p_value(PairedTest("bootstrap", 20, -0.1, 0.0004, least=0.0002)) == "0.0004"
    assert p_value(PairedTest("bootstrap", 20, -0.1, 0.0002, least=0.0002)) == "< 0.0002"
    assert p_value(PairedTest("paired t", 3, -0.1, 1e-9)) == "1e-09"
    (sentence,) = findings(groups, compare(groups))
    assert "p < 0.0002 over 20 documents" in sentence and "p = " in sentence


def test_the_finding_is_at_the_longest_length(groups):
    (sentence,) = findings(groups, compare(groups))
    assert sentence.startswith("At 2,048 tokens, 16 times the training length, the perplexity of")
    assert f"dape-kerple is {(math.exp(1.6) + math.exp(1.7)) / 2:.2f}" in sentence
    assert "over 2 seeds" in sentence and "over 20 documents" in sentence


def test_a_length_may_be_no_multiple_of_the_training_length():
    pairs = (("kerple", KERPLE), ("dape-kerple", DAPE))
    runs = group([make(scheme, losses[0], train_length=1536) for scheme, losses in pairs])
    assert "1.33333 times the training length" in findings(runs, compare(runs))[0]


def test_the_runs_have_the_tokens_loss_and_seconds_of_their_records():
    run = make("kerple", KERPLE[0], seed=3, train_length=64)
    trained = {"tokens": 8448, "loss": 2.51239, "validation_loss": 3.0, "seconds": 61.7}
    shown = runs_table([run], {"runs/kerple-3": trained | {"train_length": 1}})
    assert shown.rows == [
        ["runs/kerple-3", "kerple", "3", "1,234", "64", "8,448", "2.5124", "62"],
    ]
    assert runs_table([run], {"runs/kerple-3": {}}).rows[0][5:] == ["—"] * 3
    assert origin([run])["documents scored"] == "20 of the test split"


def test_the_figure_of_a_report_is_of_its_metric():
    shown = drawings(group([make("kerple", KERPLE[0])]), "bits_per_byte", {})["length"]
    assert shown.caption.startswith("Bits per byte against the length of the window.")
    assert "<!-- bits per byte -->" in base64.b64decode(shown.data).decode()


def test_scores_of_lm_eval_stand_beside_their_run_and_under_their_length():
    found = [
        Harnessed(
            make("kerple", KERPLE[0], seed=seed).subject,
            *("lambada", length, PROVENANCE),
            scores=[Score("acc", value, 0.0123)],
        )
        for seed, length, value in ((0, 64, 0.25), (0, 128, 0.5), (1, 128, 0.75))
    ]
    shown = table_of_scores(found)
    assert shown.header == ["run", "task", "metric", "64", "128"]
    assert shown.rows == [
        ["runs/kerple-0", "lambada", "acc", "0.25 ± 0.012", "0.5 ± 0.012"],
        ["runs/kerple-1", "lambada", "acc", "—", "0.75 ± 0.012"],
    ]
    known = [replace(each, tokenizer=name) for each, name in zip(found, "aab", strict=True)]
    note = "The models have different tokenizers: a length is not the same text for all."
    assert note in table_of_scores(known).note
    for same in (found, known[:2], [*known[:2], found[2]]):  # None: of an earlier version
        assert "tokenizers" not in table_of_scores(same).note


def test_a_table_on_a_narrow_screen_keeps_every_digit(groups, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    results(groups).show()
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.split()[:1] == ["dape-kerple"])
    means = [(math.exp(a) + math.exp(b)) / 2 for a, b in zip(*DAPE, strict=True)]
    assert row.split()[2:] == [f"{mean:.2f}" for mean in means]


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (8.314, "perplexity", "8.31"),
        (1234.5, "perplexity", "1,234.50"),
        (9999.5, "perplexity", "9,999.50"),
        (65536.4, "perplexity", "65,536"),
        (6553600.0, "perplexity", "6.6e+06"),
        (math.inf, "perplexity", "inf"),
        (1.23456, "bits_per_byte", "1.2346"),
    ],
)
def test_numbers_have_the_digits_worth_reading(value, metric, text):
    assert number(value, metric) == text


def test_a_sentence_has_the_perplexities_of_the_compared_seeds(groups):
    """Seed 9 of the candidate, which the baseline lacks, has a loss of 9 nats."""
    worse = make("dape-kerple", [9.0] * 5, seed=9)
    whole = [each for one in groups for each in one.evaluations]
    (sentence,) = findings(groups, compare(groups))
    more = group([*whole, worse])
    (other,) = findings(more, compare(more))
    assert other == sentence
