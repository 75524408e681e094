"""`dape.attention` against the float64 textbook: outputs and all gradients, option by option."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Problem,
    adapter_formula,
    bias_formula,
    blocks_of,
    solve,
    solve_by_textbook,
    visible,
)
from torch.testing import assert_close

import dape
import textbook
from dape.attention.call import check, check_where
from dape.errors import UserError
from dape.positions.adapter import CoPE

BACKENDS = ("reference", "chunked")
DAPE3 = (5, 3, True, "concat")

PROBLEMS = {
    "causal": Problem(),
    "bidirectional": Problem(causal=False),
    "grouped heads": Problem(kv_heads=2),
    "one key head": Problem(heads=5, kv_heads=1),
    "offset": Problem(rows=4, keys=11, query_offset=7),
    "more keys than queries see": Problem(rows=4, keys=11, query_offset=2),
    "more queries than keys": Problem(rows=9, keys=5),
    "rows without keys": Problem(query_offset=-3),
    "cross lengths": Problem(rows=5, keys=9, causal=False),
    "one token": Problem(rows=1, keys=1),
    "left padding": Problem(mask="left"),
    "right padding": Problem(mask="right", causal=False),
    "mask of every query": Problem(mask="rows"),
    "mask shared by the batch": Problem(mask="shared", causal=False),
    "mask of one row": Problem(mask="keys"),
    "positions": Problem(positions="shared"),
    "positions of every sequence": Problem(positions="batched", causal=False),
    "scale": Problem(scale=0.3),
    "wider values": Problem(value_dim=6),
    "everything": Problem(
        kv_heads=2, rows=5, keys=9, value_dim=2, scale=1.5, query_offset=3, mask="rows",
        positions="batched",
    ),
}  # fmt: skip
MODULES = {
    "none": (None, None),
    "alibi": ("alibi", None),
    "kerple": ("kerple", None),
    "dape-kerple": ("kerple", (6, 1, True, "concat")),
    "dape3-kerple": ("kerple", DAPE3),
}
ADAPTERS = [
    (3, kernel_size, residual, inputs)
    for kernel_size in (1, 3, 5, 7)
    for residual in (True, False)
    for inputs in ("concat", "sum", "bias", "scores")
]


def draw(problem, dtype=torch.float64):
    """Return everything a call takes, but its backend."""
    return problem.tensors(dtype), problem.modules(), problem.draw_mask(), problem.draw_positions()


def assert_equals_textbook(problem, backends=BACKENDS):
    given_to_both = draw(problem)
    expected, gradients = solve_by_textbook(problem, *given_to_both)
    for backend in backends:
        out, ours = solve(problem, *given_to_both, backend, torch.float64)
        assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(ours, gradients, strict=True):
            assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_option_equals_the_textbook(name, modules):
    bias, adapter = MODULES[modules]
    assert_equals_textbook(replace(PROBLEMS[name], bias=bias, adapter=adapter))


@pytest.mark.parametrize("bias", [None, "kerple"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_every_adapter_equals_the_textbook(adapter, bias):
    assert_equals_textbook(
        Problem(rows=5, keys=6, batch=1, mask="left", bias=bias, adapter=adapter)
    )


@given(
    problem=st.builds(
        Problem,
        batch=st.integers(1, 2),
        heads=st.just(4),
        kv_heads=st.sampled_from([1, 2, 4]),
        rows=st.integers(1, 9),
        keys=st.integers(1, 9),
        head_dim=st.integers(1, 4),
        value_dim=st.integers(1, 4),
        causal=st.booleans(),
        scale=st.sampled_from([None, 0.7]),
        query_offset=st.integers(-2, 5),
        mask=st.sampled_from([None, "left", "right", "rows", "shared", "keys"]),
        positions=st.sampled_from([None, "shared", "batched"]),
        bias=st.sampled_from([None, "alibi", "kerple"]),
        adapter=st.sampled_from([None, *ADAPTERS]),
    ),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_options_together_equal_the_textbook(problem, seed):
    torch.manual_seed(seed)
    assert_equals_textbook(problem)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 33])
def test_odd_lengths_equal_the_textbook(length, backend):
    problem = Problem(batch=1, heads=3, kv_heads=3, rows=length, keys=length, adapter=(4,))
    assert_equals_textbook(problem, [backend])


# Relative error in the Euclidean norm, in spacings of the dtype (two roundings each). float32 sums
# a few dozen terms; in bfloat16 the output and each gradient are rounded once.
@pytest.mark.parametrize(("dtype", "spacings"), [(torch.float32, 8), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lower_precision_is_near_the_textbook(backend, modules, dtype, spacings):
    bias, adapter = MODULES[modules]
    problem = Problem(
        kv_heads=2, rows=13, keys=13, head_dim=16, value_dim=16, mask="left", bias=bias,
        adapter=adapter,
    )  # fmt: skip
    given_to_both = draw(problem, dtype)
    expected, gradients = solve_by_textbook(problem, *given_to_both)
    out, ours = solve(problem, *given_to_both, backend)
    assert out.dtype == dtype
    pairs = [(out, expected), *zip(ours[:3], gradients[:3], strict=True)]
    if len(ours) > 3:  # a parameter alone may have no gradient but noise: take them together
        pairs.append([torch.cat([x.flatten() for x in both[3:]]) for both in (ours, gradients)])
    for mine, theirs in pairs:
        error = torch.linalg.norm(mine.double() - theirs) / torch.linalg.norm(theirs)
        assert error < spacings * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [None, DAPE3])
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(backend, adapter):
    problem = Problem(mask="rows", adapter=adapter)
    tensors, modules, _, positions = draw(problem, torch.float32)
    mask = torch.ones(2, 1, problem.rows, problem.keys, dtype=torch.bool)
    mask[0, 0, 3] = False
    out, gradients = solve(problem, tensors, modules, mask, positions, backend)
    assert torch.equal(out[0, :, 3], torch.zeros_like(out[0, :, 3]))
    assert out[1, :, 3].abs().min() > 0
    assert torch.equal(gradients[0][0, :, 3], torch.zeros_like(gradients[0][0, :, 3]))
    assert all(gradient.isfinite().all() for gradient in gradients)


class HeadMixing(torch.nn.Module):
    """An adapter of a user's own."""

    def __init__(self, heads):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(heads, heads, dtype=torch.float64))

    def forward(self, scores, bias):
        return torch.einsum("gh,bhqk->bgqk", self.weight, scores + bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_users_adapter_runs_on_every_backend(backend):
    problem, mixing = Problem(batch=1), HeadMixing(4)
    tensors = problem.tensors()
    with blocks_of(50):
        out = dape.attention(*tensors, adapter=mixing, backend=backend)
    positions = torch.arange(7)[None]
    expected, _ = textbook.attention(
        *tensors, visible(problem, None), positions, positions,
        logits=lambda a, b, seen: mixing.weight @ (a + b)[:, seen],
    )  # fmt: skip
    assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.unhooked  # the annotations are of modules, and a function does too
@pytest.mark.parametrize(
    ("scores", "causal", "blocks"),
    [
        (2 * 4 * 9 * 7, True, [(7, 6)]),
        (2 * 4 * 9 * 7 - 1, True, [(1, 6), (6, 5)]),
        (2 * 4 * 9 * 3, True, [(1, 6), (3, 5), (3, 2)]),
        (1, True, [(1, seen) for seen in (6, 5, 4, 3, 2, 1, 1)]),
        (2 * 4 * 9 * 3, False, [(1, 9), (3, 9), (3, 9)]),
    ],
)
def test_blocks_hold_few_scores_and_no_later_keys(scores, causal, blocks):
    """A single block is computed once, and several again in the backward pass."""
    query, key, value = Problem(keys=9).tensors()
    given = []

    def adapter(scores, bias):
        given.append(tuple(scores.shape[2:]))
        return scores + bias

    options = {"adapter": adapter, "causal": causal, "query_offset": -1, "backend": "chunked"}
    with blocks_of(scores):
        out = dape.attention(query.requires_grad_(), key, value, **options)
        assert given == blocks
        out.sum().backward()
        assert sorted(given) == sorted(blocks * (1 if len(blocks) == 1 else 2))
        with torch.inference_mode():
            dape.attention(*Problem(keys=9).tensors(), **options)
    assert given[-len(blocks) :] == blocks


def test_the_weights_are_those_of_the_textbook():
    problem = Problem(kv_heads=2, mask="left", adapter=(4,), batch=1)
    tensors, modules, mask, _ = draw(problem)
    bias, adapter = (module.double() for module in modules)
    _, weights = dape.attention(
        *tensors, bias=bias, adapter=adapter, mask=mask, return_weights=True
    )
    positions = torch.arange(7)[None]
    _, expected = textbook.attention(
        *tensors, visible(problem, mask), positions, positions, bias_formula(bias),
        adapter_formula(adapter),
    )  # fmt: skip
    assert_close(weights, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((2, 4, 3), (2, 4, 3), (2, 4, 3)), "four axes"),
        (((2, 4, 5, 3), (2, 4, 5, 4), (2, 4, 5, 3)), "batch or head_dim"),
        (((2, 4, 5, 3), (1, 4, 5, 3), (1, 4, 5, 3)), "batch or head_dim"),
        (((2, 4, 5, 3), (2, 4, 5, 3), (2, 4, 6, 3)), "key and value differ"),
        (((2, 4, 5, 3), (2, 3, 5, 3), (2, 3, 5, 3)), "multiple of the key heads"),
        (((2, 4, 5, 3), (2, 0, 5, 3), (2, 0, 5, 3)), "multiple of the key heads"),
        (((2, 4, 5, 3), (2, 4, 0, 3), (2, 4, 0, 3)), "an axis is empty"),
        (((2, 4, 0, 3), (2, 4, 5, 3), (2, 4, 5, 3)), "an axis is empty"),
        (((0, 4, 5, 3), (0, 4, 5, 3), (0, 4, 5, 3)), "an axis is empty"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, words):
    with pytest.raises(UserError, match=words) as error:
        check(*(torch.zeros(shape) for shape in shapes), None, None)
    assert all(str(list(shape)) in str(error.value) for shape in shapes)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "sdpa"])
def test_a_key_of_another_dtype_is_refused(backend):
    query, key, value = Problem().tensors(torch.float32)
    message = r"^the query is torch\.float32, but the key torch\.float64; give both in one dtype$"
    with pytest.raises(UserError, match=message):
        dape.attention(query, key.double(), value, backend=backend)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_value_in_float64_makes_the_whole_call_float64(backend):
    query, key, value = Problem().tensors(torch.float32)
    module = dape.Kerple(4)
    found = dape.attention(query, key, value.double(), module, backend=backend)
    expected = dape.attention(query.double(), key.double(), value.double(), module, backend=backend)
    assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.unhooked  # the hook refuses them by the annotations, before the operator does
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_not_floating_point_are_refused(name, dtype):
    tensors = dict(zip(("query", "key", "value"), Problem().tensors(torch.float32), strict=True))
    tensors[name] = tensors[name].to(dtype)
    message = rf"^the {name} is {dtype}; attention takes floating-point numbers"
    with pytest.raises(UserError, match=message):
        dape.attention(**tensors)


def test_modules_of_other_heads_are_named():
    tensors = Problem(heads=4).tensors()
    query = re.escape(str(list(tensors[0].shape)))
    with pytest.raises(UserError, match=f"bias has num_heads=3, but the query {query} has 4"):
        dape.attention(*tensors, bias=dape.ALiBi(3))
    with pytest.raises(UserError, match=f"adapter has num_heads=5, but the query {query} has 4"):
        dape.attention(*tensors, adapter=dape.DAPE(5))
    with pytest.raises(UserError, match=f"adapter has head_dim=5, but the query {query} has 3"):
        dape.attention(*tensors, adapter=CoPE(head_dim=5))


def test_a_bias_and_an_adapter_in_the_place_of_the_other_are_named():
    tensors = Problem(heads=4).tensors()
    with pytest.raises(UserError, match=r"^bias=DAPE\(...\) is an adapter; say adapter=$"):
        dape.attention(*tensors, dape.DAPE(4))
    with pytest.raises(UserError, match=r"^adapter=Kerple\(...\) is a bias; say bias=$"):
        dape.attention(*tensors, adapter=dape.Kerple(4))


@pytest.mark.parametrize("place", ["bias", "adapter"])
def test_a_rotation_is_named_with_its_place(place):
    refusal = rf"^{place}=YaRN\(...\) is a rotation; turn query and key before the call"
    with pytest.raises(UserError, match=refusal):
        dape.attention(*Problem(heads=4).tensors(), **{place: dape.YaRN(8, train_length=16)})


@pytest.mark.parametrize("name", ["key", "value", "mask"])
def test_a_tensor_on_another_device_is_named(name):
    """Kernels started by addresses would read the memory of another device."""
    query, key, value = Problem(rows=7, keys=7).tensors()
    given = {"query": query, "key": key, "value": value, "mask": torch.ones(2, 7) > 0}
    refusal = f"^{name} is on meta, and the query on cpu; give both on one device$"
    with pytest.raises(UserError, match=refusal):
        dape.attention(**given | {name: given[name].to("meta")}, bias=dape.ALiBi(4))


class Returns(torch.nn.Module):
    """A bias or an adapter that returns a given value."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


@pytest.mark.unhooked  # the hook refuses them by the annotations
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adapter", [None, dape.DAPE(4)], ids=["none", "dape"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (7, 5, 4), (3, 4, 5, 7), (1, 1, 4, 5, 7)])
def test_a_bias_of_another_shape_is_refused(shape, adapter, backend):
    tensors = Problem(rows=5, keys=7, heads=4).tensors(torch.float32)
    message = re.escape(
        f"the bias Returns returned {list(shape)}; it must return [heads, queries, keys] = "
        "[4, 5, 7], with or without a batch before"
    )
    bias = Returns(torch.zeros(shape))
    with pytest.raises(UserError, match=f"^{message}$"):
        dape.attention(*tensors, bias, adapter, causal=False, backend=backend)


@pytest.mark.unhooked
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(2, 8, 5, 7),  # [A; B] without a layer back to H heads
        torch.zeros(2, 4, 5, 1),
        torch.zeros(4, 5, 7),
        torch.zeros(2, 5, 7),
        torch.zeros(2, 4, 5, 7, dtype=torch.bfloat16),
    ],
    ids=lambda logits: f"{logits.dtype}{list(logits.shape)}",
)
def test_logits_of_another_shape_or_dtype_are_refused(logits, backend):
    tensors = Problem(batch=2, rows=5, keys=7, heads=4).tensors(torch.float32)
    message = re.escape(
        f"the adapter Returns returned {list(logits.shape)} in {logits.dtype}; it must return "
        "logits in shape and dtype of the scores, [batch, heads, rows, keys] = [2, 4, 5, 7] in "
        "torch.float32"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        dape.attention(*tensors, adapter=Returns(logits), causal=False, backend=backend)


@pytest.mark.unhooked
def test_no_tensor_of_a_bias_or_an_adapter_is_named():
    tensors = Problem().tensors()
    with pytest.raises(UserError, match="the bias Returns returned a float; it must return"):
        dape.attention(*tensors, bias=Returns(0.0))
    with pytest.raises(UserError, match="the adapter Returns returned a tuple; it must return"):
        dape.attention(*tensors, adapter=Returns((1, 2)))


@pytest.mark.unhooked  # the hook refuses a name before
@pytest.mark.parametrize("name", ["bias", "adapter"])
def test_a_name_is_no_module(name):
    q = torch.randn(1, 2, 3, 4)
    for wrong in ("kerple", dape.Kerple):
        message = re.escape(f"{name}={wrong!r} is no module; give one, such as dape.Kerple(")
        with pytest.raises(UserError, match=message):
            dape.attention(q, q, q, **{name: wrong})
    with pytest.raises(UserError, match=rf"^{name}=a tensor \[2, 3, 3\] is no module; give"):
        dape.attention(q, q, q, **{name: torch.zeros(2, 3, 3)})


@pytest.mark.unhooked  # the hook refuses them before
@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "query_positions"])
def test_what_is_no_tensor_is_named(name):
    tensors = dict(zip(("query", "key", "value"), Problem().tensors(), strict=True))
    for wrong in ([1.0], torch.ones(3).numpy()):
        with pytest.raises(UserError, match=f"^{name} is a (list|ndarray); give a torch.Tensor$"):
            dape.attention(**{**tensors, name: wrong})


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 6, dtype=torch.bool),
        torch.ones(1, 7, dtype=torch.bool),
        torch.ones(2, 4, 5, 7, dtype=torch.bool),
        torch.ones(2, 1, 4, 7, dtype=torch.bool),
        torch.ones(2, 5, 7, dtype=torch.bool),
        torch.ones(2, 7),
    ],
    ids=lambda mask: f"{mask.dtype}{list(mask.shape)}",
)
def test_masks_that_do_not_fit_are_refused(mask):
    query, key, _ = Problem(rows=5, keys=7).tensors()
    with pytest.raises(UserError, match=r"mask (\[|has dtype torch.float32)"):
        check_where(query, key, mask, None, None)


def test_positions_of_another_length_are_refused():
    query, key, _ = Problem(rows=5, keys=7).tensors()
    batch = len(query)
    for shape in ((), (1,), (batch + 1, 5), (batch, 4, 5)):
        message = f"query_positions {list(shape)} must be [5] or [1 or {batch}, 5]"
        with pytest.raises(UserError, match=re.escape(message)):
            check_where(query, key, None, torch.zeros(shape), None)
    message = f"key_positions [{batch}, 5] must be [7] or [1 or {batch}, 7]"
    with pytest.raises(UserError, match=re.escape(message)):
        check_where(query, key, None, None, torch.zeros(batch, 5))


@pytest.mark.unhooked  # the annotations are of signed integers
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("bias", ["kerple", "sandwich", "fire", "user's"])
def test_differences_of_small_integers_do_not_overflow(bias, causal):
    builders = {"kerple": dape.Kerple, "sandwich": dape.Sandwich, "fire": dape.FIRE}
    tensors = Problem().tensors()

    def differences(i, j):
        return (j[None, None, :] - i[None, :, None]).double().expand(4, -1, -1) / 100

    module = builders[bias](4) if bias in builders else differences
    positions = torch.linspace(3, 200, tensors[0].shape[2]).round().long()
    found, expected = (
        dape.attention(*tensors, module, None, causal, query_positions=each, key_positions=each)
        for each in (positions.to(torch.uint8), positions)
    )
    assert torch.equal(found, expected)


@pytest.mark.unhooked  # the annotations are of signed integers without axes
@pytest.mark.parametrize(
    "offset", [torch.tensor(194, dtype=torch.uint8), torch.tensor([[194]])], ids=str
)
@pytest.mark.parametrize("modules", ["none", "dape3-kerple"])
def test_an_offset_may_be_any_tensor_of_a_whole_number(offset, modules):
    """195, the index of the first key, exceeds the offset: the difference is -1, and not 255."""
    bias, adapter = (
        (dape.Kerple(4), dape.DAPE(4, kernel_size=3)) if modules != "none" else (None,) * 2
    )
    tensors = Problem().tensors()
    found, expected = (
        dape.attention(*tensors, bias, adapter, query_offset=each, key_offset=195)
        for each in (offset, 194)
    )
    assert torch.equal(found, expected)


@pytest.mark.unhooked  # the hook refuses it before
@pytest.mark.parametrize("offset", [torch.tensor([2, 3]), torch.tensor(True), torch.tensor(2j)])
def test_an_offset_that_is_no_whole_number_is_refused(offset):
    message = rf"query_offset \{list(offset.shape)} is {offset.dtype}; give a whole number"
    with pytest.raises(UserError, match=message.replace("]", r"\]")):
        dape.attention(*Problem().tensors(), query_offset=offset)


@pytest.mark.parametrize("modules", ["none", "dape3-kerple"])
def test_tensors_without_data_have_the_shapes_of_the_output(modules):
    query, key, value = (x.to("meta") for x in Problem(kv_heads=2, value_dim=6).tensors())
    bias = dape.Kerple(4).to("meta") if modules != "none" else None
    adapter = dape.DAPE(4, kernel_size=3).to("meta") if modules != "none" else None
    out = dape.attention(query, key, value, bias, adapter)
    assert out.is_meta and out.shape == (*query.shape[:3], 6)


@pytest.mark.unhooked  # the hook refuses them before
def test_a_backend_is_a_name_and_a_switch_is_true_or_false():
    tensors = Problem().tensors()
    for wrong in (None, ["auto"]):
        with pytest.raises(UserError, match=re.escape(f"unknown backend {str(wrong)!r}")):
            dape.attention(*tensors, backend=wrong)
    for name in ("return_lse", "return_weights"):
        with pytest.raises(UserError, match=f"{name}='no' must be True or False"):
            dape.attention(*tensors, **{name: "no"})


def test_unknown_backends_and_impossible_requests_are_refused():
    tensors = Problem().tensors()
    with pytest.raises(UserError, match="unknown backend 'chunkd'; did you mean 'chunked'"):
        dape.attention(*tensors, backend="chunkd")
    with pytest.raises(
        UserError, match="'chunked' cannot serve this call: it never holds the attention weights"
    ):
        dape.attention(*tensors, backend="chunked", return_weights=True)
