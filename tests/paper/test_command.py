import json
import re
from pathlib import Path

import pytest
from laboratory import Pretended, enter

from dape.errors import UserError
from dape.files import locked
from dape.paper.beyond import DEMO
from dape.paper.experiment import smoke
from dape.paper.experiments import COST
from dape.paper.plan import plan
from dape.paper.results import results
from dape.paper.spread import Workers, spread
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


def test_what_another_process_ends_after_the_plan_is_not_run_again(capsys, monkeypatch):
    def late(cells):
        planned = plan(cells)
        spread(cells, ["cpu"], Pretended(), print)
        return planned

    monkeypatch.setattr("dape.paper.plan.plan", late)
    monkeypatch.setattr(Workers, "call", lambda *_: pytest.fail("the cell ran again"))
    assert dape("paper", "demo", "--scale", "smoke") == 0
    printed = capsys.readouterr().out
    assert (
        re.search(r"all +0 +0 +2 +0", printed) and "0 cells finished, 0 failed, 2 left" in printed
    )


def test_of_two_processes_the_last_writes_what_both_have_made(monkeypatch):
    """Another process reads no records for the tables before the tables are written."""

    def noted(experiment, data):
        with pytest.raises(UserError, match="busy"), locked(experiment.folder, "busy"):
            pass
        return results(experiment, data)

    experiment = smoke(DEMO)
    spread(experiment.cells(), ["cpu"], Pretended(), print)
    monkeypatch.setattr("dape.paper.results.results", noted)
    assert dape("paper", "demo", "--scale", "smoke") == 0
    assert "dape-kerple" in (experiment.folder / "table.md").read_text()


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


def test_a_plan_counts_the_named_cells_and_says_where_documents_are_few(capsys):
    few = "3 documents of the test split in data/python-stdlib exceed 512 tokens; p-values"
    assert dape("paper", "demo", "--scale", "smoke", "--only", "kerple", "--plan") == 0
    printed = capsys.readouterr().out
    assert re.search(r"all +0 +0 +1 +0", printed) and f"{few} over documents need 20" in printed


def test_costs_of_a_gpu_wait_for_a_gpu(capsys, monkeypatch):
    """A CPU would be measured in place of the GPU, if its memory sufficed."""
    monkeypatch.setattr("dape.paper.spread.devices", lambda: ["cpu"])
    started = Pretended()
    monkeypatch.setattr("dape.paper.spread.Workers", lambda: started)
    assert dape("paper", "cost") == 0
    assert "no GPU on this machine: 60 cells wait" in capsys.readouterr().out
    assert started.calls == []
    assert not any(cell.gpu for cell in smoke(COST).cells({}))


def test_the_list_names_every_experiment(capsys):
    assert dape("paper", "list") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^core .*Figure 2", printed, flags=re.MULTILINE)
    assert len(printed.splitlines()) >= 11
