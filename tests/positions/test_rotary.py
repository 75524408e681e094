"""Rotations: float64 formulas, and what no rotation may depend on."""

import cmath
import math

import pytest
import torch
from torch.testing import assert_close
from turns import LENGTH, draw, rope

from dape.errors import UserError
from dape.positions.rotary import (
    NTK,
    DynamicNTK,
    Llama3,
    PositionInterpolation,
    RandomizedRoPE,
    RoPE,
    XPos,
    YaRN,
)

ROTATIONS = {
    "rope": RoPE(16),
    "partial": RoPE(16, fraction=0.25),
    "pi": PositionInterpolation(16),
    "ntk": NTK(16),
    "dynamic-ntk": DynamicNTK(16, LENGTH),
    "yarn": YaRN(16, LENGTH),
    "llama3": Llama3(16, LENGTH),
    "xpos": XPos(16),
    "randomized": RandomizedRoPE(16, LENGTH).eval(),
}
every_rotation = pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS.keys())


def by_hand(x, position, frequencies, scales):
    """Turn and scale (x_i, x_{i + w/2}) as the complex number x_i + i x_{i + w/2}."""
    out, half = x.tolist(), len(frequencies)
    for i, (w, s) in enumerate(zip(frequencies, scales, strict=True)):
        turned = s * complex(out[i], out[i + half]) * cmath.exp(1j * position * w)
        out[i], out[i + half] = turned.real, turned.imag
    return torch.tensor(out, dtype=torch.float64)


def yarn_ramp(i, first, last):
    return min(max((i - first) / (last - first), 0), 1)


def llama3_frequency(w, length, factor, low=1, high=4):
    """By wavelengths: short ones stay, long ones are stretched, and between is a mean."""
    wavelength = 2 * math.pi / w
    if wavelength < length / high:
        return w
    if wavelength > length / low:
        return w / factor
    share = (length / wavelength - low) / (high - low)
    return (1 - share) * w / factor + share * w


def formulas(name, position):
    """Return frequencies, and scales of query and key, of the rotation of a name."""
    one = [1.0] * 8
    if name == "partial":
        return rope(10000, 4), [1.0] * 2, [1.0] * 2
    if name == "pi":
        return [w / 16 for w in rope(10000)], one, one
    if name == "ntk":
        return rope(10000 * 16 ** (16 / 14)), one, one
    if name == "dynamic-ntk":
        return rope(10000 * max(1, (position + 1) / LENGTH) ** (16 / 14)), one, one
    if name == "yarn":
        # In 32 tokens pair 0 turns 5 times and pair 1.4 once: between 32 turns and 1, 0 and 2.
        ramp = [yarn_ramp(i, 0, 2) for i in range(8)]
        mixed = [w * (1 - r) + w * r / 16 for w, r in zip(rope(10000), ramp, strict=True)]
        return mixed, *([[0.1 * math.log(16) + 1] * 8] * 2)
    if name == "llama3":
        mixed = [llama3_frequency(w, LENGTH, 16) for w in rope(10000)]
        assert mixed[0] == 1 and rope(10000)[1] / 16 < mixed[1] < rope(10000)[1]
        return mixed, one, one
    if name == "xpos":
        zeta = [((i / 8 + 0.4) / 1.4) ** (position / 512) for i in range(8)]
        return rope(10000), zeta, [1 / z for z in zeta]
    return rope(10000), one, one


@pytest.mark.parametrize("name", ROTATIONS)
def test_every_rotation_is_its_formula(name):
    positions = torch.tensor([[0, 1, 5], [31, 32, 700]])
    inputs = draw(3, dtype=torch.float64)
    outputs = ROTATIONS[name](*inputs, positions)
    for which, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        assert out.dtype == torch.float64 and out.shape == x.shape
        for b in range(2):
            for t in range(3):
                p = int(positions[b, t])
                frequencies, *scales = formulas(name, p)
                for h in range(x.shape[1]):
                    expected = by_hand(x[b, h, t], p, frequencies, scales[which])
                    assert_close(out[b, h, t], expected, rtol=1e-10, atol=1e-10)


@every_rotation
def test_gradients_are_those_of_finite_differences(rotation):
    query, key = torch.randn(2, 1, 1, 2, 16, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda q, k: rotation(q, k, torch.tensor([3, 40])), (query, key))


def test_yarn_keeps_fast_pairs_interpolates_slow_ones_and_scales_the_scores():
    rotation, plain, position = YaRN(64, 512), RoPE(64), torch.tensor([9])
    ratio = rotation.frequencies(position, torch.float64) / plain.frequencies(
        position, torch.float64
    )
    turns = 512 * torch.tensor(rope(10000, 64), dtype=torch.float64) / (2 * math.pi)
    # Between whole pairs: the last of the slow ones is a pair after the one that turns once.
    fast, slow = ratio[turns > 32], ratio[turns < 0.7]
    assert len(fast) and len(slow)
    assert_close(fast, torch.ones_like(fast))
    assert_close(slow, torch.full_like(slow, 1 / 16))
    assert (ratio.diff() <= 0).all()
    x = torch.randn(1, 1, 1, 64, dtype=torch.float64)
    query, key = rotation(x, x, position)
    assert_close((query * key).sum(), (0.1 * math.log(16) + 1) ** 2 * (x * x).sum())


@pytest.mark.parametrize("length", [1, 4, 6, 7])
def test_yarn_stays_between_rope_and_interpolation_at_tiny_lengths(length):
    ours, plain = (
        rotation.frequencies(torch.arange(1), torch.float64)
        for rotation in (YaRN(8, length), RoPE(8))
    )
    assert ((plain / 16 <= ours) & (ours <= plain)).all()


def scores(rotation, query, key, positions):
    query, key = rotation(query, key, positions)
    return query[:, :2] @ key.mT


@every_rotation
def test_relative_says_whether_only_distances_matter(rotation):
    query, key = draw(8, dtype=torch.float64)
    here, there = (
        scores(rotation, query, key, torch.arange(8) + start) for start in (0, 3 * LENGTH)
    )
    change = (here - there).abs().max()
    assert change < 1e-9 if rotation.relative else change > 1e-3


@every_rotation
def test_a_token_turns_the_same_alone_and_in_any_sequence_or_batch(rotation):
    query, key = draw(4 * LENGTH)
    positions = torch.stack([torch.arange(4 * LENGTH), torch.arange(4 * LENGTH) + 7])
    whole = rotation(query, key, positions)
    for b, t in ((0, 0), (0, LENGTH - 1), (1, LENGTH), (1, 4 * LENGTH - 1)):
        one = slice(b, b + 1), slice(None), slice(t, t + 1)
        alone = rotation(query[one], key[one], positions[b, t : t + 1])
        for part, all_of_them in zip(alone, whole, strict=True):
            assert_close(part, all_of_them[one], rtol=1e-6, atol=1e-6)


def test_dynamic_ntk_is_rope_up_to_the_training_length_and_slower_after():
    dynamic = DynamicNTK(16, LENGTH, factor=2.0).frequencies(torch.arange(64), torch.float32)
    plain = RoPE(16).frequencies(torch.arange(64), torch.float32)
    assert torch.equal(dynamic[:LENGTH], plain.expand(LENGTH, -1))
    assert (dynamic[LENGTH:, 1:] < plain[1:]).all()


@every_rotation
@pytest.mark.parametrize("position", [255, 257, 4097, 16383])
def test_bfloat16_is_rounded_once_and_no_position(rotation, position):
    inputs, positions = [x.bfloat16() for x in draw(1)], torch.tensor([position])
    exact = rotation(*(x.double() for x in inputs), positions)
    for ours, theirs in zip(rotation(*inputs, positions), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        # Half a spacing of bfloat16, and an angle of up to 16384 radians in float32.
        for mine, exact_one in zip(ours.double().flatten(0, 2), theirs.flatten(0, 2), strict=True):
            assert (mine - exact_one).norm() <= (2**-9 + 2e-3) * exact_one.norm()


def test_xpos_keeps_its_scores_at_32_000():
    query, key = draw(9, batch=1)
    positions = torch.arange(0, 900, 100)
    far = scores(XPos(16), query, key, positions + 31_100)
    near = scores(XPos(16), query.double(), key.double(), positions)
    # Sums of 8 products up to 10, turned by float32 angles of 32,000 radians: 2e-3 each.
    assert_close(far.double().tril(), near.tril(), rtol=0, atol=1e-2)


def test_xpos_refuses_float16():
    with pytest.raises(UserError, match="float16 near position 4,000; use bfloat16"):
        XPos(16)(*(x.half() for x in draw(2)), torch.arange(2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: RoPE(15),
            "turns 15 of head_dim=15 dimensions; take a fraction that turns an even number",
        ),
        (lambda: RoPE(16, fraction=0.0), "fraction=0.0 turns 0"),
        (lambda: RoPE(16, fraction=1.5), "fraction=1.5 turns 24 of head_dim=16"),
        (lambda: RoPE(16, base=1.0), "base=1.0 must be above 1"),
        (lambda: PositionInterpolation(16, factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: NTK(16, factor=0.5), "factor=0.5 must be at least 1"),
        (lambda: NTK(2), "turned dimensions=2 must be at least 4"),
        (lambda: DynamicNTK(16, 8, factor=-1.0), "factor=-1.0 must be at least 0"),
        (lambda: DynamicNTK(2, 8), "turned dimensions=2 must be at least 4"),
        (lambda: YaRN(16, 8, factor=0.9), "factor=0.9 must be at least 1"),
        (lambda: YaRN(16, 8, beta_fast=1.0), "beta_fast=1.0 > beta_slow=1.0 > 0 must hold"),
        (lambda: Llama3(16, 8, factor=0.9), "factor=0.9 must be at least 1"),
        (
            lambda: Llama3(16, 8, low_freq_factor=4.0),
            "high_freq_factor=4.0 > low_freq_factor=4.0 > 0 must hold",
        ),
        (
            lambda: Llama3(16, 8, low_freq_factor=0.0),
            "high_freq_factor=4.0 > low_freq_factor=0.0 > 0 must hold",
        ),
        (lambda: YaRN(16, 8, beta_slow=0.0), "beta_slow=0.0 > 0 must hold"),
        (lambda: XPos(16, scale_base=0.0), "scale_base=0.0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused(build, words):
    with pytest.raises(UserError, match=words):
        build()


@every_rotation
def test_nothing_is_trained_or_saved(rotation):
    assert not rotation.state_dict() and not list(rotation.parameters())


@pytest.mark.unhooked
@every_rotation
def test_every_rotation_compiles_to_one_graph_with_the_same_numbers(rotation):
    torch.compiler.reset()
    query, key, positions = *draw(6), torch.arange(6) + LENGTH
    compiled = torch.compile(rotation, fullgraph=True, backend="eager")
    expected = rotation(query, key, positions)
    for ours, theirs in zip(compiled(query, key, positions), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
