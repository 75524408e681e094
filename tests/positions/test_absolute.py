"""Embeddings: published formulas at every position and dtype, and the end of a learned table."""

import math

import pytest
import torch
from torch.testing import assert_close

from dape.errors import UserError
from dape.positions.absolute import Learned, Sinusoidal


def vaswani(position, width):
    """The row of a position in section 3.5, entry by entry."""
    angles = [position / 10000 ** ((c - c % 2) / width) for c in range(width)]
    return [math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)]


@pytest.mark.parametrize("width", [1, 2, 7, 16])
def test_sinusoids_are_those_of_the_paper(width):
    x, positions = torch.randn(2, 5, width, dtype=torch.float64), torch.tensor([0, 1, 2, 300, 9999])
    expected = torch.tensor([vaswani(p, width) for p in positions.tolist()], dtype=torch.float64)
    scaled = x * math.sqrt(width)
    assert_close(Sinusoidal(width)(x, positions), scaled + expected, rtol=1e-11, atol=1e-11)
    for scale in (1.0, 0.0):
        alone = Sinusoidal(width, token_scale=scale)(x, positions)
        assert_close(alone, scale * x + expected, rtol=1e-11, atol=1e-11)


def test_sinusoids_without_frequencies_are_refused():
    with pytest.raises(UserError, match=r"base=0.0 must be at least 1"):
        Sinusoidal(8, base=0.0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_sinusoids_are_those_of_x_transformers_in_another_order():
    package = pytest.importorskip("x_transformers.x_transformers")
    x, positions = torch.zeros(1, 200, 16), torch.arange(200)
    peer = package.ScaledSinusoidalEmbedding(16)(x, positions) * math.sqrt(16)  # sines first
    ours = Sinusoidal(16)(x, positions)[0]
    # Angles up to 199 in float32.
    assert_close(torch.cat((ours[:, 0::2], ours[:, 1::2]), 1), peer.detach(), rtol=0, atol=3e-5)


def test_tokens_start_about_as_large_as_the_sinusoids():
    x = torch.randn(1, 512, 768) * math.sqrt(2 / (5 * 768))  # as the model draws them
    ours = Sinusoidal(768)
    waves = ours(torch.zeros_like(x), torch.arange(512))
    ratio = (ours(x, torch.arange(512)) - waves).square().mean() / waves.square().mean()
    assert 0.5 < ratio.sqrt() < 2


@pytest.mark.parametrize("module", [Sinusoidal(8), Learned(12, 8)])
def test_every_sequence_of_a_batch_has_positions_of_its_own(module):
    x, positions = torch.randn(2, 4, 8), torch.tensor([[0, 0, 1, 2], [5, 6, 7, 11]])
    together = module(x, positions)
    for b in range(2):
        assert torch.equal(together[b], module(x[b : b + 1], positions[b])[0])


@pytest.mark.parametrize("position", [0, 256, 257, 4097, 16383])
def test_bfloat16_rounds_the_sum_once_and_no_position(position):
    x = torch.randn(1, 1, 64, dtype=torch.bfloat16)
    exact = 8 * x[0, 0].double() + torch.tensor(vaswani(position, 64), dtype=torch.float64)
    ours = Sinusoidal(64)(x, torch.tensor([position]))
    assert ours.dtype == torch.bfloat16
    # Half a spacing of bfloat16, and the angle in float32: 16384 * 2^-24 radians.
    assert_close(ours[0, 0].double(), exact, rtol=2**-8, atol=2e-3)


def test_learned_rows_are_added_and_their_gradients_collected():
    module, x = Learned(6, 4), torch.randn(2, 3, 4, requires_grad=True)
    positions = torch.tensor([[0, 1, 1], [1, 2, 5]])
    out = module(x, positions)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected = torch.zeros(6, 4)
    for b in range(2):
        for t in range(3):
            row = positions[b, t]
            assert torch.equal(out[b, t], x[b, t] + module.weight[row])
            expected[row] += upstream[b, t]
    assert_close(module.weight.grad, expected)
    assert torch.equal(x.grad, upstream)


def test_a_learned_table_is_added_to_bfloat16_in_float32():
    module, x = Learned(6, 4), torch.randn(1, 6, 4, dtype=torch.bfloat16)
    expected = (x.double() + module.weight.double()).to(torch.bfloat16)
    assert torch.equal(module(x, torch.arange(6)), expected)


def test_a_learned_table_starts_like_the_token_embedding():
    weight = Learned(500, 768).weight
    assert weight.shape == (500, 768)
    assert_close(weight.std(), torch.tensor(math.sqrt(2 / (5 * 768))), rtol=1e-2, atol=0)
    assert abs(weight.mean()) < 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("positions", "named"),
    [
        (torch.arange(7), "position 6"),
        (torch.tensor([9]), "position 9"),
        (torch.tensor([[0, 1], [5, 6]]), "position 6"),
        (torch.tensor([-1, 0]), "position -1"),
    ],
)
def test_positions_outside_the_learned_table_are_refused(positions, named, training):
    module = Learned(6, 4).train(training)
    x = torch.randn(2, positions.shape[-1], 4)
    with pytest.raises(UserError, match=f"{named} .* train_length=6: give fewer .* dape-kerple"):
        module(x, positions)


def test_padding_may_make_a_sequence_longer_than_the_learned_table():
    module, x = Learned(6, 4), torch.randn(1, 8, 4)
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    assert torch.equal(module(x, positions), x + module.weight[positions])


@pytest.mark.unhooked
@pytest.mark.parametrize("module", [Sinusoidal(8), Learned(12, 8)])
def test_embeddings_compile_to_one_graph_with_the_same_numbers(module):
    torch.compiler.reset()
    x, positions = torch.randn(2, 5, 8), torch.arange(5) + 3
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, positions), module(x, positions))


@pytest.mark.unhooked
def test_compiled_the_learned_table_refuses_what_is_longer():
    torch.compiler.reset()
    module, x = Learned(6, 4), torch.randn(1, 6, 4)
    whole = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(whole(x, torch.arange(6)), x + module.weight)
    compiled = torch.compile(module, backend="eager")
    with pytest.raises(UserError, match="position 6 is outside"):
        compiled(torch.randn(1, 7, 4), torch.arange(7))
