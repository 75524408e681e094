"""The file, the tables and the figure of a benchmark."""

import json
import math
from dataclasses import replace

import pytest
from timings import FULL, PROVENANCE, results

from dape.bench.record import Missing, load
from dape.errors import UserError
from dape.figures.speed import draw, page, tables


def test_what_is_saved_is_what_is_loaded_and_plain_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    results().save(path)
    assert load(path) == results()
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["seed"] == 5 and content["provenance"] == PROVENANCE
    assert content["entries"][-1]["missing"] == {"kind": FULL.kind, "reason": FULL.reason}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the results are missing; measure again with `dape bench attention`"),
        ("{", "not JSON"),
        ('{"format": 0}', "not results of format 1"),
        ("[]", "no JSON object"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        load(path)


def test_a_table_has_times_ratios_and_peaks_and_says_why_a_number_is_missing():
    short, long = tables(results())
    assert short.title == "dape-kerple, 12 heads of 64, bf16, causal: 32 x 512 tokens"
    assert long.title.endswith("8 x 2,048 tokens")
    assert short.header == [
        "method", "forward (ms)", "/ sdpa", "forward + backward (ms)", "/ sdpa",
        "peak forward (MiB)", "peak forward + backward (MiB)",
    ]  # fmt: skip
    assert short.rows == [
        ["sdpa", "0.0500", "1.00", "0.250", "1.00", "3.0", "3.0"],
        ["flex", "—", "—", "—", "—", "—", "—"],
        ["cuda", "0.200", "4.00", "1,234", "4,938", "1,024", "1,024"],
        ["textbook", "6.00", "120", "14.0", "56.0", "—", "—"],
    ]
    assert long.rows[-1] == ["textbook", "6.00", "120", "OOM", "—", "—", "—"]
    assert "Checked on 1 x 256 tokens." in short.note
    assert "— (it knows no bias): flex." in short.note
    assert "By CUDA graph: sdpa, cuda, textbook." in short.note
    assert "By CUDA graph: sdpa, cuda, textbook forward." in long.note
    assert short.note.count(" to ") == 6 and "cuda forward (0.100 to 0.400 ms)" in short.note


def test_a_failure_is_told_from_what_cannot_be():
    made = results()
    made.entries[-1] = replace(made.entries[-1], missing=Missing("failed", "Error: a b"))
    long = tables(made)[1]
    assert long.rows[-1][3] == "failed"
    assert "failed (Error: a b): textbook forward + backward." in long.note


def test_results_of_which_some_are_still_to_come_have_a_table():
    made = results()
    del made.entries[1:]
    (only,) = tables(made)
    assert only.rows == [["sdpa", "0.0500", "1.00", "", "—", "3.0", "—"]]


def test_the_page_says_what_made_the_numbers():
    text = page(results(), "figure.png")
    for part in (
        "`dape bench attention` at c0ffee, seed 5; abacus; torch 2.0", "![](figure.png)",
        "`sdpa`, which chose CUDNN_ATTENTION here", "| cuda | 0.200 | 4.00 |",
    ):  # fmt: skip
        assert part in text


def test_the_figure_has_a_line_for_each_measured_method_and_a_panel_for_peaks():
    figure = draw(results())
    forward, training, peaks = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in training.lines}
    assert list(lines) == ["sdpa", "textbook", "cuda"]
    assert lines["cuda"] == [1234.5, 1234.5] and lines["textbook"][0] == 14.0
    assert math.isnan(lines["textbook"][1])
    assert [line.get_linestyle() for line in forward.lines] == ["--", "-", "-"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in peaks.lines}
    assert drawn["cuda"] == [1024.0, 1024.0] and drawn["sdpa"] == [3.0, 3.0]


def test_without_peaks_there_is_no_panel_for_them():
    made = results()
    made.entries[:] = [replace(entry, peak=None) for entry in made.entries]
    assert len(draw(made).axes) == 2
