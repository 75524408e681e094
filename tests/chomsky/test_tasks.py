"""The fifteen tasks: samplers against solvers, worked examples, and what is drawn how often."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare

from dape.chomsky.task import Draw, single
from dape.chomsky.tasks import TASKS, resolve
from dape.errors import UserError

# Outputs of the original generators, beside those in the docstrings.
EXAMPLES = {
    "even-pairs": "1 1 1 1 1 1 0 0 1 0 0 -> 1",
    "modular-arithmetic-simple": "1 - 2 + 2 x 0 x 1 - 0 -> 4",
    "parity-check": "1 1 1 1 1 1 1 1 -> 0",
    "cycle-navigation": "- - + 0 + - 0 0 - 0 - -> 2",
    "stack-manipulation": "0 0 1 0 1 push-0 pop push-0 pop pop push-0 -> 0 0 1 0 0 end",
    "reverse-string": "0 1 0 1 0 1 1 1 0 0 0 -> 0 0 0 1 1 1 0 1 0 1 0",
    "modular-arithmetic": "( 2 x 0 ) -> 0",
    "solve-equation": "( ? + ( 2 - 1 ) ) = 1 -> 0",
    "duplicate-string": "1 0 0 1 1 1 1 0 0 1 0 -> 1 0 0 1 1 1 1 0 0 1 0 1 0 0 1 1 1 1 0 0 1 0",
    "missing-duplicate": "0 0 1 0 0 0 0 1 ? 0 _ -> 0",
    "odds-first": "1 0 0 1 1 1 0 0 0 1 1 -> 0 1 1 0 1 1 0 1 0 0 1",
    "binary-addition": "0 0 1 1 0 1 0 1 0 + 1 -> 1 0 1 1 0 1 0 1 end",
    "binary-multiplication": "1 0 1 x 0 1 0 1 1 0 0 -> 0 1 0 0 0 0 0 1 end",
    "compute-sqrt": "1 0 1 0 1 1 1 1 1 1 0 -> 1 0 0 1 0 1",
    "bucket-sort": "0 3 1 4 4 3 0 4 2 2 4 -> 0 0 1 2 2 3 3 4 4 4 4",
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def ids(text, symbols):
    return [symbols.index(each) for each in text.split()]


def scored(sample):
    rows = zip(*(part.tolist() for part in sample), strict=True)
    return [
        (inputs, [symbol for symbol, counts in zip(outputs, mask, strict=True) if counts])
        for inputs, outputs, mask in rows
    ]


def check(task, length, batch, seed=0):
    sample = task.sample(single(seed, batch), length)
    assert sample.inputs.shape == (batch, task.input_length(length))
    assert sample.outputs.shape == sample.scored.shape == (batch, task.output_length(length))
    assert sample.inputs.min() >= 0 and sample.inputs.max() < len(task.inputs)
    assert sample.outputs.min() >= 0 and sample.outputs.max() < len(task.outputs)
    for inputs, outputs in scored(sample):
        assert outputs == task.solve(inputs)


@each_task
def test_worked_examples(task):
    documented = re.findall(r"^ *(.+ -> .+)$", task.__doc__, flags=re.MULTILINE)
    assert len(documented) == 2
    for example in (*documented, EXAMPLES[task.name]):
        given, expected = example.split(" -> ")
        assert task.solve(ids(given, task.inputs)) == ids(expected, task.outputs), example


@each_task
def test_short_lengths_agree_with_the_solver(task):
    for length in range(1, 42):
        check(task, length, batch=16, seed=length)


@each_task
@given(length=st.integers(42, 500), seed=st.integers(0, 2**32))
def test_long_lengths_agree_with_the_solver(task, length, seed):
    check(task, length, batch=2, seed=seed)


@each_task
def test_the_longest_inputs_agree_with_the_solver(task):
    check(task, 499, batch=4)
    check(task, 500, batch=4)


@each_task
def test_scored_positions_are_a_prefix_and_fillers_are_zero(task):
    sample = task.sample(single(0, 64), 23)
    ended = task.outputs[-1] == "end"
    assert bool(sample.scored.all()) is not ended
    assert (sample.scored.long().diff(dim=1) <= 0).all() and sample.scored[:, 0].all()
    assert (sample.outputs[~sample.scored] == 0).all()
    if ended:
        ends = sample.scored.sum(1, keepdim=True) - 1
        assert (sample.outputs.gather(1, ends) == 2).all()


@each_task
def test_parts_of_a_batch_are_those_of_their_generators_alone(task):
    together = task.sample(Draw([torch.Generator().manual_seed(s) for s in (5, 6)], 8), 19)
    for part, seed in enumerate((5, 6)):
        alone = task.sample(single(seed, 8), 19)
        for whole, half in zip(together, alone, strict=True):
            assert torch.equal(whole[8 * part : 8 * part + 8], half)


def is_uniform(values, count):
    found = torch.bincount(values.flatten(), minlength=count)
    assert len(found) == count
    return chisquare(found).pvalue > 1e-3


def test_operands_are_uniform_and_never_zero():
    inputs = TASKS["binary-addition"].sample(single(0, 20_000), 9).inputs
    first = inputs.argmax(1)
    assert is_uniform(first - 1, 7)
    power = 2 ** torch.arange(9)
    three = inputs[first == 3]
    assert is_uniform((three[:, :3] * power[:3]).sum(1) - 1, 7)
    assert is_uniform((three[:, 4:] * power[:5]).sum(1) - 1, 31)


def test_squares_are_uniform_and_never_zero():
    inputs = TASKS["compute-sqrt"].sample(single(0, 20_000), 4).inputs
    assert is_uniform((inputs * 2 ** torch.arange(3, -1, -1)).sum(1) - 1, 15)


def test_high_bits_of_long_numbers_are_fair():
    inputs = TASKS["compute-sqrt"].sample(single(0, 2_000), 80).inputs
    deviations = (inputs.sum(0) - 1_000) / 500**0.5
    assert chi2.sf(deviations.square().sum().item(), 80) > 1e-3


def test_brackets_split_uniformly():
    inputs = TASKS["modular-arithmetic"].sample(single(0, 20_000), 11).inputs
    opened = (inputs == 8).long() - (inputs == 9).long()
    depth = opened.cumsum(1)
    # The operator of the outermost operation has depth 1 and no unary minus right before its place.
    operator = (depth == 1) & (inputs >= 5) & (inputs <= 7)
    binary = operator & (torch.roll(inputs, 1, 1) != 8)
    binary[:, 1] = False
    place = binary.long().argmax(1)
    assert is_uniform(place - 2, 7)
    assert is_uniform(inputs.gather(1, place[:, None]) - 5, 3)


def test_initial_stacks_are_uniform_in_size():
    inputs = TASKS["stack-manipulation"].sample(single(0, 20_000), 8).inputs
    assert is_uniform((inputs > 1).long().argmax(1) - 1, 7)


def test_the_hidden_bit_is_anywhere():
    inputs = TASKS["missing-duplicate"].sample(single(0, 20_000), 9).inputs
    assert is_uniform((inputs == 2).long().argmax(1), 8)


def test_an_odd_length_of_a_missing_duplicate_ends_in_a_blank():
    for length in (2, 3, 8, 9):
        inputs = TASKS["missing-duplicate"].sample(single(0, 64), length).inputs
        blank = inputs == TASKS["missing-duplicate"].inputs.index("_")
        assert not blank[:, :-1].any() and blank[:, -1].all() == (length % 2 == 1)
        assert (inputs == 2).sum() == 64


@pytest.mark.parametrize("name", ["binary-addition", "binary-multiplication"])
def test_inputs_too_short_for_two_numbers_are_one_below_three(name):
    assert not TASKS[name].sample(single(0, 64), 1).inputs.any()
    inputs = TASKS[name].sample(single(0, 3_000), 2).inputs
    assert is_uniform(inputs[:, 0] + 2 * inputs[:, 1], 3)


def test_a_digit_after_brackets_is_hidden_more_often():
    # Of ( a + ( b - 1 ) ) the digits at 1, 4, 6 are met first from 7 8 0 1, from 2 3 4, from 5 6.
    inputs = TASKS["solve-equation"].sample(single(0, 200_000), 11).inputs
    shaped = inputs[(inputs[:, 3] == 7) & (inputs[:, 2] < 7) & (inputs[:, 0] == 7)]
    shaped = shaped[(shaped[:, 1] < 5) | (shaped[:, 1] == 9)]
    shaped = shaped[(shaped[:, 4] < 5) | (shaped[:, 4] == 9)]
    place = (shaped[:, :9] == 9).long().argmax(1)
    found = torch.bincount(place, minlength=9)[[1, 4, 6]]
    assert chisquare(found, found.sum() * torch.tensor([4, 3, 2]).double() / 9).pvalue > 1e-3


def test_even_requests_for_simple_arithmetic_are_lowered():
    task = TASKS["modular-arithmetic-simple"]
    assert [task.input_length(n) for n in (1, 2, 3, 40, 41, 500)] == [1, 1, 3, 39, 41, 499]


def baselines(task, lengths, samples):
    """Return the percent right of a constant answer, and of an answer without reading the input.

    The constant answer is the most frequent symbol of all scored positions. The second answer is
    the most frequent symbol by position and length, learned on equally many different samples. Both
    percentages are means over lengths.
    """
    symbols = torch.arange(len(task.outputs))
    counts, blind = [], []
    for length in lengths:
        one_hot = []
        for half in range(2):
            sample = task.sample(single(half, samples), length)
            hits = (sample.outputs[..., None] == symbols) & sample.scored[..., None]
            one_hot.append(hits.sum(0))
        seen, tested = one_hot
        right = tested.gather(1, seen.argmax(1, keepdim=True)).sum()
        counts.append(tested.sum(0) / tested.sum())
        blind.append(float(right / tested.sum()))
    return 100 * float(torch.stack(counts).mean(0).max()), 100 * sum(blind) / len(blind)


@pytest.mark.parametrize(
    "name", ["even-pairs", "stack-manipulation", "modular-arithmetic-simple", "bucket-sort"]
)
def test_scores_without_reading_are_as_stated(name):
    task = TASKS[name]
    constant, blind = baselines(task, range(41, 501, 23), samples=2_000)
    assert constant == pytest.approx(task.chance, abs=0.8)
    assert blind == pytest.approx(task.blind, abs=0.8)


@each_task
def test_scores_without_reading_are_about_those_stated(task):
    constant, blind = baselines(task, (41,), samples=2_000)
    assert constant == pytest.approx(task.chance, abs=3)
    if task.name != "bucket-sort":  # where the ends of long outputs are sure
        assert blind == pytest.approx(task.blind, abs=3)


@each_task
def test_the_order_matters_unless_the_task_says_otherwise(task):
    """By the solver; some inputs in another order are none."""
    mixed = torch.randperm(7).tolist()
    try:
        same = [
            task.solve(inputs) == task.solve([inputs[place] for place in mixed])
            for inputs in task.sample(single(0, 64), 7).inputs.tolist()
        ]
    except (SyntaxError, ValueError):
        same = [False]
    assert all(same) is task.permutable


def test_a_constant_answer_to_modular_arithmetic_is_right_for_three_in_ten():
    task = TASKS["modular-arithmetic"]
    constant, _ = baselines(task, (41, 90, 140), samples=4_000)
    assert constant == pytest.approx(task.chance, abs=1.5)


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'bucket-sort'"):
        resolve("bucketsort")
    with pytest.raises(UserError, match="length=0 must be at least 1"):
        TASKS["even-pairs"].sample(single(0, 1), 0)
