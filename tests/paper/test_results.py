import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from laboratory import Pretended, enter, sweep

import evaluations
from dape.data.shards import Corpus
from dape.errors import UserError
from dape.evaluate.capture import Row
from dape.evaluate.compare import Group
from dape.evaluate.heads import describe
from dape.evaluate.learned import Layer, LearnedRows
from dape.evaluate.significance import PairedTest
from dape.evaluate.subject import Subject
from dape.figures.learned import table
from dape.paper import record
from dape.paper.beside import beside
from dape.paper.cells import Regime
from dape.paper.claims import Better, Claim, Finding, Verdict
from dape.paper.experiment import Experiment
from dape.paper.experiments import AMOUNTS, CORE, COST, SIGNIFICANCE
from dape.paper.page import page
from dape.paper.published import PUBLISHED
from dape.paper.results import as_record, results, verdicts_table
from dape.paper.sections import curves, heads, perplexities, trainings
from dape.paper.spread import spread
from dape.paper.study import Study, studies
from dape.paper.sweep import TINY, Measure
from dape.paper.sweep import heads as measured
from dape.positions.scheme import SCHEMES

LOSSES = {"kerple": [2.0, 2.1, 2.2, 2.3, 2.4], "dape-kerple": [1.9, 1.8, 1.7, 1.7, 1.7]}


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def experiment(*arms, **options):
    return Experiment(
        name="small",
        title="A small one",
        shows="Figure 0",
        parts=(sweep(*arms, **options),),
        claims=(
            Claim("DAPE helps", "section 0", (Better("dape-kerple", "kerple", TINY, 16),)),
            Claim("V2 helps", "section 1", (Better("dape3-kerple", "kerple", TINY),)),
        ),
        home=Path("runs/smoke"),
    )


def run(chosen, **options):
    spread(chosen.cells(), ["cpu"], Pretended(losses=LOSSES, **options), lambda line: None)
    return results(chosen)


def test_the_tables_hold_each_arm_at_each_length_its_tests_and_its_training():
    chosen = experiment(seeds=(0, 1))
    run(replace(chosen, parts=(sweep("nope"),)))  # one seed alone
    found = run(replace(chosen, parts=(*chosen.parts, sweep("nope"))))
    ((table, tests, trainings),) = (section.tables for section in found.sections)
    assert table.header == ["arm", "runs", "32*", "64", "128", "256", "512"]
    assert found.sections[0].caption.endswith("Shaded: one standard deviation over seeds.")
    seeds = [[math.exp(loss + seed * 0.006) for seed in (0, 1)] for loss in LOSSES["kerple"]]
    expected = [f"{statistics.mean(each):.2f} ± {statistics.stdev(each):.2f}" for each in seeds]
    assert table.rows[0] == ["kerple", "2", *expected]
    assert "dape-kerple against kerple" in tests.rows[0][0]
    assert trainings.header == [
        *("arm", "runs", "validation loss", "tokens a second", "minutes", "tokens", "epochs")
    ]
    text = len(Path("made/text/train/0.txt").read_bytes()) + 1  # with the end of text
    trained = ["2.5000", "1,000", f"{6.5 / 60:.1f}", "8,448", f"{8448 / text:.2g}"]
    assert trainings.rows[0] == ["kerple", "2", *trained], "tokens of the record, not the regime's"


def test_the_training_of_an_arm_is_a_mean_over_runs():
    """By hand, of the last validation losses; the speed is the median over all steps."""
    chosen = experiment("kerple", seeds=(0, 1, 2))
    run(chosen)
    steps = [[(3.0, 10), (2.0, 20), (2.005, 90)], [(2.2, 30)], [(2.3, 25)]]
    for cell, lines, size in zip(chosen.cells(), steps, (1, 3, 8), strict=True):
        cell.record.record.write_text(json.dumps({"tokens": 1000 * size, "seconds": 60.0 * size}))
        named = [{"step": 1, "validation_loss": x, "tokens_per_second": y} for x, y in lines]
        cell.record.metrics.write_text("".join(json.dumps(each) + "\n" for each in named))
    (study,) = studies(chosen.cells())
    epochs = 4000 / record.read(chosen.cells()[0]).train_tokens
    expected = ["kerple", "3", "2.1683", "25", "4.0", "4,000", f"{epochs:.2g}"]
    assert trainings(study).rows == [expected]


def test_a_cell_that_failed_is_there_with_its_reason_beside_the_others():
    chosen = experiment("kerple", "dape-kerple", seeds=(0, 1))
    error = "dape: error: step 7: loss nan, gradient norm nan, at learning rate 1"
    found = run(chosen, fails={"--model.scheme kerple": error, "dape-kerple-1 --seed": error})
    table, trainings = found.sections[0].tables
    assert [row[:3] for row in table.rows] == [["dape-kerple", "1", f"{math.exp(1.9):.2f}"]]
    assert [row[:3] for row in trainings.rows] == [
        ["kerple", "0", "—"],
        ["dape-kerple", "1", "2.5000"],
    ]
    assert trainings.note.count("step 7: loss nan") == 3
    assert "/dape-kerple-1 failed" in trainings.note


def test_evaluations_of_other_tokens_do_not_meet_in_a_table():
    chosen = experiment()
    run(chosen)
    file = chosen.cells()[1].record.evaluation("last")
    changed = json.loads(file.read_text())
    changed["targets"]["data"] = "another corpus"
    file.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="the scored tokens differ"):
        results(chosen)


def test_trainings_on_different_corpora_do_not_meet_in_a_table():
    chosen = experiment()
    run(chosen)
    first, second = chosen.cells()
    record.write(second, replace(record.read(second), checksum="another"))
    with pytest.raises(UserError, match="corpora with different checksums"):
        studies([first, second])


def test_a_record_of_other_measurements_is_in_no_table():
    chosen = experiment("kerple", "dape-kerple")
    run(chosen)
    cell = chosen.cells()[1]
    end = record.read(cell)
    lost = {path: words.replace("512", "256") for path, words in end.commands.items()}
    record.write(cell, replace(end, commands=lost))
    found = results(chosen)
    assert [each.arm for each in found.cells] == ["kerple"] and found.planned == 2


def test_a_verdict_is_the_same_in_the_table_and_in_the_file():
    """With a p-value, the bound of one, one over too few documents, and none of a failed arm."""
    over = "paired bootstrap over documents"
    tests = (
        PairedTest("paired t over seeds", 3, -0.1, 0.0123),
        PairedTest(over, 20, -0.1, 2e-4, least=2e-4),
        PairedTest(over, 19, -0.1, 0.0004),
        None,
    )
    findings = tuple(
        Finding("reproduced", f"number {n}", n + 1, each) for n, each in enumerate(tests)
    )
    claim = Claim("DAPE helps", "section 0", (Better("a", "b", TINY),) * 5)
    verdict = Verdict(claim, "reproduced", findings)
    shown = verdicts_table([verdict])
    assert shown.rows[0] == [
        *("DAPE helps (section 0)", "reproduced (4 of 5 checks measured)", "", "")
    ]
    assert [row[2:] for row in shown.rows[1:]] == [
        ["1", "0.012"],
        ["2", "< 0.0002"],
        ["3", "—"],
        ["4", "—"],
    ]
    few = " — fewer than 20 documents: no p over documents."
    assert shown.note == f"Two-sided p: paired t over seeds; {over}.{few}"
    kept = as_record(verdict)
    assert (kept["claim"], kept["outcome"]) == ("DAPE helps", "reproduced")
    assert [(each["seeds"], each["p"]) for each in kept["checks"]] == [
        *((1, 0.0123), (2, 2e-4), (3, None), (4, None))
    ]
    assert [each["test"] for each in kept["checks"]] == ["paired t over seeds", over, over, None]
    whole = verdicts_table([replace(verdict, findings=findings[:2] * 2 + findings[:1])])
    assert whole.rows[0][1] == "reproduced" and "fewer" not in whole.note
    assert verdicts_table([Verdict(claim, "not measured", ())]).note == "No claim is measured."


def test_an_experiment_names_every_device_commit_and_version_of_its_trainings_once():
    chosen = experiment("kerple", "dape-kerple", "alibi")
    run(chosen)
    made = [
        {"device": "H200", "commit": "abc", "versions": {"python": "3.11", "torch": "2.13"}},
        {"device": "H100", "commit": None, "versions": {"python": "3.11", "torch": "2.14"}},
        {"device": "H200", "commit": "abc", "versions": {"python": "3.11", "torch": "2.13"}},
    ]
    for cell, facts in zip(chosen.cells(), made, strict=True):
        cell.record.update_record(facts | {"seconds": 60.0})
    origin = {
        "device": "H200; H100",
        "commit": "abc",
        "versions": "python 3.11, torch 2.13; python 3.11, torch 2.14",
    }
    found = results(chosen)
    assert found.origin() == origin
    text = found.markdown()
    assert all(f"\n- {name}: {value}\n" in text for name, value in origin.items())
    assert "Reproduces Figure 0: `dape paper small`, 0 minutes of a device." in text


def test_a_command_that_ran_again_costs_what_it_took_last():
    chosen = experiment("kerple")
    run(chosen)
    (cell,) = chosen.cells()
    for seconds in (40.0, 30.0):
        record.finish(cell, {str(each): seconds for each in cell.commands}, None)
    assert record.minutes([cell]) == pytest.approx(2 * 30 / 60)


def test_where_all_failed_the_table_says_so():
    found = run(experiment("kerple"), fails={"train": "out of memory on cuda"})
    (section,) = found.sections
    assert section.figure is None
    assert "out of memory on cuda" in section.tables[0].note


def test_the_papers_numbers_stand_under_ours():
    cells = [c for c in CORE.cells() if c.regime.corpus == "arxiv" and c.arm == "dape-kerple"]
    pretend(cells, losses=[1.4, 1.3, 1.2, 1.1, 1.05, 1.0])
    (study,) = studies(cells)
    ours, theirs = perplexities(study).rows
    assert ours[0] == "dape-kerple" and ours[2] == f"{math.exp(1.4):.2f}"
    assert theirs == ["dape-kerple, published", "", "4.49", "4.20", "4.17", "3.95", "3.70", ""]
    assert "section 4.3" in perplexities(study).note


@pytest.mark.parametrize(
    ("regime", "corpus", "theirs"),
    [
        (Regime("125m", "arxiv", 128), "arxiv", "31.93"),
        (Regime("small", "arxiv", 512), "arxiv", "9.08"),
        (Regime("125m", "books", 512), "books", "39.31"),
        (Regime("125m", "mixed", 512), "books", "39.31"),
        (Regime("350m", "arxiv", 512), "arxiv", "22.76"),
    ],
)
def test_the_papers_number_is_of_the_size_the_corpus_and_the_length_of_training(
    regime, corpus, theirs
):
    made = evaluations.make("kerple", [2.0, 2.0], train_length=regime.length, lengths=(4096, 8192))
    _, published = perplexities(Study(regime, corpus, (), (Group("kerple", (made,)),), {})).rows
    assert published[0] == "kerple, published" and published[-1] == theirs


def test_a_line_leaves_the_figure_at_two_and_a_half_times_the_lowest_value():
    found = [c for c in CORE.cells() if c.regime.corpus == "arxiv" and c.arm == "rope"]
    pretend(found, losses=[1.4, 1.3, 3.0, 4.0, 5.0, 6.0])
    (section,) = curves(found)
    assert section.caption.endswith("Lines leave the figure at 2.5 times the lowest value.")
    assert "Shaded" not in section.caption, "a single seed has no deviation"
    assert section.figure.axes[0].get_ylim()[1] == pytest.approx(2.5 * math.exp(1.3))


def pretend(cells, losses, seed=0):
    """Leave records as if the cells had been run on a GPU."""
    from dape.paper.record import End
    from dape.train.recipe import write

    for cell in cells:
        cell.record.path.mkdir(parents=True)
        cell.record.recipe.write_text(write(cell.training.recipe))
        cell.record.record.write_text('{"validation_loss": 1.4, "seconds": 60.0}')
        cell.record.metrics.write_text(
            '{"step": 9, "validation_loss": 1.4, "tokens_per_second": 9e5}\n'
        )
        lengths = (512, 1024, 2048, 4096, 8192, 16384)
        made = evaluations.make(cell.arm, losses, seed, train_length=512, lengths=lengths)
        made.save(cell.record.evaluation("last"))
        commands = {str(kept): str(each) for each in cell.commands for kept in each.keeps}
        end = End(commands, {str(cell.commands[0]): 60.0}, None, "c0ffee", 50_000_000)
        record.write(cell, end)


def test_a_training_that_repeats_its_text_too_often_is_named():
    chosen = experiment("kerple")
    run(chosen)
    (cell,) = chosen.cells()
    lines = [
        {"step": step, "validation_loss": loss, "tokens_per_second": 1000}
        for step, loss in enumerate((3.0, 2.0, 2.02))
    ]
    lines.insert(1, {"step": 1, "loss": 2.5})
    cell.record.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    note = results(chosen).sections[0].tables[1].note
    assert "kerple-0 from 2.000 to 2.020" in note
    assert f"the checksum {Corpus(cell.training.data).checksum[:12]}. " in note
    lines[-1]["validation_loss"] = 2.009
    cell.record.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "rose again" not in results(chosen).sections[0].tables[1].note


def test_a_training_that_diverged_did_not_repeat_its_text_too_often():
    chosen = experiment("kerple", "alibi")
    run(chosen)
    cell, _ = chosen.cells()
    lines = [{"step": step, "validation_loss": loss} for step, loss in enumerate((3.0, 9.0))]
    cell.record.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record.write(cell, replace(record.read(cell), error="step 2: loss nan, gradient norm nan"))
    note = results(chosen).sections[0].tables[-1].note
    assert "kerple-0 failed: step 2" in note and "rose again" not in note


def test_what_is_written_holds_tables_figures_and_verdicts():
    found = run(experiment())
    found.write()
    folder = Path("runs/smoke/small")
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert [each["outcome"] for each in verdicts] == ["reproduced", "not measured"]
    assert verdicts[0]["checks"][0]["seeds"] == 1
    text = (folder / "table.md").read_text()
    (figure,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (folder / figure).read_text().startswith("<?xml")
    assert "dape paper small" in text
    (section,) = found.sections
    parts = [verdicts_table(found.verdicts), *section.tables]
    places = [text.index(part) for part in (*(x.markdown() for x in parts), section.caption)]
    assert places == sorted(places) and text.count(f"## {section.name}") == 1
    unclaimed = replace(found, verdicts=(), experiment=replace(found.experiment, name="bare"))
    unclaimed.write()
    assert "Verdicts" not in unclaimed.markdown()
    assert {file.name for file in Path("runs/smoke/bare").iterdir()} == {"table.md", figure}


def test_a_p_that_does_not_exist_is_null_in_the_file_and_a_dash_in_the_table():
    """As of differences that are all one number, whose t is infinite."""
    found = run(experiment())
    test = PairedTest("paired t", 3, -0.1, math.nan)
    finding = Finding("not decidable at this scale", "-9 %", 3, test)
    verdict = replace(found.verdicts[0], findings=(finding,))
    replace(found, verdicts=(verdict,)).write()
    text = Path("runs/smoke/small/verdicts.json").read_text()
    ((check,),) = (each["checks"] for each in json.loads(text, parse_constant=pytest.fail))
    assert check["p"] is None and check["test"] == "paired t"
    table = verdicts_table([verdict])
    assert table.rows[1][-1] == "—"
    assert table.note.endswith(" — no p: the pairs have no spread, or a loss is not finite.")


def test_a_section_of_heads_is_of_the_run_and_the_length_in_its_name():
    found = list(
        sweep("kerple", seeds=(0, 1), measures=(measured(1), measured(4))).cells(
            Path("runs/smoke"), {}
        )
    )
    rng, expected = np.random.default_rng(0), {}
    for cell in found[::-1]:
        for length in (128, 32):
            row = Row(0, False, *rng.normal(size=(3, 2, length)))
            lines = (values.tolist() for values in (row.scores, row.bias, row.change))
            layer = Layer(0, False, *lines, describe(row, 16))
            about = {"document": 0, "length": length, "query": length - 1, "far": 16}
            subject = Subject(str(cell.run), "kerple", 32, cell.training.seed, "c", 1)
            spans = list(range(length + 1))
            made = LearnedRows(
                subject,
                "c0ffee",
                "test",
                **about,
                spans=spans,
                layers=[layer],
                provenance=evaluations.PROVENANCE,
            )
            made.save(cell.record.path / f"learned/{length}.json")
            name = f"{cell.name.replace('/', '-')}-at-{length}"
            expected[name] = table(made).rows
    shown = {section.name: section.tables[0].rows for section in heads(found)}
    assert shown == expected and len(expected) == 4
    assert next(iter(shown)) == f"{found[0].name.replace('/', '-')}-at-32"


def test_the_page_holds_everything_itself():
    found = run(experiment())
    text = page([found, results(CORE)], beside(found.cells))
    assert not re.search(r"(src|href)=\"(?!data:|#)", text)
    assert text.count("data:image/svg+xml;base64,") == 1
    assert "dape train recipes/paper/smoke.yaml --name smoke/" in text
    assert re.search(r"1 <span class=\"reproduced\">", text)
    assert "<code>dape paper core</code>" in text.partition("Not measured yet")[2]


def test_a_cell_of_two_experiments_has_one_price(monkeypatch):
    found = run(experiment())
    monkeypatch.setattr(record, "_seconds", lambda cell: 90.0 * 60)
    hours = f"{1.5 * len(found.cells):.1f} GPU hours"
    for several in ([found], [found, found]):
        assert f"experiments took {hours}" in page(several, beside(found.cells))


def test_measurements_for_a_second_experiment_cost_the_first_nothing():
    more = Measure(("eval", "context", "{run}", "--lengths", "{reads}"), ("evaluation/more.json",))
    alone, both = experiment("kerple"), experiment("kerple", measures=(more,))
    run(alone)
    (cell,) = both.cells()
    end, price = record.read(cell), results(alone).minutes
    words = str(cell.commands[-1])
    commands = end.commands | {"evaluation/more.json": words}
    record.write(cell, replace(end, commands=commands, seconds=end.seconds | {words: 600.0}))
    (cell.record.path / "evaluation/more.json").write_text("{}")
    assert results(alone).minutes == pytest.approx(price)
    assert results(both).minutes == pytest.approx(price + 10)


def test_a_table_of_costs_holds_all_lengths_and_names_command_commit_and_versions():
    from dape.bench.model import Cost, Costs
    from dape.bench.record import Entry

    for cell, milliseconds in zip(COST.cells()[:2], (1.0, 4.0), strict=True):
        cell.record.path.mkdir(parents=True)
        length = int(cell.name.rpartition("/")[2])
        place = ("nope", length, 1, "forward")
        costs = [
            Cost("125m", form, 2**29, Entry(*place, times * milliseconds, peak=2**30))
            for form, times in (("fused", 1), ("textbook", 3))
        ]
        made = evaluations.PROVENANCE | {"command": f"measure {length}"}
        Costs(1, 0, made, costs).save(cell.record.path / "results.json")
        words = str(cell.commands[0])
        record.write(cell, record.End({"results.json": words}, {words: 60.0}, None, None, 0))
    text = results(COST).markdown()
    assert text.count("\n## ") == 1
    commit = evaluations.PROVENANCE["commit"]
    assert f"`measure 512`, `measure 1024` at {commit}, seed 0; cpu; python 3.11, torch" in text
    assert "| nope, fused | 1.00 (1.00) | 4.00 (1.00) | 1.50 | 1.50 |" in text
    assert "| nope, textbook | 3.00 (3.00) | 12.0 (3.00) | 1.50 | 1.50 |" in text


def test_every_published_number_has_ours_beside_it_where_it_was_measured():
    cells = [c for c in CORE.cells() if c.regime.corpus == "arxiv" and c.arm == "dape-kerple"]
    pretend(cells, losses=[1.4, 1.3, 1.2, 1.1, 1.05, 1.0])
    table = beside(cells)
    assert len(table.rows) == len(PUBLISHED)
    rows = {tuple(row[:4]): row[4] for row in table.rows}
    ours = rows["dape-kerple, 125m, arxiv", "512", "8,192", "3.70"]
    assert ours == f"{math.exp(1.05):.2f} (125m-arxiv-512-150M)"
    assert rows["dape-kerple, 125m, arxiv", "128", "8,192", "5.00"] == "—"
    assert rows["dape-kerple, 125m, books", "512", "8,192", "17.88"] == "—"


def test_arms_and_seeds_of_all_experiments_in_a_regime_stand_beside_the_published_numbers():
    first, second = (
        [c for c in CORE.cells() if c.regime.corpus == "arxiv" and c.arm == arm]
        for arm in ("dape3-kerple", "dape-kerple")
    )
    pretend(first, losses=[1.3, 1.2, 1.1, 1.0, 0.95, 0.9])
    pretend(second, losses=[1.4, 1.3, 1.2, 1.1, 1.05, 1.0])
    rows = {tuple(row[:4]): row[4] for row in beside([*first, *second, *second]).rows}
    for arm, theirs, loss in (("dape3-kerple", "4.44", 1.3), ("dape-kerple", "4.49", 1.4)):
        ours = rows[f"{arm}, 125m, arxiv", "512", "512", theirs]
        assert ours == f"{math.exp(loss):.2f} (125m-arxiv-512-150M)"


def test_ours_beside_a_published_number_is_the_mean_perplexity_over_seeds():
    """Perplexities of 4 and 9, whose geometric mean is 6."""
    found = [c for c in SIGNIFICANCE.cells() if c.name.startswith("125m-arxiv-512-150M/kerple")]
    for cell, ours in zip(found[:2], (4.0, 9.0), strict=True):
        pretend([cell], losses=[math.log(ours)] * 6, seed=cell.training.seed)
    rows = {tuple(row[:4]): row[4] for row in beside(found[:2]).rows}
    assert rows["kerple, 125m, arxiv", "512", "8,192", "9.08"] == "6.50 (125m-arxiv-512-150M)"
    elsewhere = rows["kerple, 125m, fineweb-edu", "512", "8,192", "39.38"]
    assert elsewhere == "6.50 (125m-arxiv-512-150M)", "our texts correspond to arxiv and books"
    lost = evaluations.make(
        "kerple", [1.0] * 4 + [None, 1.0], 1, 512, [512 * 2**n for n in range(6)]
    )
    lost.save(found[1].record.evaluation("last"))
    rows = {tuple(row[:4]): row[4] for row in beside(found[:2]).rows}
    assert rows["kerple, 125m, arxiv", "512", "8,192", "9.08"] == "—", "not the other seed alone"


def test_numbers_of_models_of_both_corpora_name_the_corpus_of_the_measurement():
    cells = [c for c in AMOUNTS.cells() if c.arm == "kerple" and c.regime.tokens == 150_000_000]
    pretend(cells, losses=[1.4, 1.3, 1.2, 1.1, 1.05, 1.0])
    file = cells[0].record.evaluation("last")
    for corpus in ("arxiv", "books"):
        file.with_stem(f"last-{corpus}").write_text(file.read_text())
    rows = {tuple(row[:4]): row[4] for row in beside(cells).rows}
    ours = rows["kerple, 125m, arxiv", "128", "8,192", "31.93"]
    assert ours == f"{math.exp(1.05):.2f} (125m-mixed-128-150M-on-arxiv)"


def test_published_numbers_are_those_of_schemes_we_have_and_of_lengths_they_can_read():
    for each in PUBLISHED:
        assert each.scheme.removesuffix("-d4") in SCHEMES
        assert each.trained <= each.length and each.perplexity > 1
    assert len({(e.scheme, e.size, e.corpus, e.trained, e.length) for e in PUBLISHED}) == len(
        PUBLISHED
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cell.json", "{}"),
        ("cell.json", '{"train_tokens": 0}'),
        ("config.yaml", ""),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 16}\n'),
        ("metrics.jsonl", "null\n"),
        ("run.json", "["),
        ("evaluation/last.json", '{"format": 0}'),
    ],
)
def test_a_damaged_record_is_named_with_the_folder_to_delete(name, content):
    chosen = experiment("kerple", "dape-kerple")
    run(chosen)
    cell = chosen.cells()[1]
    file = cell.record.path / name
    if name == "cell.json" and content != "{}":
        content = json.dumps(json.loads(file.read_text()) | json.loads(content))
    file.write_text(content)
    remedy = f"; delete {cell.record}, and `dape paper` makes the record anew"
    with pytest.raises(UserError) as found:
        results(chosen).markdown()
    assert str(file) in str(found.value) and str(found.value).endswith(remedy)
    assert str(found.value).count("delete") == 1


def test_half_of_the_records_are_half_of_the_results():
    chosen = experiment("kerple", "dape-kerple", seeds=(0, 1))
    run(chosen)
    for cell in chosen.cells()[::2]:
        (cell.record.path / "cell.json").unlink()
    found = results(chosen)
    table = found.sections[0].tables[0]
    assert [row[:2] for row in table.rows] == [["kerple", "1"], ["dape-kerple", "1"]]
    assert len(found.cells) == 2 and found.planned == 4
