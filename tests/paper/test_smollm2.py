"""The experiment on a pretrained model of others: plan, prices, tables by arm, and rates."""

import json
from pathlib import Path

import pytest
from laboratory import enter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import evaluations
from dape.cli import paper
from dape.evaluate.prompts import TASKS
from dape.evaluate.retrieval import Retrieval
from dape.evaluate.trials import Cell as Found
from dape.evaluate.trials import Plan
from dape.paper import record
from dape.paper.plan import choose, plan, table, without_model
from dape.paper.record import End
from dape.paper.results import results
from dape.paper.smollm2 import REGIME, SMOLLM2
from dape.train.recipe import write

LENGTHS = tuple(2**n for n in range(8, 17))
LOSSES = {"as-it-is": 3.0, "plain": 2.5, "dape-kerple": 2.0, "blind": 2.4}
ASKED = Plan((2048, 4096), (0.0, 1.0), trials=5, seed=0)


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def pretend(cell):
    """Leave the record of a cell as if the commands had been run; subjects name no arm."""
    steps = cell.training.recipe.training.steps
    cell.record.path.mkdir(parents=True)
    cell.record.recipe.write_text(write(cell.training.recipe))
    cell.record.record.write_text('{"seconds": 60.0}')
    speed = {"tokens_per_second": 5e4} if steps else {}
    rate = cell.training.recipe.optimizer.learning_rate
    line = {"step": steps, "validation_loss": abs(rate - 1e-4) + 1, **speed}
    cell.record.metrics.write_text(json.dumps(line) + "\n")
    if cell.regime == REGIME:
        scheme = "llama" if cell.training.recipe.model.adapter is None else "llama + dape-kerple"
        about = {"seed": cell.training.seed, "train_length": 16_384, "lengths": LENGTHS}
        loss = LOSSES[cell.arm] + 0.001 * cell.training.seed
        made = evaluations.make(scheme, [loss] * 9, run=str(cell.run), **about)
        made.save(cell.record.evaluation("last"))
        for task in TASKS:
            cells = [
                Found(length, depth, loss / 4, 0.5, 2.0, -1.0)
                for length in ASKED.lengths
                for depth in ASKED.depths
            ]
            numbers = Retrieval(made.subject, task, None, ASKED, cells, {}, evaluations.PROVENANCE)
            numbers.save(cell.record.retrieval(task))
    commands = {str(kept): str(each) for each in cell.commands for kept in each.keeps}
    record.write(cell, End(commands, {str(cell.commands[0]): 120.0}, None, "c0ffee", 4_000_000))


def cells(*arms, seeds=(0,)):
    return [c for c in SMOLLM2.cells() if c.arm in arms and c.training.seed in seeds]


def test_the_first_seed_of_every_arm_comes_first_and_costs_at_most_twenty_minutes():
    planned = plan(SMOLLM2.cells())
    first = choose(planned, seeds=(0,))
    assert len(first) == 14 and {cell.training.seed for cell in first} == {0}
    assert {cell.training.seed for cell in choose(planned, seeds=(1, 2))} == {1, 2}
    assert [cell.training.seed for cell in choose(planned, only=["blind"], seeds=(2,))] == [2]
    due = {cell.name for cell in first if cell.regime == REGIME}
    minutes = [each.minutes for each in planned if each.cell.name in due]
    assert sum(minutes) == pytest.approx(20, abs=0.5)
    assert first[0].arm == "yarn-dape-kerple", "the longest"
    assert "About" in table(planned, 2).note


def test_cells_wait_for_the_corpus_and_for_the_model(capsys):
    assert not paper.main(["smollm2", "--only", "plain"])
    assert "no corpus in data/books-smollm2: 3 cells wait" in capsys.readouterr().out
    assert not paper.main(
        [
            "smollm2",
            "--only",
            "plain",
            "--seeds",
            "0,2",
            "--data",
            "books-smollm2=data/python-stdlib",
        ]
    )
    assert "no model in models/smollm2: 2 cells wait" in capsys.readouterr().out
    assert not paper.main(["smollm2", "--only", "plain", "--seeds", "1"])
    assert "no corpus in data/books-smollm2: 1 cell waits" in capsys.readouterr().out
    Path("models/smollm2").mkdir(parents=True)
    assert without_model(SMOLLM2.cells()) == {}


def test_cells_wait_for_texts_beyond_the_longest_window(capsys):
    """A training of minutes would end without a measurement."""
    Path("models/smollm2").mkdir(parents=True)
    words = ["smollm2", "--only", "plain", "--data", "books-smollm2=data/python-stdlib"]
    assert not paper.main(words)
    printed = capsys.readouterr().out
    few = "0 documents of the test split in data/python-stdlib exceed 65,536 tokens: 3 cells wait"
    assert few in printed and "starts on" not in printed


def test_a_finished_arm_gives_the_price_of_further_seeds():
    pretend(cells("plain")[0])
    minutes = [each.minutes for each in plan(cells("plain", seeds=(0, 1, 2)))]
    assert minutes == [2.0, 2.0, 2.0]
    due = table(plan(cells("plain", "blind", seeds=(0, 1))), 1)
    assert [row[-1] for row in due.rows] == ["~7", "~7"], "2.0 by plain, and two of 2.4 for blind"
    assert "~: includes estimates, for arms without a finished cell." in due.note
    assert "~" not in table(plan(cells("plain", seeds=(0, 1, 2))), 1).note


def test_tables_name_arms_which_the_records_cannot_tell_apart():
    for cell in cells("as-it-is", "plain", "dape-kerple", "blind", seeds=(0, 1)):
        pretend(cell)
    found = results(SMOLLM2)
    curves, passkey, needle = found.sections
    (perplexity, tests, trainings), (numbers,) = curves.tables, passkey.tables
    assert [row[:2] for row in perplexity.rows] == [
        ["as-it-is", "1"],
        ["plain", "2"],
        ["dape-kerple", "2"],
        ["blind", "2"],
    ]
    assert tests.rows[0][0] == "plain against as-it-is"
    assert [row[1:4] for row in trainings.rows[:2]] == [
        ["1", "1.0099", "—"],
        ["2", "1.0000", "50,000"],
    ]
    assert numbers.header[:3] == ["arm", "runs", "depth"]
    rows = {(row[0], row[2]): row[1:2] + row[3:] for row in numbers.rows}
    assert rows["as-it-is", "0"] == ["1", "75%", "75%"]
    assert rows["blind", "1"] == ["2", "60%", "60%"] and len(rows) == 8
    assert needle.name == f"{REGIME.name}-needle" and needle.figure is not None
    outcomes = {verdict.claim.text.split(" at ")[0]: verdict.outcome for verdict in found.verdicts}
    assert outcomes["dape-kerple is better than plain"] == "reproduced"
    assert outcomes["dape-kerple is better than yarn"] == "not measured"
    found.write()
    assert Path("results/retrofit/smollm2/table.md").is_file()


def test_rates_have_a_table_of_validation_losses_alone():
    for cell in cells("plain-1e-4", "plain-3e-4"):
        pretend(cell)
    (section,) = results(SMOLLM2).sections
    (trainings,) = section.tables
    assert [row[:3] for row in trainings.rows] == [
        ["plain-1e-4", "1", "1.0000"],
        ["plain-3e-4", "1", "1.0002"],
    ]


def test_a_document_ends_as_in_pretraining_and_digits_stand_alone(benchmarks):
    """Both are in the settings of SmolLM2's own tokenizer, and lost in the format GGUF."""
    words = {token: n for n, token in enumerate(["<|endoftext|>", "<|im_start|>", "Ċ", "Ġ", "7"])}
    backend = Tokenizer(models.BPE(words | {"ĊĠ": 5}, [("Ċ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    read = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_start|>")
    assert read.tokenize("\n 77") == ["Ċ", "Ġ", "7", "7"]
    made = benchmarks("smollm2").of_texts(read)
    assert made.eos_token_id == 0 and made.tokenize("\n 77") == ["ĊĠ", "7", "7"]
