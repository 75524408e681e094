"""`dape plot encoding`: the file it writes, and what it refuses."""

import pytest

from dape import cli

SMALL = ("--heads", "2", "--length", "8")


def dape(*words):
    return cli.main(["plot", "encoding", *map(str, words)])


@pytest.mark.parametrize(
    ("suffix", "signature"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_suffix_chooses_the_format(tmp_path, capsys, suffix, signature):
    out = tmp_path / "figures" / f"encoding.{suffix}"
    assert dape("kerple", "--out", out, *SMALL) == 0
    assert out.read_bytes().startswith(signature)
    assert capsys.readouterr().out == f"wrote {out}\n"


def test_a_file_without_a_name_has_that_of_the_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dape("dape-alibi", *SMALL) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["dape-alibi.png"]


def test_the_same_command_writes_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        dape("kerple", "--seed", 3, "--out", file, *SMALL)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("kerpel",), "did you mean 'kerple'?"),
        (("cope",), "'cope' cannot be drawn without data"),
        (("kerple", "--out", "a.jpg"), "must end in .png, .pdf, .svg"),
        (("kerple", "--heads", "0"), "heads=0 must be at least 1"),
        (("kerple", "--head", "3"), "did you mean '--heads'?"),
        ((), "NAME"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    assert dape(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
