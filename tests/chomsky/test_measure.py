"""The score: per-symbol accuracy on scored positions, the mean over lengths beyond training."""

import pytest
import torch
from cells import cell

from dape.chomsky.encoder import Encoder, Noise
from dape.chomsky.measure import DRAWN, TEST, Evaluation, OneByOne, accuracies, accuracy
from dape.chomsky.stack import NOISE
from dape.chomsky.task import SEEDS, Sample, generator, single
from dape.chomsky.tasks import TASKS


class Answers(Encoder):
    """Answers from a function instead of an encoder; notes the shapes it is asked for."""

    def __init__(self, answer):
        torch.nn.Module.__init__(self)
        self.answer, self.asked = answer, []

    def noise(self, generators, batch, length, dropout=0.0):
        return Noise(positions=torch.zeros(1, 1, length, dtype=torch.long))

    def forward(self, inputs, out, noise):
        assert noise.positions.shape == (1, inputs.shape[1] + out)
        self.asked.append(inputs.shape)
        return torch.nn.functional.one_hot(self.answer(inputs, out), 5).float()


def test_symbols_weigh_the_same_and_fillers_do_not_count():
    sample = Sample(
        inputs=torch.zeros(2, 3, dtype=torch.long),
        outputs=torch.tensor([[1, 2, 0, 0], [1, 1, 1, 2]]),
        scored=torch.tensor([[True, True, False, False], [True] * 4]),
    )
    ones = Answers(lambda inputs, out: torch.ones(len(inputs), out, dtype=torch.long))
    # Right: one symbol of two, three of four; fillers answered wrongly.
    for tokens in (100, 1):
        found = accuracy(OneByOne([ones]), sample, 0, batch_tokens=tokens)
        assert found.tolist() == [pytest.approx(100 * 4 / 6)]
    assert ones.asked == [(2, 3), (1, 3), (1, 3)]
    zeros = Answers(lambda inputs, out: torch.zeros(len(inputs), out, dtype=torch.long))
    assert accuracy(OneByOne([zeros]), sample, 0, batch_tokens=100).tolist() == [0.0]


def test_a_perfect_model_scores_100_at_every_length_and_an_empty_one_does_not():
    task = TASKS["bucket-sort"]
    perfect = Answers(lambda inputs, out: inputs.sort(1).values)
    zeros = Answers(lambda inputs, out: torch.zeros_like(inputs))
    evaluation = Evaluation(longest=30, samples=50)
    first, second = accuracies(OneByOne([perfect, zeros]), task, evaluation, torch.device("cpu"))
    assert first == [100.0] * 30
    assert sum(second) / 30 == pytest.approx(20, abs=1.5)
    # The examples are the same for every model, and fixed by the length alone.
    read = []
    accuracies(
        OneByOne([Answers(lambda inputs, out: read.append(inputs) or inputs)]),
        task, Evaluation(longest=3, samples=4), torch.device("cpu"),
    )  # fmt: skip
    for length, inputs in enumerate(read, 1):
        assert torch.equal(inputs, task.sample(single(TEST + length, 4), length).inputs)
    assert accuracies(OneByOne([zeros]), task, evaluation, torch.device("cpu")) == [second]


def test_randomised_positions_are_not_drawn_from_the_stream_of_the_examples():
    drawn = []

    class Drawing:
        def answers(self, inputs, out, generator):
            drawn.append(torch.randint(5, inputs.shape, generator=generator))
            return inputs[None]

    task, evaluation = TASKS["bucket-sort"], Evaluation(longest=40, samples=64)
    accuracies(Drawing(), task, evaluation, torch.device("cpu"))
    for length, found in enumerate(drawn, 1):
        inputs = task.sample(single(TEST + length, 64), length).inputs
        assert length < 5 or (found == inputs).double().mean() < 0.35, "a fifth, by chance"
    for length, found in enumerate(drawn[10:-1], 10):
        assert not torch.equal(found[0], drawn[length + 1][0, :-1]), "each length draws anew"


def test_lengths_and_examples_are_those_of_the_page_by_default():
    assert (Evaluation().longest, Evaluation().samples) == (500, 128)


def test_the_score_is_over_the_lengths_beyond_training():
    found = cell("even-pairs", "kerple", 0, [100.0, 90.0, 50.0, 60.0, 40.0], trained=2)
    assert found.score == pytest.approx(50) and found.score_within == pytest.approx(95)


def test_training_its_noise_and_the_tests_draw_apart_on_a_cpu():
    """PyTorch's generator on a CPU reads 32 bits of a seed, and the kinds differ above them."""
    seeds = [kind + seed for kind in (0, NOISE, TEST, DRAWN) for seed in (0, 1, 41, SEEDS - 1)]
    drawn = [torch.rand(3, generator=generator(seed)).tolist() for seed in seeds]
    assert all(drawn.count(each) == 1 for each in drawn)
    for seed, read in ((41, 41), (NOISE + 41, 2**30 + 41), (TEST + 41, 2**31 + 41)):
        same = torch.rand(3, generator=torch.Generator().manual_seed(read)).tolist()
        assert drawn[seeds.index(seed)] == same
    trained, tested = (TASKS["bucket-sort"].sample(single(n, 8), 41) for n in (41, TEST + 41))
    assert not torch.equal(trained.inputs, tested.inputs)
