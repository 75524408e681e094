"""`dape plot`: the files it writes from evaluations, and what it refuses."""

import base64
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from dape import cli
from evaluations import make

KERPLE = [[2.1, 2.0, 2.1, 2.3, 2.6], [2.12, 2.1, 2.3, 2.5, 2.9]]
DAPE = [[2.0, 1.9, 1.8, 1.7, 1.6], [2.1, 1.9, 1.8, 1.8, 1.7]]


@pytest.fixture
def runs(tmp_path):
    folders = []
    for scheme, losses in (("kerple", KERPLE), ("dape-kerple", DAPE)):
        for seed, values in enumerate(losses):
            folder = tmp_path / f"{scheme}-{seed}"
            evaluation = make(scheme, values, seed=seed, run=str(folder))
            evaluation.save(folder / "evaluation" / "last.json")
            folders.append(folder)
    return folders


def dape(*words):
    return cli.main([str(word) for word in words])


def refused(capsys, *words):
    assert dape(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("suffix", "signature"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_suffix_chooses_the_format(runs, tmp_path, suffix, signature):
    out = tmp_path / "figures" / f"length.{suffix}"
    assert not dape("plot", *runs, "--out", out)
    assert out.read_bytes().startswith(signature)


def test_markdown_holds_the_table_of_means_and_deviations(runs, tmp_path):
    out = tmp_path / "table.md"
    dape("plot", *runs, "--out", out)
    text = out.read_text()
    assert "| scheme | runs | 128* | 256 | 512 | 1,024 | 2,048 |" in text
    assert "| kerple | 2 | 8.25 ± 0.12 |" in text  # exp(2.1) and exp(2.12)
    assert f"dape plot {runs[0]} " in text and "dape eval runs/*" in text and "c0ffee" in text


def test_the_report_is_one_page_that_needs_no_network(runs, tmp_path):
    (runs[0] / "config.yaml").write_text("model: {scheme: kerple} # <marked>\n")
    (runs[0] / "run.json").write_text(json.dumps({"command": "dape train it", "tokens": 1234567}))
    steps = [{"step": n, "tokens": 10 * n, "loss": 5.0 / n} for n in (1, 2, 3)]
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    out = tmp_path / "report.html"
    dape("plot", *runs, "--out", out)
    page = out.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=(?!\"data:)|url\(|@import|<script|<link", page)
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(images) == 3
    for image in images:
        assert ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")
    for text in ("8.25 ± 0.12", "1,234,567", "dape train it", "&lt;marked&gt;", "c0ffee"):
        assert text in page


def test_a_report_without_training_files_has_no_training_figure(runs, tmp_path):
    out = tmp_path / "report.html"
    dape("plot", *runs, "--out", out)
    assert out.read_text(encoding="utf-8").count("<figure>") == 2


def test_mistakes_are_one_line_with_the_remedy(runs, tmp_path, capsys):
    assert "must end in .png" in refused(capsys, "plot", *runs, "--out", tmp_path / "figure.jpg")
    assert "--out" in refused(capsys, "plot", *runs)
    assert "dape plot RUN..." in refused(capsys, "plot", "--out", tmp_path / "a.png")
    unknown = refused(capsys, "plot", tmp_path / "nothing", "--out", tmp_path / "a.png")
    assert "the evaluation is missing; run `dape eval`" in unknown
    for words, rule in (
        (["--protocol", "sliding"], "protocol sliding needs a stride; only sliding takes --stride"),
        (["--stride", "3"], "protocol last has no stride; only sliding takes --stride"),
    ):
        assert rule in refused(capsys, "plot", *runs, *words, "--out", tmp_path / "a.png")


def test_runs_evaluated_on_other_tokens_are_not_drawn_together(runs, tmp_path, capsys):
    other = make("alibi", KERPLE[0])
    other = replace(other, targets=replace(other.targets, split="validation"))
    other.save(tmp_path / "alibi" / "evaluation" / "last.json")
    message = refused(capsys, "plot", *runs, tmp_path / "alibi", "--out", tmp_path / "a.png")
    assert "cannot be compared" in message
