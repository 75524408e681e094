"""Models side by side: each learns as it would alone, in plain PyTorch."""

from functools import partial

import pytest
import torch

from dape.chomsky import mapped
from dape.chomsky import stack as stack_module
from dape.chomsky.encoder import Model, build, configure
from dape.chomsky.measure import Evaluation, OneByOne, accuracies
from dape.chomsky.stack import NOISE, Stack, Training
from dape.chomsky.task import single
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


def stack(scheme, task, seeds=SEEDS, device="cpu", compiles=False):
    config = configure(SMALL, scheme, task, TRAINING.length, backend="reference")
    return Stack(task, config, TRAINING, seeds, device, compiles)


def alone(scheme, task, seed, lengths):
    """Train one model in an ordinary loop; return its parameters and the sum of its losses."""
    config = configure(SMALL, scheme, task, TRAINING.length, backend="reference")
    model = build(config, len(task.outputs), seed).train()
    optimizer = torch.optim.Adam(model.parameters(), TRAINING.learning_rate)
    draw, total = single(seed, TRAINING.batch_size), 0.0
    generator = torch.Generator().manual_seed(seed + NOISE)
    for length in lengths:
        inputs, outputs, _ = task.sample(draw, length)
        tokens = inputs.shape[1] + outputs.shape[1]
        noise = model.noise([generator], len(inputs), tokens, TRAINING.dropout)
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
def graphs(monkeypatch):
    """Blocks compiled to graphs of PyTorch's own operations; the number of graphs."""
    torch._dynamo.reset()
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(mapped, "_COMPILED", {})
    return made


@pytest.mark.unhooked
@pytest.mark.parametrize("scheme", ["dape3-kerple", "transformer-xl"])
def test_one_compilation_serves_all_lengths_and_tasks(scheme, double, graphs):
    for name in ("binary-addition", "modular-arithmetic"):
        task = TASKS[name]
        plain, fast = stack(scheme, task), stack(scheme, task, compiles=True)
        for length in (6, 1, 4):
            plain.step(length)
            fast.step(length)
        torch.testing.assert_close(fast.flat, plain.flat, atol=1e-9, rtol=0)
        torch.testing.assert_close(fast.losses, plain.losses, atol=0, rtol=1e-9)
    assert len(graphs) == 1


@pytest.mark.unhooked
def test_a_compiler_that_fails_is_done_without(graphs):
    with pytest.warns(UserWarning, match="cope trains without a compiler, which fails: "):
        found = stack("cope", TASKS["even-pairs"], compiles=True)
    plain = stack("cope", TASKS["even-pairs"])
    found.step(3)
    plain.step(3)
    assert not found.compiles and torch.equal(found.flat, plain.flat)


@pytest.mark.unhooked
def test_a_compiled_stack_answers_as_its_models_one_by_one(double, graphs, monkeypatch):
    monkeypatch.setattr(stack_module, "PAIRS", 1_000)  # a few rows at a time
    scheme = "randomized-rope"
    task, evaluation = TASKS["stack-manipulation"], Evaluation(12, samples=9, batch_tokens=150)
    together = stack(scheme, task, compiles=True)
    config = configure(SMALL, scheme, task, TRAINING.length)
    models = [build(config, len(task.outputs), seed).eval() for seed in SEEDS]
    with torch.no_grad():
        together.flat *= 4  # answers differ between inputs and between models
    for index, model in enumerate(models):
        model.load_state_dict(together.model(index))
    found = accuracies(together, task, evaluation, torch.device("cpu"))
    assert found == accuracies(OneByOne(models), task, evaluation, torch.device("cpu"))
    assert found[0] != found[1]
    assert len(graphs) == 2  # with gradients and without


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
@pytest.mark.parametrize("scheme", SCHEMES[:11])
def test_a_compiled_block_computes_what_a_plain_block_does(scheme, double):
    task = TASKS["binary-addition"]
    fast, plain = (stack(scheme, task, device="cuda", compiles=each) for each in (True, False))
    for length in (3, 6, 3, 3, 6, 6):
        fast.step(length)
        plain.step(length)
    torch.cuda.synchronize()
    torch.testing.assert_close(fast.flat, plain.flat, atol=1e-6, rtol=0)
    torch.testing.assert_close(fast.losses, plain.losses, atol=0, rtol=1e-6)
    evaluation = Evaluation(20, samples=32)
    found = (accuracies(each, task, evaluation, torch.device("cuda")) for each in (fast, plain))
    assert next(found) == next(found)
