"""The log-sum-exp of the logits: numbers and gradients, and parts of the keys merged by it."""

import copy
from dataclasses import replace

import pytest
import torch
from problems import Problem, adapter_formula, bias_formula, blocks_of, leaves
from problems import visible as seen_by
from torch.testing import assert_close

import dape

INTERPRETED = [  # with the interpreter's own warnings, of NumPy
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
backends = pytest.mark.parametrize(
    "backend", ["reference", "chunked", pytest.param("triton", marks=INTERPRETED)]
)
adapters = pytest.mark.parametrize(
    "adapter", [None, (5, 1, True, "concat")], ids=["kerple", "dape-kerple"]
)
PROBLEMS = {
    "causal": Problem(rows=18, keys=18),
    "bidirectional": Problem(causal=False),
    "grouped heads": Problem(kv_heads=2, scale=0.4),
    "offset": Problem(rows=4, keys=11, query_offset=7),
    "one query": Problem(rows=1, keys=40, query_offset=39),
    "rows without keys": Problem(query_offset=-3),
    "left padding": Problem(mask="left"),
    "no bias": Problem(bias=None),
}


def call(problem, tensors, modules, mask, backend, **options):
    """Return output and log-sum-exp, in several blocks where there are any."""
    with blocks_of(200):
        return dape.attention(
            *tensors, *modules, problem.causal, problem.scale, problem.query_offset, backend,
            mask=mask, **options,
        )  # fmt: skip


def by_formula(problem, tensors, modules, mask):
    """The same of each row's logits, in float64."""
    (query, key, _), (bias, adapter), _ = leaves(tensors, modules, torch.float64)
    seen, shift = seen_by(problem, mask), bias_formula(bias)
    mix = adapter_formula(adapter) or (lambda a, b, keys: (a + b)[:, keys])
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    key = key.repeat_interleave(problem.heads // problem.kv_heads, 1)
    scores = scale * query @ key.mT
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for b, i in seen.any(-1).nonzero().tolist():
        a = scores[b, :, i]
        distance = (i + problem.query_offset - torch.arange(problem.keys)).abs()
        values = torch.zeros_like(a) if shift is None else shift(distance)
        lse[b, :, i] = mix(a, values, seen[b, i].nonzero()[:, 0]).logsumexp(-1)
    return lse.detach()


@backends
@adapters
@pytest.mark.parametrize("name", PROBLEMS)
def test_it_is_that_of_the_logits(name, adapter, backend):
    problem = replace(PROBLEMS[name], adapter=adapter)
    tensors, modules, mask = problem.tensors(torch.float32), problem.modules(), problem.draw_mask()
    out, lse = call(problem, tensors, modules, mask, backend, return_lse=True)
    assert lse.dtype == torch.float32
    assert_close(lse.double(), by_formula(problem, tensors, modules, mask), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, call(problem, tensors, modules, mask, backend))


def merged(parts):
    """Return the attention over all keys from those over parts of them."""
    outs, sums = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = sums.logsumexp(0)
    return ((sums - lse).exp()[..., None] * outs).sum(0), lse


def check_halves(problem, tensors, modules, backend, tolerance):
    query, key, value = tensors
    whole = call(problem, tensors, modules, None, backend, return_lse=True)
    cut = problem.keys // 2
    first = (query, key[:, :, :cut], value[:, :, :cut])
    second = (query, key[:, :, cut:], value[:, :, cut:])
    parts = [
        call(problem, first, modules, None, backend, return_lse=True),
        call(replace(problem, query_offset=-cut), second, modules, None, backend, return_lse=True),
    ]
    if problem.causal:  # the first rows see nothing of the second half
        out, lse = (x[:, :, :cut] for x in parts[1])
        assert (lse == -torch.inf).all() and (out == 0).all()
    for ours, theirs in zip(merged(parts), whole, strict=True):
        assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


@backends
@adapters
@pytest.mark.parametrize("causal", [True, False])
def test_two_halves_of_the_keys_merge_to_the_whole(causal, adapter, backend):
    problem = Problem(rows=20, keys=20, kv_heads=2, causal=causal, adapter=adapter)
    check_halves(problem, problem.tensors(torch.float32), problem.modules(), backend, 1e-5)


@adapters
def test_float64_merges_in_float64(adapter):
    problem = Problem(adapter=adapter)
    modules = [m and m.double() for m in problem.modules()]
    for backend in ("reference", "chunked"):
        check_halves(problem, problem.tensors(), modules, backend, 1e-12)


FORMS = {
    "nope": Problem(bias=None),
    "kerple": Problem(),
    "dape-kerple": Problem(adapter=(5, 1, True, "concat")),
    "dape3-kerple": Problem(adapter=(5, 3, True, "concat")),
    "talking heads": Problem(adapter="talking-heads"),
}


def gradients(problem, tensors, modules, starts, backend):
    """Return the gradients of a random functional of what parts of the keys merge to."""
    tensors, modules, parameters = leaves(tensors, modules)
    query, key, value = tensors
    parts = []
    for start, stop in zip(starts, [*starts[1:], problem.keys], strict=True):
        some = (query, key[:, :, start:stop], value[:, :, start:stop])
        at = replace(problem, query_offset=problem.query_offset - start)
        parts.append(call(at, some, modules, None, backend, return_lse=True))
    out, lse = merged(parts)
    weight = torch.randn(lse.shape, generator=torch.Generator().manual_seed(2))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    total = (out * cotangent.to(out)).sum() + (lse * weight.to(lse)).sum()
    return torch.autograd.grad(total, [*tensors, *parameters])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [x for x in FORMS if x != "dape3-kerple"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_merged_parts_have_the_gradients_of_the_whole(backend, name, causal):
    problem = replace(FORMS[name], rows=12, keys=12, kv_heads=2, causal=causal)
    tensors, modules = problem.tensors(), [m and m.double() for m in problem.modules()]
    whole = gradients(problem, tensors, modules, [0], "reference")
    for ours, theirs in zip(
        gradients(problem, tensors, modules, [0, 5, 9], backend), whole, strict=True
    ):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 5e-3)], ids=["fp32", "fp16"]
)
@pytest.mark.unhooked
@pytest.mark.filterwarnings("ignore::DeprecationWarning:triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_fused_gradients_of_it_are_those_of_the_textbook(dtype, tolerance, name):
    """Of the log-sum-exp alone, and beside a far smaller one of the output."""
    problem = replace(FORMS[name], rows=18, keys=18, query_offset=-2, mask="left")
    tensors, modules, seen = problem.tensors(dtype), problem.modules(), problem.draw_mask()
    weight = torch.randn(2, 4, 18)

    def solved(backend, dtype, size):
        inputs, parts, parameters = leaves(
            tensors, [m if m is None or dtype != torch.float64 else m.double() for m in modules],
        )  # fmt: skip
        inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = call(problem, inputs, parts, seen, backend, return_lse=True)
        kept = lse.where(lse.isfinite(), 0)
        total = (kept * weight).sum() + size * out.double().sum() if size else (kept * weight).sum()
        return torch.autograd.grad(total, [*inputs, *parameters], allow_unused=size == 0)

    for size in (0, 1e-3):
        found, exact = solved("triton", dtype, size), solved("reference", torch.float64, size)
        for ours, theirs in zip(found, exact, strict=True):
            if theirs is None:
                assert ours is None or not ours.any()
                continue
            scale = max(0.1, theirs.abs().max().item())
            assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [x for x in FORMS if x != "dape3-kerple"])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_merged_parts_have_the_gradients_of_the_whole(dtype, backend, name):
    problem = replace(
        FORMS[name], heads=12, kv_heads=12, rows=258, keys=258, head_dim=64, value_dim=64
    )
    tensors = [x.cuda() for x in problem.tensors(dtype)]
    modules = [m and m.cuda() for m in problem.modules()]
    parts, whole = (
        gradients(problem, tensors, modules, starts, backend) for starts in ([0, 100, 200], [0])
    )
    doubles = [m and copy.deepcopy(m).double() for m in modules]
    exact = gradients(problem, [x.double() for x in tensors], doubles, [0], "reference")
    for merged, one, true in zip(parts, whole, exact, strict=True):
        error, of_whole = ((x.double() - true).norm() for x in (merged, one))
        scale = max(0.1, true.norm().item())
        assert error < max(1.5 * of_whole, 8 * torch.finfo(dtype).eps * scale)
        assert of_whole < 0.02 * scale


@pytest.mark.gpu
@adapters
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_two_halves_merge_to_the_whole(dtype, backend, adapter):
    problem = Problem(
        heads=12, kv_heads=12, rows=258, keys=258, head_dim=64, value_dim=64, adapter=adapter
    )
    tensors = [x.cuda() for x in problem.tensors(dtype)]
    modules = [m and m.cuda() for m in problem.modules()]
    check_halves(problem, tensors, modules, backend, 8 * torch.finfo(dtype).eps)
