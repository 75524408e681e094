"""Sizes beyond 32 bits and beyond the grids of CUDA, without a GPU."""

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.attention.call import checked
from dape.attention.fused import geometry, serves

pytestmark = [
    pytest.mark.unhooked,
    # The interpreter's own warnings, of NumPy.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
SCHEMES = {
    "nope": lambda heads: (None, None),
    "kerple": lambda heads: (dape.Kerple(heads), None),
    "fire": lambda heads: (dape.FIRE(heads), None),
    "dape-kerple": lambda heads: (dape.Kerple(heads), dape.DAPE(heads, 4)),
    "dape-fire": lambda heads: (dape.FIRE(heads), dape.DAPE(heads, 4)),
    "dape3-kerple": lambda heads: (dape.Kerple(heads), dape.DAPE(heads, 4, 3)),
}
MILLION = 1_048_576


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 20])
def test_heads_may_lie_2_to_the_31_numbers_apart(name, rows):
    """A million tokens of 17 heads of 128 do; memory that nobody touches costs nothing."""
    heads, keys, size, apart = 3, 20, 16, 2**30
    memory = torch.empty((heads - 1) * apart + 3 * keys * size, dtype=torch.float16)

    def far(x, place):
        strides = (0, apart, size, 1)
        return memory.as_strided(x.shape, strides, place * keys * size).copy_(x)

    near = [torch.randn(1, heads, n, size).half() for n in (rows, keys, keys)]
    modules = SCHEMES[name](heads)

    def solve(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = dape.attention(*leaves, *modules, query_offset=keys - rows, backend="triton")
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    distant = [far(x, place) for place, x in enumerate(near)]
    assert distant[0].stride(1) * (heads - 1) == 2**31
    for found, expected in zip(solve(distant), solve(near), strict=True):
        assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def grids(monkeypatch):
    """Return the grids of the kernels that a call starts; none of them runs."""
    from triton.runtime import interpreter

    found = []

    def start(self, *args, **options):
        found.append((self.fn.__name__, *self.grid))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", start)
    return found


def fits(x, y=1, z=1):
    """Return whether CUDA starts a grid: its second and third axis end at 65,535."""
    return 0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [512, MILLION])
@pytest.mark.parametrize("kind", [dape.Kerple, dape.T5])
def test_a_table_of_a_million_distances_fits_a_grid(grids, kind, rows, causal, dtype):
    tensors = [
        torch.empty(1, dtype=dtype).expand(1, 2, n, 16).requires_grad_()
        for n in (rows, 2 * MILLION, 2 * MILLION)
    ]
    bias = kind(2)
    out = dape.attention(
        *tensors, bias, query_offset=2 * MILLION - rows, causal=causal, backend="triton"
    )
    gradient = torch.empty(1, dtype=dtype).expand_as(out)
    torch.autograd.grad(out, [*tensors, *bias.parameters()], gradient)
    sums = {"grad_table_kernel", "fold_kernel"} if kind is dape.T5 else {"sum_kernel"}
    assert {"forward_kernel", "grad_key_value_kernel"} | sums <= {name for name, *_ in grids}
    assert all(fits(*grid) for _name, *grid in grids)


@pytest.mark.parametrize("name", ["dape-kerple", "dape-fire", "dape3-kerple", "fire"])
def test_a_million_keys_mixed_across_heads_fit_a_grid(grids, name):
    tensors = [
        torch.empty(1, dtype=torch.float16).expand(1, 2, n, 16).requires_grad_()
        for n in (64, MILLION, MILLION)
    ]
    modules = SCHEMES[name](2)
    parameters = [p for m in modules if m is not None for p in m.parameters()]
    out = dape.attention(*tensors, *modules, query_offset=MILLION - 64, backend="triton")
    torch.autograd.grad(
        out, [*tensors, *parameters], torch.empty(1, dtype=torch.float16).expand_as(out)
    )
    assert any("backward" in found for found, *_ in grids)
    assert all(fits(*grid) for _name, *grid in grids)


@pytest.mark.parametrize(("keys", "served"), [(MILLION // 2, True), (MILLION, False)])
def test_cuda_refuses_a_scratch_that_it_cannot_count(keys, served):
    """64 rows of a million keys of 32 heads are 2^31 scores, and its places have 32 bits."""
    query, key = (torch.empty(1, dtype=torch.float16).expand(1, 32, n, 64) for n in (64, keys))
    call = checked(query, key, key, dape.Kerple(32), dape.DAPE(32))
    reason = serves.cuda_obstacle(call)
    assert serves.FEWEST_ROWS == geometry.ALIGNMENT
    assert (reason is None) == served
    assert served or "32 bits" in reason
