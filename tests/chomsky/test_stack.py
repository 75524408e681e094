"""Models side by side: each learns as it would alone, in plain PyTorch."""

from dataclasses import replace

import pytest
import torch

from dape.chomsky import heads
from dape.chomsky import stack as stack_module
from dape.chomsky.encoder import Model, build, configure
from dape.chomsky.measure import Evaluation, OneByOne, accuracies
from dape.chomsky.stack import NOISE, Stack, Training
from dape.chomsky.task import Draw, generator, single
from dape.chomsky.tasks import TASKS

SMALL = Model(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, adapter_hidden=8)
TRAINING = Training(steps=4, batch_size=8, length=6, learning_rate=1e-3, clip=0.5)
SEEDS = (11, 12, 13)
SCHEMES = (
    *("sinusoidal", "rope", "randomized-rope", "transformer-xl", "alibi", "kerple", "fire"),
    *("dape-alibi", "dape-kerple", "dape-fire", "dape3-kerple", "cope", "learned", "t5"),
)


@pytest.fixture
def double():
    """Float64: a gradient that is 0 but for rounding stays below Adam's epsilon."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def stack(scheme, task, seeds=SEEDS, training=TRAINING):
    config = configure(SMALL, scheme, task, training.length, backend="reference")
    return Stack(task, config, training, seeds, "cpu")


def alone(scheme, task, seed, lengths):
    """Train one model in an ordinary loop; return its parameters and the sum of its losses."""
    config = configure(SMALL, scheme, task, TRAINING.length, backend="reference")
    model = build(config, len(task.outputs), seed).train()
    optimizer = torch.optim.Adam(model.parameters(), TRAINING.learning_rate)
    draw, total = single(seed, TRAINING.batch_size), 0.0
    noises = generator(seed + NOISE)
    for length in lengths:
        inputs, outputs, _ = task.sample(draw, length)
        tokens = inputs.shape[1] + outputs.shape[1]
        noise = model.noise([noises], len(inputs), tokens, TRAINING.dropout)
        logits = model(inputs, outputs.shape[1], noise.one(0))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), outputs.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.clip)
        optimizer.step()
        total += loss.item()
    return dict(model.named_parameters()), total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_model_learns_as_it_would_alone(scheme, double):
    task = TASKS["stack-manipulation"]
    together = stack(scheme, task)
    for length in (6, 2, 5):
        together.step(length)
    for index, seed in enumerate(SEEDS):
        expected, total = alone(scheme, task, seed, (6, 2, 5))
        assert together.losses[index].item() == pytest.approx(total, rel=1e-9)
        found = together.model(index)
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, atol=1e-7, rtol=0, msg=name)


def test_a_model_does_not_depend_on_its_neighbours(double):
    task = TASKS["binary-addition"]
    pair, single_ = stack("dape-kerple", task, (12, 13)), stack("dape-kerple", task, (12,))
    for length in (3, 6):
        pair.step(length)
        single_.step(length)
    torch.testing.assert_close(pair.flat[:1], single_.flat, atol=1e-9, rtol=0)


def test_gradients_are_clipped_for_each_model():
    together = stack("kerple", TASKS["bucket-sort"])
    with torch.no_grad():
        # Only the read-out of the second model is large: so is its gradient alone.
        together.parameters(together.flat)["head.weight"][1] *= 300
    seen = []
    together.optimizer.register_step_pre_hook(
        lambda *_: seen.append(together.flat.grad.norm(dim=1).clone())
    )
    together.step(5)
    assert seen[0][1].item() == pytest.approx(TRAINING.clip, rel=1e-4)


def test_lengths_are_uniform_and_the_same_for_all():
    lengths = torch.tensor(Training(steps=40_000, length=40).lengths())
    found = torch.bincount(lengths, minlength=41)
    assert found[0] == 0 and len(found) == 41
    assert (found[1:] - 1_000).abs().max() < 4.5 * 1_000**0.5
    assert Training(steps=10).lengths() == Training(steps=20).lengths()[:10]
    assert Training(steps=6).lengths() == [5, 40, 14, 1, 4, 20], "as the measured cells had"


def test_a_restored_stack_goes_on_exactly():
    task = TASKS["compute-sqrt"]
    whole, first = stack("randomized-rope", task), stack("randomized-rope", task)
    for length in (4, 6, 1, 3):
        whole.step(length)
    for length in (4, 6):
        first.step(length)
    second = stack("randomized-rope", task)
    second.restore(first.state())
    for length in (1, 3):
        second.step(length)
    assert torch.equal(whole.flat, second.flat) and torch.equal(whole.losses, second.losses)


@pytest.fixture
def fused(monkeypatch):
    """Kernels serve a CPU, by the interpreter."""
    monkeypatch.setattr(heads, "serves", lambda scores: scores.dtype == torch.float32)
    monkeypatch.setattr(stack_module, "serves", lambda flat: True)


@pytest.mark.unhooked
@pytest.mark.parametrize("scheme", ["dape-kerple", "dape-alibi", "dape3-kerple"])
def test_a_stack_with_kernels_learns_as_in_float64(scheme, fused):
    task, quiet = TASKS["stack-manipulation"], replace(TRAINING, dropout=0.0)
    found = stack(scheme, task, training=quiet)
    torch.set_default_dtype(torch.float64)
    expected = stack(scheme, task, training=quiet)
    torch.set_default_dtype(torch.float32)
    assert found.fused and found.flat.dtype == torch.float32
    expected.flat.data.copy_(found.flat)
    sample = task.sample(Draw([torch.Generator().manual_seed(0) for _ in SEEDS], 16), 5)
    losses = []
    for each in (found, expected):
        losses.append(each.loss(sample, [torch.Generator() for _ in SEEDS]))
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[0].double(), losses[1], atol=0, rtol=1e-6)
    torch.testing.assert_close(found.flat.grad.double(), expected.flat.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.unhooked
def test_a_stack_with_kernels_answers_as_its_models_one_by_one(fused, monkeypatch):
    monkeypatch.setattr(stack_module, "PAIRS", 300)  # a few rows at a time
    task, evaluation = TASKS["stack-manipulation"], Evaluation(4, samples=20, batch_tokens=30)
    together = stack("dape-kerple", task)
    with torch.no_grad():
        together.flat *= 4  # answers differ between inputs and between models
    config = configure(SMALL, "dape-kerple", task, TRAINING.length)
    models = [build(config, len(task.outputs), seed).eval() for seed in SEEDS]
    for index, model in enumerate(models):
        model.load_state_dict(together.model(index))
    found = accuracies(together, task, evaluation, torch.device("cpu"))
    assert found == accuracies(OneByOne(models), task, evaluation, torch.device("cpu"))
    assert found[0] != found[1]


def test_the_scores_of_long_examples_fit_no_memory_side_by_side(fused, monkeypatch):
    together = stack("dape3-kerple", TASKS["duplicate-string"])
    assert together.tests_together(TASKS["duplicate-string"].tokens(500))
    monkeypatch.setattr(stack_module, "PAIRS", 3 * 29**2)
    assert together.tests_together(29) and not together.tests_together(30)
    assert not stack("kerple", TASKS["duplicate-string"]).tests_together(1)


@pytest.mark.gpu
def test_a_restored_stack_goes_on_on_a_gpu(double):
    task, lengths = TASKS["binary-addition"], (4, 2, 4, 4, 2, 2, 4)
    config = configure(SMALL, "randomized-rope", task, TRAINING.length, backend="reference")
    whole, first, second = (Stack(task, config, TRAINING, SEEDS, "cuda") for _ in range(3))
    for length in lengths:
        whole.step(length)
    for length in lengths[:4]:
        first.step(length)
    totals = first.read_losses()
    second.restore(first.state())
    for length in lengths[4:]:
        second.step(length)
    torch.testing.assert_close(
        whole.read_losses(),
        [a + b for a, b in zip(totals, second.read_losses(), strict=True)],
        atol=0,
        rtol=1e-6,
    )
    torch.testing.assert_close(whole.flat, second.flat, atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "name"),
    [*((scheme, "binary-addition") for scheme in SCHEMES), *(("kerple", name) for name in TASKS)],
)
def test_graphs_compute_what_ordinary_updates_do(scheme, name, double):
    config = configure(SMALL, scheme, TASKS[name], TRAINING.length, backend="reference")
    captured, plain = (Stack(TASKS[name], config, TRAINING, SEEDS, "cuda") for _ in range(2))
    for length in (3, 6, 3, 3, 6, 6):
        captured.step(length)
        plain.update(length)
    torch.cuda.synchronize()
    torch.testing.assert_close(captured.flat, plain.flat, atol=1e-6, rtol=0)
    torch.testing.assert_close(captured.losses, plain.losses, atol=0, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["dape-kerple", "dape3-kerple"])
def test_kernels_of_a_stack_are_as_near_to_float64_as_formulas_on_a_gpu(scheme, monkeypatch):
    """The gradient of every parameter by a kernel, and by formulas in float32.

    A hidden unit with another sign in float32 moves all gradients, by either way, in about one
    batch of four. The least error of some batches is by rounding alone.
    """
    task, training = TASKS["reverse-string"], Training(dropout=0.0)
    config = configure(Model(), scheme, task, training.length, backend="reference")
    begun = Stack(task, config, training, SEEDS, "cuda")

    def gradient(sample, dtype=torch.float32):
        torch.set_default_dtype(dtype)
        its = Stack(task, config, training, SEEDS, "cuda")
        its.flat.data.copy_(begun.flat)
        its.loss(sample, [torch.Generator("cuda") for _ in SEEDS]).sum().backward()
        torch.set_default_dtype(torch.float32)
        return its.flat.grad.double()

    def errors(found, truth):
        return {
            name: (p - exact).norm()
            for (name, p), exact in zip(
                begun.parameters(found).items(), begun.parameters(truth).values(), strict=True
            )
        }

    assert begun.fused
    ours, theirs = [], []
    for batch in range(6):
        generators = [torch.Generator("cuda").manual_seed(seed + batch) for seed in SEEDS]
        sample = task.sample(Draw(generators, 16), 21)
        truth, found, again = gradient(sample, torch.float64), gradient(sample), gradient(sample)
        assert torch.equal(found, again)
        ours.append(errors(found, truth))
        with monkeypatch.context() as patch:
            patch.setattr(heads, "serves", lambda scores: False)
            theirs.append(errors(gradient(sample), truth))
    for name in ours[0]:
        least = min(each[name] for each in ours)
        assert least < 3 * min(each[name] for each in theirs), name
