"""A sequence over several devices, threads with real exchanges: the numbers of a single device."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed import distributed_c10d
from torch.testing import assert_close

import dape
from dape.attention.context_parallel import ContextParallel

SCHEMES = {
    "kerple": lambda: (dape.Kerple(4), None),
    "dape3-fire": lambda: (dape.FIRE(4, hidden=5, threshold=2.5), dape.DAPE(4, 5, 3)),
}


def on_each(devices, work):
    """Return the results of `work(place)` of as many devices, which run at once."""
    store = dist.HashStore()

    def run(rank):
        backend = dist.ProcessGroupGloo(store, rank, devices, timedelta(seconds=60))
        group = dist.ProcessGroup(store, rank, devices)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        name = f"device {rank} of {devices}"
        distributed_c10d._register_process_group(name, group)
        try:
            return work(ContextParallel(name, rank, devices))
        finally:
            distributed_c10d._unregister_process_group(name)

    with ThreadPoolExecutor(devices) as pool:
        return list(pool.map(run, range(devices)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_outputs_and_gradients_are_those_of_a_single_device(devices, causal, scheme):
    length, modules = 6 * devices, [x and x.double() for x in SCHEMES[scheme]()]
    query, key, value = (torch.randn(2, h, length, 6, dtype=torch.float64) for h in (4, 2, 2))
    weights = torch.randn(2, 4, length, 6, dtype=torch.float64)
    whole = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = dape.attention(*whole, *modules, causal, 0.3, backend="reference")
    (expected * weights).sum().backward()

    def work(place):
        parts = [place.part(x, dim=2).requires_grad_() for x in (query, key, value)]
        out = place.attention(*parts, *modules, causal, scale=0.3)
        gradients = torch.autograd.grad((out * place.part(weights, dim=2)).sum(), parts)
        return place, out.detach(), gradients

    for place, out, gradients in on_each(devices, work):
        assert_close(out, place.part(expected.detach(), dim=2), rtol=1e-10, atol=1e-10)
        for ours, of_whole in zip(gradients, whole, strict=True):
            assert_close(ours, place.part(of_whole.grad, dim=2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_devices_hold_every_token_once_and_equally_many_pairs(devices):
    places = [ContextParallel("", rank, devices) for rank in range(devices)]
    cpu, length = torch.device("cpu"), 6
    held = [place.positions(length, cpu) for place in places]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(length * devices))
    assert len({int((positions + 1).sum()) for positions in held}) == 1
    tokens = torch.arange(length * devices)[None] * 10
    for place, positions in zip(places, held, strict=True):
        assert torch.equal(place.part(tokens)[0], 10 * positions)
        padded = place._replace(end=length * devices - 2)
        assert torch.equal(padded.positions(length, cpu), positions.clamp(max=padded.end - 1))


@pytest.mark.parametrize("devices", [1, 3])
def test_sums_and_the_value_of_the_first_reach_every_device(devices):
    def work(place):
        sums = torch.tensor([1.0, place.rank])
        return place.sum(sums) is sums, sums.tolist(), place.of_first((place.rank, "text"))

    total = devices * (devices - 1) / 2
    assert on_each(devices, work) == [(True, [devices, total], (0, "text"))] * devices


def test_a_compiler_is_given_the_shapes_of_both_exchanges():
    with FakeTensorMode():
        part, whole = (torch.empty(2, 3, length, 5, dtype=torch.half) for length in (8, 24))
        gathered, summed = (
            torch.ops.dape.gather(part, "", 3),
            torch.ops.dape.scatter_sum(whole, "", 3),
        )
    assert (gathered.shape, gathered.dtype) == (whole.shape, torch.half)
    assert (summed.shape, summed.dtype) == (part.shape, torch.half)


def test_gradients_in_16_bits_are_summed_in_float32():
    devices, length = 3, 12
    key = torch.randn(1, 1, length, 4, dtype=torch.bfloat16)
    factors = torch.randn(devices, 1, 1, length, 4)

    def work(place):
        part = place.part(key, dim=2).requires_grad_()
        whole = torch.ops.dape.gather(part, place.group, devices)
        loss = (whole.float() * factors[place.rank]).sum()
        return place, torch.autograd.grad(loss, part)[0]

    total = factors.bfloat16().float().sum(0).bfloat16()
    for place, gradient in on_each(devices, work):
        assert torch.equal(gradient, place.part(total, dim=2))
