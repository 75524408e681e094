"""T5's bias against transformers' buckets and the paper's definition."""

import pytest
import torch
from torch.testing import assert_close

from dape.errors import UserError
from dape.positions.bias import T5


def bucket(distance, num_buckets, max_distance):
    """e + the greatest n < N - e with (max / e)^(n / (N - e)) <= distance / e, in whole numbers."""
    exact = num_buckets // 2
    shared = num_buckets - exact
    if distance < exact:
        return distance
    n = 0
    while n < shared - 1 and (
        distance**shared >= exact ** (shared - n - 1) * max_distance ** (n + 1)
    ):
        n += 1
    return exact + n


def buckets_of(bias, distances):
    """The buckets by way of the values: W[n, h] = n."""
    with torch.no_grad():
        bias.weight.copy_(torch.arange(len(bias.weight))[:, None].expand_as(bias.weight))
    return bias(torch.zeros(1, dtype=torch.long), distances)[0, 0].long()


def test_the_buckets_are_those_of_transformers_decoder():
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(20_000)
    theirs = T5Attention._relative_position_bucket(-distances, bidirectional=False)
    assert torch.equal(buckets_of(T5(1), distances), theirs)


# At 256 the powers 32, 64 and 128 are whole, where a logarithm in floats may fall short.
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 256), (7, 50), (2, 9)])
def test_the_buckets_are_those_of_the_definition(num_buckets, max_distance):
    distances = torch.arange(2 * max_distance)
    expected = [bucket(int(d), num_buckets, max_distance) for d in distances]
    assert buckets_of(T5(1, num_buckets, max_distance), distances).tolist() == expected


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(5, 6), (32, 128), (33, 1000), (64, 10**6), (200, 2**23)]
)
def test_a_bucket_starts_at_the_first_distance_of_the_definition(num_buckets, max_distance):
    starts = T5(1, num_buckets, max_distance).starts().long().tolist()
    for number, start in enumerate(starts, 1):
        before, at = (bucket(d, num_buckets, max_distance) for d in (start - 1, start))
        assert before < number <= at  # beyond, if the bucket has no distance


def test_each_pair_takes_the_entry_of_its_bucket_on_either_side():
    bias = T5(3).double()
    query, key = torch.tensor([5, 300, 40]), torch.tensor([0, 5, 21, 39, 300, 4000])
    weight = bias.weight.detach()
    expected = [
        [[weight[bucket(abs(int(i - j)), 32, 128), h] for j in key] for i in query]
        for h in range(3)
    ]
    assert torch.equal(bias(query, key), torch.tensor(expected, dtype=torch.float64))


def test_an_entry_s_gradient_counts_the_pairs_in_its_bucket():
    bias, positions = T5(2).double(), torch.arange(150)
    coefficients = torch.randn(2, 150, 150, dtype=torch.float64)
    (bias(positions, positions) * coefficients).sum().backward()
    expected = torch.zeros(32, 2, dtype=torch.float64)
    for i in range(150):
        for j in range(150):
            expected[bucket(abs(i - j), 32, 128)] += coefficients[:, i, j]
    assert_close(bias.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_neighbouring_distances_still_part_at_the_borders_of_buckets():
    bias = T5(1, max_distance=16_384).to(torch.bfloat16)
    starts = bias.starts().long()
    starts = starts[starts > 256]
    assert len(starts) == 9 and (starts % 2 == 1).any()
    assert torch.equal(buckets_of(bias, starts), buckets_of(bias, starts - 1) + 1)


def test_twelve_heads_have_384_parameters_of_glorot_s_deviation():
    bias = T5(12)
    assert sum(p.numel() for p in bias.parameters()) == 32 * 12
    assert_close(T5(5000).weight.std().item(), (2 / 5032) ** 0.5, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_buckets": 1}, "num_buckets=1 must be at least 2"),
        ({"max_distance": 16}, "max_distance=16 must be above num_buckets // 2 = 16"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as error:
        T5(4, **options)
    assert "\n" not in str(error.value)
