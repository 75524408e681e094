"""Parts of the keys merged by their log-sum-exp: output and gradients are those of the whole."""

import math
from dataclasses import replace

import pytest
import torch
from problems import Problem, blocks_of, leaves
from torch.testing import assert_close

import dape
from dape.attention import parallel
from dape.attention.call import Attended, checked
from dape.errors import UserError
from dape.positions.adapter import CoPE
from dape.positions.bias import Bias

INTERPRETED = [  # with the interpreter's own warnings, of NumPy
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
SCHEMES = {
    "nope": lambda: (None, None),
    "kerple": lambda: (dape.Kerple(4), None),
    "t5": lambda: (dape.T5(4, num_buckets=6, max_distance=9), None),
    "fire": lambda: (fire(), None),
    "dape-kerple": lambda: (dape.Kerple(4), dape.DAPE(4, 5)),
    "dape-fire": lambda: (fire(), dape.DAPE(4, 5)),
    "dape3-kerple": lambda: (dape.Kerple(4), dape.DAPE(4, 5, 3)),
    "dape5-nope": lambda: (None, dape.DAPE(4, 5, 5)),
    "talking-kerple": lambda: (dape.Kerple(4), talking()),
}
CALLS = {
    "causal": Problem(rows=18, keys=18, kv_heads=2),
    "bidirectional": Problem(rows=12, keys=18, causal=False),
    "cached": Problem(rows=5, keys=18, query_offset=13),
    "padded": Problem(rows=18, keys=18, mask="left"),
    "holes": Problem(rows=18, keys=18, mask="holes"),
    "mask of every query": Problem(rows=18, keys=18, mask="rows"),
    "rows without keys": Problem(rows=18, keys=18, query_offset=-3),
}
CUTS = [slice(0, 3), slice(3, 6), slice(6, 14), slice(14, 18)]


def fire():
    bias = dape.FIRE(4, hidden=5)
    torch.nn.init.constant_(bias.log_threshold, math.log(6.5))  # between two indices
    return bias


def talking():
    adapter = dape.TalkingHeads(4)
    torch.nn.init.normal_(adapter.weight, std=0.3)
    return adapter


def drawn_mask(problem):
    mask = torch.ones(problem.batch, problem.keys, dtype=torch.bool)
    if problem.mask == "left":  # the second row begins within the third part
        mask[0, :1], mask[1, :8] = False, False
    if problem.mask == "holes":  # on both sides of cuts, and at the start of a row
        mask[:, 4:9], mask[0, :3], mask[1, 1:3] = False, False, False
    return mask if problem.mask in ("left", "holes") else problem.draw_mask()


def solved(problem, tensors, modules, mask, backend, dtype, parts=None, of_lse=1.0):
    """Return output, log-sum-exp, and the gradients of a random functional of both.

    Without `parts` the operator is given the whole.
    """
    tensors, (bias, adapter), parameters = leaves(tensors, modules, dtype)
    tensors = [x.detach().to(dtype).requires_grad_() for x in tensors]
    if dtype != torch.float64:
        bias, adapter = (m and m.float() for m in (bias, adapter))
    options = {"causal": problem.causal, "query_offset": problem.query_offset}
    with blocks_of(200):
        if parts is None:
            options |= {"mask": mask, "scale": problem.scale, "return_lse": True}
            out, lse = dape.attention(*tensors, bias, adapter, backend=backend, **options)
        else:
            call = checked(*tensors, bias, adapter, mask, problem.scale, **options)
            out, lse, _ = parallel.attend(call, parts, True, backend)
    weight = torch.randn(lse.shape, generator=torch.Generator().manual_seed(2))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    kept = lse.where(lse.isfinite(), 0)
    total = (out * cotangent.to(out)).sum() + of_lse * (kept * weight.to(kept)).sum()
    nothing = sum(0 * p.sum() for p in parameters)
    gradients = torch.autograd.grad(total + nothing, [*tensors, *parameters])
    return [out, lse, *gradients]


def near(found, exact, tolerance):
    for ours, theirs in zip(found, exact, strict=True):
        scale = max(0.1, theirs[theirs.isfinite()].abs().max().item())
        assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", CALLS)
def test_parts_merge_to_the_whole_in_float64(name, scheme, backend):
    problem, modules = CALLS[name], SCHEMES[scheme]()
    given = (problem, problem.tensors(), modules, drawn_mask(problem))
    whole = solved(*given, "reference", torch.float64)
    near(solved(*given, backend, torch.float64, CUTS), whole, 1e-11)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_fused_parts_merge_to_the_whole(scheme):
    problem, modules = CALLS["causal"], SCHEMES[scheme]()
    given = (problem, problem.tensors(torch.float32), modules, None)
    whole = solved(*given, "reference", torch.float64)
    near(solved(*given, "triton", torch.float32, CUTS), whole, 1e-4)


class Raised(Bias):
    """Kerple and 10,000, of which float32 holds the log-sum-exp to 0.0005."""

    relative = True

    def __init__(self, num_heads):
        super().__init__(num_heads)
        self.inner = dape.Kerple(num_heads)

    def forward(self, query_positions, key_positions):
        return self.inner(query_positions, key_positions) + 1e4


@pytest.mark.parametrize(
    "backend", ["reference", "chunked", pytest.param("triton", marks=INTERPRETED)]
)
def test_gradients_of_parts_with_large_logits_cancel(backend):
    """A row of dS sums to zero over all parts; a rest would meet the 10,000."""
    problem, modules = CALLS["causal"], (Raised(4), dape.DAPE(4, 5))
    given = (problem, problem.tensors(torch.float32), modules, None)
    exact = solved(*given, "reference", torch.float64, of_lse=0.0)
    near(solved(*given, backend, torch.float32, CUTS, of_lse=0.0), exact, 3e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_fused_parts_in_half_precision_are_as_near_as_the_whole(scheme):
    problem, modules = CALLS["causal"], SCHEMES[scheme]()
    given = (problem, problem.tensors(torch.float16), modules, None)
    exact = solved(*given, "reference", torch.float64)
    found = [solved(*given, "triton", torch.float16, cuts) for cuts in (CUTS, None)]
    for parts, whole, true in zip(*found, exact, strict=True):
        errors = [(x.double() - true).nan_to_num().norm() for x in (parts, whole)]
        assert errors[0] < 2 * errors[1] + 2e-3 * true.nan_to_num(neginf=0).norm().clamp(min=1)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("bidirectional", "dape3-kerple"), ("bidirectional", "fire"), ("holes", "dape5-nope")),
        *(("cached", "dape3-kerple"), ("cached", "dape-fire"), ("padded", "kerple")),
    ],
)
@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_fused_parts_of_other_calls_merge_to_the_whole(name, scheme):
    problem, modules = CALLS[name], SCHEMES[scheme]()
    given = (problem, problem.tensors(torch.float32), modules, drawn_mask(problem))
    whole = solved(*given, "reference", torch.float64)
    near(solved(*given, "triton", torch.float32, CUTS), whole, 1e-4)


@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("scheme", ["kerple", "dape-kerple"])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_wide_parts_lose_nothing_before_they_are_merged(backend, scheme):
    problem = replace(CALLS["causal"], head_dim=16, value_dim=16)
    modules = SCHEMES[scheme]()
    query, key, value = (x.half() for x in problem.tensors())
    call = checked(query, key, value, *modules)
    exact = parallel.attend_part(
        call._replace(query=query.double(), key=key.double(), value=value.double()), "reference"
    )
    wide, narrow = (
        parallel.attend_part(parallel.part_of(call, slice(0, 18)), backend, wide=wide)
        for wide in (True, False)
    )
    assert (wide.out.dtype, narrow.out.dtype) == (torch.float32, torch.float16)
    errors = [(x.out.double() - exact.out).norm().item() for x in (wide, narrow)]
    # The fused kernels round P or scores to fp16 too, which a merge cannot undo.
    assert errors[0] < errors[1] * (0.9 if backend == "triton" else 0.1)


def test_rows_that_see_nothing_have_zeros_and_no_gradient():
    out, lse = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -torch.inf)
    lse[..., 1] = 0.5
    parts = [Attended(out.clone().requires_grad_(), lse.clone().requires_grad_()) for _ in range(2)]
    merged = parallel.merge(parts)
    assert torch.equal(merged.lse[0, 0], torch.tensor([-torch.inf, 0.5 + torch.tensor(2.0).log()]))
    merged.out.sum().backward(retain_graph=True)
    merged.lse[..., 1].sum().backward()
    for part in parts:
        assert torch.equal(part.lse.grad[0, 0], torch.tensor([0, 0.5]))
        assert part.out.grad.isfinite().all()


def test_rows_before_all_keys_have_zeros_over_parts_too():
    call = checked(*Problem().tensors(), query_offset=-9)
    found = parallel.attend(call, [slice(0, 3), slice(3, 7)], lse=True)
    assert not found.out.any() and (found.lse == -torch.inf).all()
    assert parallel.attend(call, [slice(0, 7)]).lse is None


def test_a_part_of_a_part_keeps_its_place_and_its_halo():
    begun = torch.rand(2, 1, 7) < 0.5
    whole = checked(*Problem(keys=10).tensors(), query_offset=4, key_offset=3)
    whole = whole._replace(halo=(2, 3), begun=begun)
    part = whole.part(slice(2, 6), slice(1, 9))
    assert (part.query_offset, part.key_offset, part.halo) == (6, 4, (1, 2))
    assert torch.equal(part.begun, begun[..., 2:6]) and part.shift == 2
    assert whole.part(slice(0, 7), slice(2, 7)).halo == (0, 0)
    same = whole._replace(begun=begun[..., :1]).part(slice(2, 6), slice(0, 10))
    assert torch.equal(same.begun, begun[..., :1]) and same.halo == (2, 3)


def test_an_adapter_of_whole_rows_is_refused_in_a_line():
    tensors = Problem().tensors(torch.float32)
    with pytest.raises(UserError, match=r"^adapter=CoPE looks along whole rows"):
        parallel.attend(checked(*tensors, adapter=CoPE(3)), [slice(0, 3), slice(3, 7)])


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_a_gpu_parts_merge_to_the_whole(backend, scheme):
    problem = Problem(rows=258, keys=258, head_dim=64, value_dim=64)
    tensors = [x.cuda() for x in problem.tensors(torch.bfloat16)]
    modules = [m and m.cuda() for m in SCHEMES[scheme]()]
    whole = solved(problem, tensors, modules, None, "reference", torch.float64)
    cuts = [slice(0, 100), slice(100, 200), slice(200, 258)]
    found = solved(problem, tensors, modules, None, backend, torch.bfloat16, cuts)
    for ours, theirs in zip(found, whole, strict=True):
        scale = max(0.1, theirs.norm().item())
        assert (ours.double() - theirs).norm() < 8 * torch.finfo(torch.bfloat16).eps * scale
