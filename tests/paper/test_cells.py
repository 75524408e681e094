import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from laboratory import cells, enter, sweep

from dape.cli import bench_model, eval_retrieval, retrofit, train
from dape.cli.arguments import parse
from dape.cli.options import lengths
from dape.errors import UserError
from dape.paper import experiments
from dape.paper.cells import TRAINED, Regime, by_regime, once
from dape.paper.experiment import smoke
from dape.paper.plan import plan
from dape.paper.smollm2 import REGIME, SMOLLM2
from dape.paper.sweep import SIZES
from dape.positions.scheme import resolve
from dape.train.recipe import Retrofit

ROPE = "rope_parameters"


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
    assert minutes[-1] < 10, "a cell that a machine's end interrupts begins again"


def test_a_step_has_the_tokens_of_its_size_and_a_training_those_asked_for():
    for cell in every_cell():
        if isinstance(cell.training.recipe, Retrofit):
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
    for cell in experiments.LENGTHS.cells():
        assert cell.commands[1].words[-1] == f"{cell.regime.length},...,16384"


def test_the_learnt_rows_are_of_texts_of_one_four_and_sixteen_times_the_training_length():
    (cell,) = experiments.LEARNT.cells()
    measured = [dict(pairwise(each.words)) for each in cell.commands[2:]]
    assert [each["--length"] for each in measured] == ["512", "2048", "8192"]
    files = [f"{cell.run.path}/learned/{length}.json" for length in (512, 2048, 8192)]
    assert [each["--out"] for each in measured] == files


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
        if experiment is experiments.COST:
            continue
        tiny = smoke(experiment)
        arms = {cell.arm for cell in experiment.cells()}
        assert sorted({cell.arm for cell in tiny.cells()} - {"base"}) == sorted(arms - {"base"})
        assert len({cell.arm for cell in tiny.cells()}) == len(tiny.cells())
        checks = [check for claim in tiny.claims for check in claim.checks]
        regimes = {check.regime for check in checks if hasattr(check, "regime")}
        assert regimes <= set(tiny.regimes)


def test_a_name_has_one_training_over_all_experiments():
    """The record of a cell serves every experiment with the cell."""
    for scale in (lambda each: each, smoke):
        found = {}
        for experiment in experiments.EXPERIMENTS.values():
            for cell in scale(experiment).cells():
                first = found.setdefault((cell.home, cell.name), cell)
                assert cell.training == first.training and cell.commands[0] == first.commands[0]


def test_in_miniature_the_costs_of_the_small_model_are_measured_once():
    found = smoke(experiments.COST).cells()
    assert [cell.name for cell in found] == [
        f"cost-small-{direction}/32" for direction in ("training", "forward", "generation")
    ]
    measured = {cell.commands[0].words[:-1] for cell in found}
    assert len(measured) == 3 and all("small" in words for words in measured)


def test_arms_of_a_model_of_others_see_equal_tokens_of_equal_windows():
    found = [cell for cell in SMOLLM2.cells() if cell.regime == REGIME]
    for cell in found:
        training = cell.training.recipe.training
        assert (training.length, training.batch_size) == (16_384, 2)
        tokens = 0 if cell.arm in ("as-it-is", "ntk-untrained", "yarn-untrained") else 3_145_728
        assert training.steps * training.length * training.batch_size == tokens
        tuned, numbers = cell.commands
        assert tuned.words[:2] == ("retrofit", "models/smollm2")
        assert retrofit.read(list(tuned.words[1:])).lengths == tuple(2**n for n in range(8, 17))
        asked = parse(eval_retrieval.Arguments, numbers.words[2:], "dape eval retrieval")
        assert asked.runs == (cell.run.path,) and asked.lengths[-1] == 32_768
        assert set(numbers.keeps) == {Path(f"retrieval/{name}.json") for name in asked.tasks}
    seeds = [cell.training.seed for cell in found]
    assert [seeds.count(seed) for seed in (0, 1, 2)] == [8, 5, 5]
    assert found[0].arm == "as-it-is", "the baseline of the table"


def test_a_change_of_the_rotation_is_one_line_and_what_its_papers_say():
    arms = {cell.arm: cell for cell in SMOLLM2.cells()}
    for arm, cell in arms.items():
        assert "\n" not in str(cell.commands[0])
        config = cell.training.recipe.model.config
        assert bool(config) == (arm.startswith(("yarn", "ntk"))), arm
    frequencies = [
        theta ** -(np.arange(0, 64, 2) / 64)
        for theta in (
            100_000,
            arms["ntk-untrained"].training.recipe.model.config[ROPE]["rope_theta"],
        )
    ]
    ratio = frequencies[0] / frequencies[1]
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(8)  # bloc97's NTK-aware interpolation
    assert arms["yarn"].training.recipe.model.config[ROPE]["factor"] == 8


def test_rates_are_chosen_by_the_validation_loss_alone():
    found = [cell for cell in SMOLLM2.cells() if cell.regime != REGIME]
    rates = [cell.training.recipe.optimizer.learning_rate for cell in found]
    assert rates == [3e-5, 1e-4, 3e-4, 3e-3, 1e-2, 3e-2]
    for cell in found:
        (tuned,) = cell.commands
        assert retrofit.read(list(tuned.words[1:])).measure == "none"
        assert set(tuned.keeps) == set(TRAINED)


def test_an_unknown_experiment_is_refused_with_the_near_name():
    with pytest.raises(UserError, match="did you mean 'core'"):
        experiments.find("cores")


def test_claims_speak_of_arms_and_lengths_that_are_measured():
    reads = {part.regime: lengths(part.reads)[-1] for part in SMOLLM2.parts if part.reads}
    for experiment in experiments.EXPERIMENTS.values():
        measured = {(cell.regime, cell.arm) for cell in experiment.cells()}
        for claim in experiment.claims:
            for check in claim.checks:
                arms = [getattr(check, name, None) for name in ("arm", "candidate", "baseline")]
                for arm in filter(None, arms):
                    regime = getattr(check, "regime", None)
                    assert (regime, arm) in measured, (experiment.name, check)
                if hasattr(check, "regime"):
                    longest = check.regime.length * getattr(check, "times", 1)
                    assert longest <= max(16_384, reads.get(check.regime, 0))


def test_a_sweep_has_the_product_of_its_parts():
    found = sweep("kerple", "alibi", seeds=(0, 1, 2), tokens=(2**13, 2**14))
    assert len(list(found.cells(experiments.DEMO.home, {}))) == 2 * 3 * 2
