import shlex
from dataclasses import replace

import pytest
from laboratory import cells, enter, sweep

from dape.cli import bench_model, retrofit, train
from dape.cli.arguments import parse
from dape.errors import UserError
from dape.paper import experiments
from dape.paper.cells import Regime, by_regime, once
from dape.paper.experiment import smoke
from dape.paper.plan import plan
from dape.paper.sweep import SIZES
from dape.positions.scheme import resolve


@pytest.fixture(autouse=True)
def laboratory(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)


def every_cell():
    """Return the cells of all experiments that train a model."""
    everything = once(cell for each in experiments.EXPERIMENTS.values() for cell in each.cells())
    return [cell for cell in everything if cell.training]


def test_a_command_says_what_the_cell_says():
    for cell in (members[-1] for members in by_regime(every_cell()).values()):
        name, *words = cell.commands[0].words
        parsed = {"train": train.parsed, "retrofit": retrofit.read}[name](words).recipe
        assert parsed == cell.training.recipe, str(cell.commands[0])


def test_a_benchmark_is_a_command_too_and_needs_no_corpus():
    for scale in (lambda each: each, smoke):
        for cell in scale(experiments.COST).cells():
            first, second, *words = cell.commands[0].words
            assert (first, second, words[0]) == ("bench", "model", "--sizes")
            arguments = parse(bench_model.Arguments, words, "dape bench model")
            assert arguments.out == cell.run.path
            for scheme in arguments.schemes:
                resolve(scheme)
    minutes = [each.minutes for each in plan(experiments.COST.cells())]
    assert minutes == sorted(minutes) and minutes[0] > 0


def test_a_step_has_the_tokens_of_its_size_and_a_training_those_asked_for():
    for cell in every_cell():
        if cell.needs:
            continue
        training = cell.training.recipe.training
        step = training.batch_size * training.length
        assert step == SIZES[cell.regime.size].step
        assert 0 <= training.steps * step - cell.regime.tokens < step
        assert cell.training.recipe.micro_batches(groups=1) >= 1


def test_a_cell_is_named_by_what_sets_it_apart():
    found = every_cell()
    assert len({(cell.home, cell.name) for cell in found}) == len(found)
    assert len({repr(replace(cell.training.recipe, name="same")) for cell in found}) == len(found)
    assert Regime("125m", "arxiv", 512).name == "125m-arxiv-512-150M"
    assert Regime("smoke", "arxiv", 32, 8192).name == "smoke-arxiv-32-8.19k"


def test_experiments_share_cells():
    core = {cell.name for cell in experiments.CORE.cells()}
    size = {cell.name for cell in experiments.SIZE.cells()}
    assert {name for name in size if name.startswith("125m")} <= core


def test_the_evaluation_reads_from_the_training_length():
    (cell,) = [c for c in experiments.CORE.cells() if c.name == "125m-arxiv-512-150M/kerple-0"]
    assert str(cell.commands[1]) == (
        "dape eval runs/paper/125m-arxiv-512-150M/kerple-0 --lengths 512,...,16384"
    )


def test_a_model_of_two_corpora_is_measured_on_each():
    cell = next(iter(experiments.AMOUNTS.cells({"books": "elsewhere"})))
    measures = [shlex.join(each.words) for each in cell.commands[1:]]
    assert [words.partition("--data ")[2] for words in measures] == ["data/arxiv", "elsewhere"]
    kept = [str(kept) for each in cell.commands[1:] for kept in each.keeps]
    assert kept == ["evaluation/last-arxiv.json", "evaluation/last-books.json"]


def test_cells_of_two_sweeps_are_one_with_the_steps_of_both():
    plain, more = cells("kerple"), cells("kerple", reads="32,64")
    (both,) = once([*plain, *more])
    assert both.commands == (*plain[0].commands, more[0].commands[1])


def test_in_miniature_each_arm_is_trained_once_and_claims_move_along():
    for experiment in experiments.EXPERIMENTS.values():
        tiny = smoke(experiment)
        arms = {cell.arm for cell in experiment.cells()}
        assert sorted(cell.arm for cell in tiny.cells()) == sorted(arms)
        checks = [check for claim in tiny.claims for check in claim.checks]
        regimes = {check.regime for check in checks if hasattr(check, "regime")}
        assert regimes <= set(tiny.regimes)


def test_an_unknown_experiment_is_refused_with_the_near_name():
    with pytest.raises(UserError, match="did you mean 'core'"):
        experiments.find("cores")


def test_claims_speak_of_arms_and_lengths_that_are_measured():
    for experiment in experiments.EXPERIMENTS.values():
        measured = {(cell.regime, cell.arm) for cell in experiment.cells()}
        for claim in experiment.claims:
            for check in claim.checks:
                arms = [getattr(check, name, None) for name in ("arm", "candidate", "baseline")]
                for arm in filter(None, arms):
                    regime = getattr(check, "regime", None)
                    assert (regime, arm) in measured, (experiment.name, check)
                if hasattr(check, "regime"):
                    assert check.regime.length * getattr(check, "times", 1) <= 16_384


def test_a_sweep_has_the_product_of_its_parts():
    found = sweep("kerple", "alibi", seeds=(0, 1, 2), tokens=(2**13, 2**14))
    assert len(list(found.cells(experiments.DEMO.home, {}))) == 2 * 3 * 2
