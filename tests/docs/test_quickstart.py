"""The notebook runs from top to bottom on a CPU, and shows what it shows now."""

import math
import re

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

FILE = ROOT / "docs" / "quickstart.ipynb"
TABLE = re.compile(r"^\| (\S*kerple) \| 1 \| (.*) \|$", flags=re.MULTILINE)


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(FILE, as_version=4)


@pytest.fixture(scope="module")
def fresh(stored, tmp_path_factory):
    notebook = nbformat.from_dict(stored)
    for cell in code(notebook):
        cell.outputs = []
    folder = str(tmp_path_factory.mktemp("notebook"))
    return NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def shown(notebook, kind):
    return [each.data[kind] for each in outputs(notebook) if kind in each.get("data", {})]


def printed(notebook):
    return "".join(each.text for each in outputs(notebook) if each.output_type == "stream")


def perplexities(notebook):
    (table,) = shown(notebook, "text/markdown")
    rows = {name: [float(cell) for cell in row.split(" | ")] for name, row in TABLE.findall(table)}
    assert rows.keys() == {"kerple", "dape-kerple"}
    return rows


def test_its_outputs_are_those_of_one_run_from_top_to_bottom(stored):
    counts = [cell.execution_count for cell in code(stored)]
    assert counts == list(range(1, len(counts) + 1))
    assert FILE.stat().st_size < 300_000


def test_it_shows_what_it_showed(stored, fresh):
    kinds, expected = (
        [{output.output_type for output in cell.outputs} for cell in code(each)]
        for each in (fresh, stored)
    )
    assert kinds == expected
    assert {each.name for each in outputs(fresh) if each.output_type == "stream"} == {"stdout"}
    assert len(shown(fresh, "image/png")) == 2


def test_a_loaded_model_is_the_saved_one(stored, fresh):
    assert "True" in shown(stored, "text/plain")
    assert "True" in shown(fresh, "text/plain")


def test_both_models_learn_and_agree_with_the_stored_numbers(stored, fresh):
    losses = [float(loss) for loss in re.findall(r"last loss (\S+) nats", printed(fresh))]
    assert len(losses) == 2 and max(losses) < 0.5 * math.log(257)
    for scheme, row in perplexities(fresh).items():  # other versions of Python are other texts
        assert row == pytest.approx(perplexities(stored)[scheme], rel=0.25)


def test_the_generated_text_goes_on_from_the_prompt(fresh):
    (_, text) = printed(fresh).split("    def __init__(self, ")
    assert len(text.strip()) > 50
