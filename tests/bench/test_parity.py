"""The check that comes before any timing: its truth, its errors, and what it refuses."""

import math

import pytest
import torch
from cases import case, method
from torch.testing import assert_close

import textbook
from dape.bench import parity
from dape.bench.attempt import attempt
from dape.bench.case import Parts, build, draw
from dape.bench.methods import chosen, ours
from dape.bench.record import Check, Missing
from dape.errors import UserError


def solve_by_textbook(one, parts, inputs):
    """Output and gradients in float64 by the formulas, row by row."""
    leaves = [x.detach().double().requires_grad_() for x in inputs[:3]]
    bias, adapter = (module.double() for module in parts)
    p, a = (torch.log(1 + raw.exp()) for raw in (bias.raw_p, bias.raw_a))
    weights = (adapter.weight_in[..., 0], adapter.bias_in, adapter.weight_out[..., 0])
    seen = torch.ones(one.length, one.length, dtype=torch.bool).tril().expand(one.batch, -1, -1)
    positions = torch.arange(one.length).expand(one.batch, -1)
    out, _ = textbook.attention(
        *leaves, seen, positions, positions, textbook.kerple(p, a),
        textbook.dape(*weights, adapter.bias_out),
    )  # fmt: skip
    parameters = [*bias.parameters(), *adapter.parameters()]
    return [out, *torch.autograd.grad(out, [*leaves, *parameters], inputs.cotangent.double())]


@pytest.mark.parametrize("rows", [100, 4, 1])
def test_the_truth_is_that_of_the_textbook_in_blocks_of_any_size(monkeypatch, rows):
    one = case()
    monkeypatch.setitem(parity.SCORES_PER_BLOCK, "cpu", rows * one.batch * one.heads * one.length)
    parts, (inputs,) = build(one), draw(one, 1)
    found = parity.by_rows(one, parts, inputs, torch.float64)
    assert list(found) == [
        "output", "query", "key", "value", "bias.raw_p", "bias.raw_a", "adapter.weight_in",
        "adapter.bias_in", "adapter.weight_out", "adapter.bias_out",
    ]  # fmt: skip
    for x, true in zip(found.values(), solve_by_textbook(one, parts, inputs), strict=True):
        assert_close(x, true, rtol=1e-9, atol=1e-12)
    assert all(p.dtype == torch.float32 for p in build(one).named_parameters.values())


def test_errors_are_relative_frobenius_norms():
    exact = {"output": torch.tensor([3.0, 4.0]).double(), "bias.p": torch.tensor([0.0, 2.0])}
    found = {"output": torch.tensor([3.0, 4.5]), "bias.p": torch.tensor([1.0, 2.0])}
    assert parity.errors(found, exact) == {"output": 0.1, "bias.p": 0.5}
    assert list(parity.errors({"output": found["output"]}, exact)) == ["output"]


def test_a_gradient_that_vanishes_is_relative_to_those_of_its_module():
    exact = {
        "adapter.weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]),
        "adapter.constant": torch.full((4,), 1e-14),
        "bias.p": torch.tensor([100.0]),
    }
    found = exact | {"adapter.constant": torch.tensor([0.5, 0.5, 0.5, 0.5])}
    usual = math.sqrt(25 / 8 * 4)  # of eight entries of the module, four
    assert parity.errors(found, exact)["adapter.constant"] == pytest.approx(1 / usual)
    assert [name for name in exact if parity.vanishes(name, exact)] == ["adapter.constant"]


def test_limits_are_twice_the_errors_of_the_textbook_and_a_slack():
    one = case(dtype="bf16", length=33)
    parts, (inputs,) = build(one), draw(one, 1)
    truth = parity.Truth.of(one, parts, inputs)
    halved = parity.by_rows(one, parts, inputs, torch.bfloat16)
    for name, limit in truth.limits.items():
        error = (halved[name] - truth.tensors[name]).norm() / truth.tensors[name].norm()
        expected = 0.1 if name == "adapter.bias_out" else 2 * error.item() + 1e-2
        assert limit == pytest.approx(expected)
    assert 1e-3 < truth.limits["output"] - 1e-2 < 2e-2  # a few thousandths, twice


def test_methods_of_a_cpu_pass_and_others_say_why_not():
    names = ("sdpa-cudnn", "sdpa-flash", "textbook", "chunked", "flex", "flex-table", "cuda")
    shown = []
    checks = parity.check_all([case(), case(length=5)], chosen(names), shown.append)
    assert shown == checks and len(checks) == 2 * 2 * (1 + len(names))
    served = {check.method for check in checks if check.missing is None}
    assert served == {"sdpa", "sdpa-flash", "textbook", "chunked"}
    reasons = {check.method: check.missing.reason for check in checks if check.missing}
    assert reasons["sdpa-cudnn"] == "cuDNN needs a CUDA GPU"
    assert "a single head" in reasons["flex"] and reasons["flex"] == reasons["flex-table"]
    if not torch.cuda.is_available():
        assert "CUDA" in reasons["cuda"]
    training = next(c for c in checks if c.method == "chunked" and "backward" in c.direction)
    assert "output" in training.errors and "adapter.weight_out" in training.errors


WRONG = {
    "output": lambda right, q, k, v: 1.05 * right(q, k, v),
    "the gradient of key": lambda right, q, k, v: right(q, k + 0.05 * (k - k.detach()), v),
    "nan": lambda right, q, k, v: right(q, k, v) * (float("nan") if torch.is_grad_enabled() else 1),
    "not causal": lambda right, q, k, v: right(q, k.flip(2), v.flip(2)),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("output", "at length 9, forward: output is 5.*e-02 from float64, more than"),
        ("the gradient of key", r"forward \+ backward: the gradient of key is 5.*e-02 from"),
        ("nan", r"forward \+ backward: \S.* nan from float64"),
        ("not causal", "at length 9, forward: output is"),
    ],
)
def test_a_wrong_method_is_refused_by_name(wrong, message, dtype):
    right = method(lambda textbook, *qkv: textbook(*qkv), name="right")
    with pytest.raises(UserError, match=f"made is wrong .*{message}") as refused:
        parity.check_all([case(dtype=dtype)], [right, method(WRONG[wrong])], lambda check: None)
    assert len(str(refused.value).splitlines()) == 1 and "--methods" in str(refused.value)


def test_a_wrong_gradient_of_a_parameter_is_refused_by_name():
    def prepare(case, parts):
        parts.bias.raw_p.register_hook(lambda gradient: 1.05 * gradient)
        return ours("reference", case, parts)

    with pytest.raises(UserError, match=r"the gradient of bias\.raw_p is 5\.0e-02 from float64"):
        parity.check_all([case()], [method(prepare=prepare)], lambda check: None)


def test_a_method_that_breaks_is_not_a_method_that_is_wrong():
    def prepare(case, parts):
        def attend(query, key, value):
            raise RuntimeError("first line\nsecond line")

        return attend

    (forward, training) = parity.check_all([case()], [method(prepare=prepare)], lambda check: None)
    assert forward.missing == training.missing == Missing("failed", "RuntimeError: first line")
    assert forward.errors == {}


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (UserError("no"), "not served", "no"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "OutOfMemoryError: CUDA"),
        (RuntimeError("x: can't allocate memory: 9"), "out of memory", "RuntimeError: x: can't"),
        (AssertionError(), "failed", "AssertionError: no reason given"),
    ],
)
def test_every_failure_is_a_kind_and_a_reason(error, kind, reason):
    def act():
        raise error

    missing = attempt(act)
    assert missing.kind == kind and missing.reason.startswith(reason)


def test_the_worst_tensor_is_the_one_nearest_to_its_limit():
    check = Check("m", 8, "forward", 1, 8, {"a": 0.5, "b": 0.2}, {"a": 1.0, "b": 0.3})
    assert check.worst == "b"
    check = Check("m", 8, "forward", 1, 8, {"a": math.nan, "b": 0.4}, {"a": 1.0, "b": 0.3})
    assert check.worst == "a" and not check.within("a")


def test_what_has_no_parameters_is_checked_too():
    checks = parity.check_all([case(scheme="nope")], chosen(["textbook"]), lambda check: None)
    assert list(checks[-1].errors) == ["output", "query", "key", "value"]
    assert Parts().named_parameters == {}
