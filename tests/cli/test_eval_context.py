"""`dape eval context` and `dape plot context` on small run folders."""

import json
import shutil

import pytest

from folders import dape, make_run, prepare, refused

ASKED = ("--lengths", "16,32,64", "--documents", "4", "--blocks", "2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        make_run(folder / scheme, corpus, scheme, seed=1) for scheme in ("kerple", "dape-kerple")
    ]
    assert not dape("eval", "context", *runs, *ASKED)
    assert not dape("eval", *runs, *ASKED)
    return runs


def record(run, name="context"):
    return json.loads((run / "evaluation" / f"{name}.json").read_text())


def test_the_losses_of_a_length_are_those_of_the_protocol_last(measured):
    """In all bins together, of each document: as `dape eval` has them."""
    for run in measured:
        found, expected = record(run), record(run, "last")
        assert found["targets"] == expected["targets"]
        for place, each in enumerate(expected["measurements"]):
            for tally in found["tallies"].values():
                losses = [sum(bins) for bins in zip(*tally["losses"][place], strict=True)]
                tokens = [sum(bins) for bins in zip(*tally["tokens"], strict=True)]
                assert tokens == expected["targets"]["tokens"]
                means = [loss / count for loss, count in zip(losses, tokens, strict=True)]
                assert means == pytest.approx(each["document_losses"], rel=1e-5)


def test_the_position_curve_covers_the_longest_window(measured):
    positions = record(measured[0])["positions"]
    assert positions[0][:2] == [1, 1] and positions[-1][1] == 64
    assert record(measured[0])["provenance"]["command"].startswith("dape eval context")


def test_tables_and_figure_are_drawn_from_the_records(measured, tmp_path, capsys):
    for suffix in ("md", "png"):
        assert not dape("plot", "context", *measured, "--out", tmp_path / f"context.{suffix}")
    text = (tmp_path / "context.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert [title.partition(",")[0] for title in titles] == [
        *["**Gain of windows of 64 tokens over 16"] * 2,
        *["**Gain of the adapter in windows of 64 tokens"] * 2,
    ]
    assert "| last occurrence | tokens | dape-kerple over kerple |" in text
    counted = sum(map(sum, record(measured[0])["tallies"]["token"]["tokens"]))
    assert f"| all | {counted:,} |" in text
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_has_no_adapter_to_compare(measured, tmp_path):
    for suffix in ("md", "png"):
        assert not dape("plot", "context", measured[1], "--out", tmp_path / f"context.{suffix}")
    assert "Gain of the adapter" not in (tmp_path / "context.md").read_text()


def test_runs_that_scored_other_tokens_are_not_drawn_together(measured, tmp_path, capsys):
    other = shutil.copytree(measured[0], tmp_path / "other")
    assert not dape("eval", "context", other, *ASKED, "--split", "test", "--seed", "0")
    content = record(other) | {"lengths": [16, 32, 128]}
    (other / "evaluation" / "context.json").write_text(json.dumps(content))
    capsys.readouterr()
    line = refused(capsys, "plot", "context", *measured, other, "--out", tmp_path / "a.md")
    assert "were not scored on the same tokens" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval", "context"), "no run given"),
        (
            ("eval", "context", "runs/a", "--lengths", "16"),
            "--lengths 16: give two lengths or more",
        ),
        (("eval", "context", "runs/a", "--blocks", "0"), "--blocks 0: must be at least 1"),
        (("plot", "context", "--out", "a.png"), "no run given"),
        (("plot", "context", "runs/a", "--out", "a.jpg"), "must end in .png"),
        (("plot", "context", "runs/a", "--out", "a.md"), "run `dape eval context` on the model"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert message in refused(capsys, *words)


def test_runs_of_two_corpora_need_one_for_both(measured, tmp_path, capsys):
    data = prepare(tmp_path, seed=5)
    other = make_run(tmp_path / "other", data, "kerple")
    line = refused(capsys, "eval", "context", measured[0], other, *ASKED)
    assert "different corpora; give --data" in line
