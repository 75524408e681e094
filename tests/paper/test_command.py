import json
import re
from pathlib import Path

import pytest
from laboratory import enter

from dape.paper.spread import Workers
from folders import dape, refused


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def test_an_experiment_in_miniature_from_the_plan_to_the_report(capsys, monkeypatch):
    """Commands of one arm are processes; those of the other run in this one, which is faster."""
    call, started = Workers.call, []

    def mixed(self, words, device, log):
        if "dape-kerple-0" not in " ".join(words):
            started.append(words[0])
            return call(self, words, device, log)
        return dape(*words)

    monkeypatch.setattr(Workers, "call", mixed)
    assert dape("paper", "demo", "--scale", "smoke", "--plan") == 0
    assert re.search(r"all +0 +0 +2 +0", capsys.readouterr().out)
    assert dape("paper", "demo", "--scale", "smoke", "--discard") == 0
    printed = capsys.readouterr().out
    assert "2 cells finished, 0 failed, 0 left" in printed and started == ["train", "eval"]
    assert "dape-kerple against kerple" in printed
    for arm in ("kerple", "dape-kerple"):
        record = Path(f"runs/smoke/cells/smoke-python-stdlib-32-8.19k/{arm}-0")
        assert json.loads((record / "run.json").read_text())["tokens"] == 8192
        assert not (Path("runs/smoke") / record.relative_to("runs/smoke/cells") / "model").exists()
    assert dape("paper", "demo", "--scale", "smoke") == 0
    assert "starts on" not in capsys.readouterr().out, "a finished cell is not run again"
    assert dape("paper", "report", "--scale", "smoke") == 0
    report = Path("runs/smoke/report.html").read_text()
    assert "dape-kerple against kerple" in report


def test_what_is_asked_for_must_be_there(capsys):
    assert "did you mean 'core'" in refused(capsys, "paper", "cor")
    assert "dape paper list" in refused(capsys, "paper")
    line = refused(capsys, "paper", "core", "--only", "kerpel")
    assert "did you mean 'kerple'" in line
    assert "NAME=FOLDER" in refused(capsys, "paper", "core", "--data", "arxiv")
    assert "names a corpus twice" in refused(capsys, "paper", "core", "--data", "arxiv=a,arxiv=b")
    for words in (("paper", "core"), ("paper", "report")):
        line = refused(capsys, *words, "--data", "arxvi=data/python-stdlib")
        assert "unknown corpus 'arxvi'; did you mean 'arxiv'?" in line
        assert "no finished corpus in nowhere" in refused(capsys, *words, "--data", "arxiv=nowhere")
    for minutes in ("nan", "inf", "-1", "0"):
        assert f"--minutes {minutes}: must be" in refused(
            capsys, "paper", "core", "--minutes", minutes
        )
    line = refused(capsys, "paper", "core", "--seeds", "0,7", "--plan")
    assert "--seeds 7: the seeds of the cells are 0; leave --seeds out" in line
    line = refused(capsys, "paper", "chomsky", "--seeds", "0", "--plan")
    assert "--seeds 0: no cell is of a single seed; leave --seeds out" in line
    for only in ("", ","):
        assert f"--only: {only!r} names nothing" in refused(capsys, "paper", "core", "--only", only)


def test_the_list_names_every_experiment(capsys):
    assert dape("paper", "list") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^core .*Figure 2", printed, flags=re.MULTILINE)
    assert len(printed.splitlines()) >= 11
