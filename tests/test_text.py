"""Names of others on a terminal, in Markdown, in HTML and in figures."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.markdown import Markdown

from dape.evaluate.compare import group
from dape.figures.curves import over_length
from dape.figures.report import Report
from dape.figures.style import save
from dape.figures.tables import Table, results
from dape.text import code, code_block, counted, markdown, one_line
from evaluations import make

HOSTILE = "a|b [red]x[/] $\\frac{$ <script>1</script> \x1b[31m`c` **d**\nnext\x07"


@given(st.text())
def test_a_line_is_one_line_of_printable_signs(text):
    line = one_line(text)
    assert line.isprintable() and line.splitlines() in ([], [line])


@given(st.text(st.characters(exclude_categories=("C", "Z")), min_size=1))
def test_code_in_markdown_is_the_text_itself(text):
    tokens = Markdown(f"x {code(text)} x").parsed[1].children
    (span,) = (token for token in tokens if token.type == "code_inline")
    assert span.content == text


@given(st.text("`ab\n", min_size=1).filter(str.strip))
def test_a_block_of_code_ends_where_it_should(text):
    (token,) = Markdown(code_block(text, "yaml")).parsed
    assert (token.type, token.info) == ("fence", "yaml")
    assert token.content == text.strip() + "\n"


@given(st.text(st.sampled_from("|<$[`\\a b"), min_size=1))
def test_a_cell_of_markdown_has_no_border_within(text):
    table = Table("t", ["a", "b"], [[text, "1"]], "n").markdown().splitlines()[4]
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", table)) == 3
    assert "\\" in markdown(text) or not set(text) & set("|$[`\\")


@pytest.fixture
def evaluations():
    scheme = f"kerple {HOSTILE}"
    return [
        make(scheme, [2.0, 2.1, 2.2, 2.3, 2.4], run=f"runs/{name}", settings=None)
        for name in (HOSTILE, "other")
    ]


def test_the_terminal_obeys_no_name(evaluations, capsys):
    results(group(evaluations)).show()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown
    assert "[red]x[/]" in shown
    assert len([line for line in shown.splitlines() if "7.39" in line]) == 2


def test_markdown_and_html_show_names_as_they_are(evaluations):
    report = Report(group(evaluations), "perplexity", f"dape plot {HOSTILE}")
    text, page = report.markdown(), report.html()
    assert "<script>" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    for part in (text.split("```")[0], text.split("```")[-1]):
        assert not re.search(r"(?<!\\)<script", part) and "\x1b" not in part
    rows = [line for line in text.splitlines() if line.startswith("| kerple")]  # of two tables
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7, 8}


def test_dollar_signs_are_no_formulas(evaluations, tmp_path):
    save(over_length(group(evaluations)), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000


def test_a_number_has_its_noun_in_singular_or_plural():
    found = [counted(number, "cell") for number in (0, 1, 2, 2000)]
    assert found == ["0 cells", "1 cell", "2 cells", "2,000 cells"]
    assert [counted(n, "batch", "es") for n in (1, 2)] == ["1 batch", "2 batches"]
