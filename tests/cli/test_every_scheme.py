"""Every command that takes a run, over every base and every adapter."""

import pytest
from huggingface_hub import ModelCard

from dape.evaluate.compare import split
from dape.positions.scheme import ADAPTERS, BASES
from dape.runs import RunFolder
from folders import dape, make_run, prepare, refused

NAMES = [*BASES, *(f"{name}-kerple" for name in ADAPTERS)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_evaluated_drawn_and_exported(tmp_path, corpus, name, capsys):
    run = make_run(tmp_path / "run", corpus, name)
    assert not dape("eval", run, "--lengths", "8,16", "--documents", 1)
    assert RunFolder(run).evaluation("last").is_file()
    assert f" {name} " in capsys.readouterr().out
    assert not dape("plot", run, "--out", tmp_path / "table.md")
    assert f"| {name} | 1 | " in (tmp_path / "table.md").read_text()
    assert not dape("export", run, "--out", tmp_path / "shared")
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    adapter, base = split(name)
    for part in (BASES[base], *([ADAPTERS[adapter]] if adapter else [])):
        assert f"{part.name}: {part.paper}, {part.year}" in card.text
    assert f"by the scheme `{name}`" in card.text


def test_all_schemes_are_drawn_side_by_side_in_one_report(tmp_path, corpus):
    runs = [make_run(tmp_path / name, corpus, name) for name in ("nope", "rope", "dape3-kerple")]
    assert not dape("eval", *runs, "--lengths", "8,16", "--documents", 1)
    assert not dape("plot", *runs, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in ("nope", "rope", "dape3-kerple"))


def test_a_run_whose_weights_are_those_of_another_scheme_is_not_exported(tmp_path, corpus, capsys):
    run, other = (make_run(tmp_path / name, corpus, name) for name in ("dape-kerple", "kerple"))
    weights = (other / "model" / "model.safetensors").read_bytes()
    (run / "model" / "model.safetensors").write_bytes(weights)
    line = refused(capsys, "export", run, "--out", tmp_path / "shared")
    assert "do not fit the configuration: the file misses" in line and "adapter" in line
    assert not (tmp_path / "shared").exists()
