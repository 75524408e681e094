"""`benchmarks/scaling.py`: its plan, what it keeps, its table."""

import pytest

from dape.errors import UserError


@pytest.fixture(scope="module")
def scaling(benchmarks):
    return benchmarks("scaling")


@pytest.fixture(scope="module")
def figure(benchmarks):
    return benchmarks("scaling_figure")


def entry(seconds, tokens, micro=8, commit="abc"):
    return {
        "micro_batch_size": micro, "seconds": seconds, "tokens_per_second": tokens, "gib": 10.0,
        "mfu": 0.4,
        "provenance": {"commit": commit, "device": "NVIDIA H200", "versions": {"torch": "2.11"}},
    }  # fmt: skip


def test_the_plan_names_every_case_and_runs_none(scaling, tmp_path, capsys):
    scaling.main(["models", "--plan", "--out", str(tmp_path / "none.json")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 2 * 4, "numbers of GPUs, schemes, sizes"
    assert all(line.startswith("planned models") for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_length_beyond_two_gpus_is_left_to_four(scaling, tmp_path, capsys):
    asked = ["lengths", "--plan", "--schemes", "nope", "--out", str(tmp_path / "none.json")]
    for lengths, gpus in (("131072", "2"), ("131072,1048576", "2"), ("1048576", "4")):
        scaling.main([*asked, "--lengths", lengths, "--gpus", gpus])
        assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "3"], r"unknown number of GPUs '3' \(known: 1, 2, 4\)"),
        (["--sizes", "27b"], r"unknown size '27b'; did you mean '2.7b'\?"),
        (["model"], r"unknown part 'model'; did you mean 'models'\?"),
    ],
)
def test_what_has_no_layout_is_a_line(scaling, words, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        scaling.main([*words, "--plan"])


def test_every_case_is_a_recipe_that_its_devices_can_share(scaling):
    arguments = scaling.parser().parse_args([])
    from dape.train.recipe import Recipe, override, read

    for case in scaling.cases(arguments):
        if case.part != "attention":
            recipe = read(scaling.ROOT / f"recipes/{case.size}.yaml", Recipe)
            micro = {"hardware.micro_batch_size": case.micro_batches[-1]}
            chosen = override(recipe, {**case.changes, **micro})
            assert chosen.micro_batches(chosen.groups(case.gpus)) >= 1


def test_the_table_compares_with_one_gpu_and_with_nope(scaling, tmp_path):
    out = tmp_path / "scaling.json"
    for scheme, gpus, tokens in (("nope", 1, 100.0), ("nope", 4, 380.0), ("dape-kerple", 4, 323.0)):
        case = scaling.Case("models", "2.7b", scheme, gpus)
        scaling.keep(out, case, {"failed": "not done after 9 s"})
        scaling.keep(out, case, entry(2.0, tokens / 2, micro=4))
        scaling.keep(out, case, entry(1.0, tokens))
        scaling.keep(out, case, entry(1.0, tokens))
    found = scaling.results(out)
    assert len(found) == 6, "one for each micro-batch, and no failure beside a result"
    rows = [line.split(" | ") for line in scaling.table(found).splitlines()[2:]]
    cells = {(row[2], row[3]): [each.strip(" |") for each in row[5:]] for row in rows}
    assert cells["nope", "4"] == ["8", "10.0", "1.000", "380", "40%", "95%", "100%"]
    assert cells["dape-kerple", "4"][-2:] == ["", "85%"]
    assert cells["nope", "1"][-2:] == ["100%", "100%"]
    page = scaling.page(found)
    assert page.startswith("# Training on several GPUs\n") and scaling.table(found) in page
    assert page.endswith("\n- device: NVIDIA H200\n- commit: abc\n- versions: torch 2.11")


def test_a_case_cut_off_between_micro_batches_is_run_again(scaling, tmp_path, monkeypatch):
    out, ran = tmp_path / "scaling.json", []
    words = ["models", "--gpus", "1", "--sizes", "2.7b", "--schemes", "nope", "--out", str(out)]
    (case,) = scaling.cases(scaling.parser().parse_args(words))
    assert case.micro_batches == (8, 16)

    def run(case, out, seconds):
        ran.append(case)
        scaling.keep(out, case, entry(2.0, 100.0, micro=8))
        return "no memory"

    monkeypatch.setattr(scaling, "run", run)
    scaling.keep(out, case, entry(2.0, 100.0, micro=8))  # and then a signal
    for _ in range(2):
        scaling.main(words)
    assert ran == [case], "what does not fit is not tried again"


def test_a_failure_names_the_last_reason(scaling, tmp_path, monkeypatch):
    reasons = iter(["not done after 9 s", "no memory"])
    monkeypatch.setattr(scaling, "run", lambda *_: next(reasons))
    out = tmp_path / "scaling.json"
    words = ["attention", "--gpus", "1", "--schemes", "nope", "--out", str(out)]
    monkeypatch.setattr(scaling, "ATTENTION_LENGTHS", (32_768,))
    for _ in range(2):
        scaling.main(words)
    assert [each["failed"] for each in scaling.results(out)] == ["no memory"]


def test_results_of_another_commit_are_no_yardstick(scaling, figure, tmp_path):
    """A faster kernel between two measurements would pass for the gain of more GPUs."""
    out = tmp_path / "scaling.json"
    one, two = (scaling.Case("models", "2.7b", "nope", gpus) for gpus in (1, 2))
    scaling.keep(out, one, entry(1.0, 100.0, micro=16, commit="old"))
    scaling.keep(out, two, entry(1.0, 260.0, commit="new"))
    rows = [line.split(" | ") for line in scaling.table(scaling.results(out)).splitlines()[2:]]
    assert {row[3]: row[-2] for row in rows} == {"1": "100%", "2": ""}
    with pytest.raises(UserError, match=r"on a single GPU and on several at the same commit; run"):
        figure.draw(scaling.results(out))
    scaling.keep(out, one, entry(1.0, 125.0, commit="new"))
    assert len(scaling.results(out)) == 2, "no micro-batch of the commit before"
    assert figure.lines(scaling.results(out), "models") == [("nope", "2.7b", [1, 2], [1.0, 2.08])]
    assert "| 104% | 100% |" in scaling.table(scaling.results(out))


def test_the_figure_has_a_line_for_what_one_gpu_and_several_have(scaling, figure, tmp_path):
    out = tmp_path / "scaling.json"
    for gpus, tokens in ((4, 380.0), (1, 100.0), (2, 197.0)):
        scaling.keep(out, scaling.Case("models", "2.7b", "nope", gpus), entry(1.0, tokens))
    scaling.keep(out, scaling.Case("models", "6.7b", "nope", 4), entry(1.0, 90.0))
    for gpus, seconds in ((1, 2.0), (4, 0.5)):
        case = scaling.Case("attention", "125m", "dape-kerple", gpus, 32768)
        scaling.keep(out, case, {"seconds": seconds})
    found = scaling.results(out)
    assert figure.lines(found, "models") == [("nope", "2.7b", [1, 2, 4], [1.0, 1.97, 3.8])]
    assert figure.lines(found, "attention") == [("dape-kerple", "32,768", [1, 4], [1.0, 4.0])]
    assert figure.lines(found, "lengths") == []
    panels = figure.draw(found).axes
    titles = [panel.get_title() for panel in panels]
    assert titles == ["training, 512 tokens", "attention, one sequence"]
    assert panels[0].lines[1].get_ydata().tolist() == [1.0, 1.97, 3.8]
