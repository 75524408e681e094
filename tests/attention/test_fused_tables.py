"""Tables U and C of biases and adapters against float64 formulas, and their operators."""

import copy

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.attention.fused import formed
from dape.attention.fused import table_operators as operators
from dape.attention.fused.tables import tables

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
CPU, HEADS, COUNT = torch.device("cpu"), 5, 75
BIASES = {
    "none": lambda: None,
    "nope": lambda: dape.NoBias(HEADS),
    "alibi": lambda: dape.ALiBi(HEADS),
    "kerple": lambda: dape.Kerple(HEADS),
    "power": lambda: dape.KerplePower(HEADS),
    "t5": lambda: dape.T5(HEADS),
    "sandwich": lambda: dape.Sandwich(HEADS),
}
ADAPTERS = {
    "none": None,
    "dape": (7,),
    "without residual": (7, 1, False, "concat"),
    "sum": (7, 1, True, "sum"),
    "scores": (7, 1, True, "scores"),
    "v2": (7, 3),
    "v2 on sums": (7, 3, False, "sum"),
}


def by_formula(bias, adapter):
    """The same tables in float64, with the gradient of U as the kernels define it."""
    distances = torch.arange(COUNT)
    values = torch.zeros(HEADS, COUNT, dtype=torch.float64)
    if bias is not None:
        values = bias(distances, distances[:1])[..., 0].double()
    if adapter is None:
        return [values]
    a = b = adapter.weight_in
    if adapter.inputs == "concat":
        a, b = adapter.weight_in.split(HEADS, dim=1)
    if adapter.inputs == "scores":
        b = torch.zeros_like(b)
    hidden = torch.einsum("dht,hn->ntd", b, values)
    static = (values if adapter.residual else 0 * values) + adapter.bias_out[:, None]
    flat = [a.permute(2, 0, 1).flatten(0, 1), adapter.weight_out.transpose(1, 2).flatten(1)]
    if adapter.kernel_size > 1:
        return [static, hidden.flatten(1), *flat, adapter.bias_in]
    hidden = hidden[:, 0] + adapter.bias_in
    at_zero = torch.nn.functional.leaky_relu(hidden.detach(), 0.01)
    return [static + adapter.weight_out[:, :, 0] @ at_zero.T, hidden, *flat]


def linear(static, jacobian, parameters):
    """The table as a function of the parameters, with the Jacobian for its gradient."""
    assert not static.requires_grad and not jacobian.requires_grad
    return static + torch.einsum("phn,ph->hn", jacobian, parameters - parameters.detach())


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_tables_and_gradients_are_those_of_the_formula(adapter, bias):
    bias, sizes = BIASES[bias](), ADAPTERS[adapter]
    modules = [bias, sizes and dape.DAPE(HEADS, *sizes)]
    if modules == [None, None]:
        assert tables(None, None, HEADS, COUNT, CPU) == ()
        return
    exact = [m and copy.deepcopy(m).double() for m in modules]
    found, true = tables(*modules, HEADS, COUNT, CPU), by_formula(*exact)
    if len(found) == 3:  # `Static`, whose gradients attention itself takes to the parameters
        found = (linear(*found),)
    assert [x.shape for x in found] == [x.shape for x in true]
    for ours, theirs in zip(found, true, strict=True):
        assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    gradients = []
    for outputs, parts in ((found, modules), (true, exact)):
        torch.manual_seed(1)
        total = sum((x * torch.randn(x.shape).to(x.dtype)).sum() for x in outputs)
        parameters = [p for m in parts if m is not None for p in m.parameters()]
        if parameters:
            gradients.append(torch.autograd.grad(total, parameters, materialize_grads=True))
    for ours, theirs in zip(*gradients, strict=True):
        scale = max(1.0, theirs.abs().max().item())
        assert_close(ours.double(), theirs, rtol=0, atol=5e-6 * scale)


def test_a_table_of_large_distances_is_as_exact_as_float32():
    bias = dape.KerplePower(HEADS)
    torch.nn.init.constant_(bias.raw_p, 3.0)
    found, *_ = tables(bias, None, HEADS, 1 << 13, CPU)
    distances = torch.arange(1 << 13)
    true = copy.deepcopy(bias).double()(distances, distances[:1])[..., 0]
    assert_close(found.double(), true, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (32, 256), (2, 9), (7, 50), (100, 700), (200, 700)]
)
def test_the_kernel_has_the_buckets_of_t5(num_buckets, max_distance):
    bias = dape.T5(HEADS, num_buckets, max_distance)
    assert (formed.form_of(bias) is None) == (num_buckets > formed.MOST_ROWS)
    (found,) = tables(bias, None, HEADS, 1000, CPU)
    distances = torch.arange(1000)
    assert torch.equal(found, bias(distances, distances[:1])[..., 0])
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), bias.weight)[0]
    exact = copy.deepcopy(bias).double()
    true = exact(distances, distances[:1])[..., 0] * weight.double()
    true = torch.autograd.grad(true.sum(), exact.weight)[0]
    assert_close(ours.double(), true, rtol=1e-5, atol=1e-5)


def test_two_passes_agree_bit_for_bit():
    modules = dape.Kerple(HEADS), dape.DAPE(HEADS, 7)
    parameters = [p for m in modules for p in m.parameters()]
    runs = []
    for _ in range(2):
        found = tables(*modules, HEADS, 3000, CPU)
        runs.append(torch.autograd.grad([x.square().sum() for x in found], parameters))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def given(form, values, mixed):
    """Arguments of the operator: parameters of a form or values, and layers if heads are mixed."""
    rows = (4, 3) if form == BUCKETS else (3,)
    p = [None, None] if values else [torch.randn(rows, requires_grad=True) for _ in range(2)]
    if form == BUCKETS:
        p[1] = None
    layers = [(4, 6, 1), (4,), (3, 4, 1), (3,)] if mixed else []
    weights = [torch.randn(x, requires_grad=True) for x in layers] or [None] * 4
    first = torch.randn(3, 5, requires_grad=True) if values else None
    span = 9 if form == BUCKETS else 0
    on_bias = 3 if mixed else -1
    return first, *p, *weights, form, 5, 3, on_bias, True, False, False, span, 0


KERPLE, BUCKETS = (formed.name_of(kind) for kind in (dape.Kerple, dape.T5))


@pytest.mark.parametrize(
    ("form", "values", "mixed"),
    [(BUCKETS, False, False), (KERPLE, False, True), (BUCKETS, False, True), ("", True, True)],
)
def test_the_operator_passes_every_check_of_pytorch(form, values, mixed):
    torch.library.opcheck(operators.forward_operator, given(form, values, mixed))


@pytest.mark.parametrize("derivatives", [0, 2])
def test_the_operator_of_a_form_passes_every_check_of_pytorch(derivatives):
    parameters = [torch.randn(3), torch.randn(3)]
    how = operators.How(KERPLE, 5, 3, derivatives=derivatives)
    torch.library.opcheck(operators.forward_operator, (None, *parameters, *[None] * 4, *how))


def test_a_bias_that_learns_nothing_has_no_jacobian():
    frozen = dape.Kerple(HEADS).requires_grad_(False)
    assert [len(tables(x, None, HEADS, COUNT, CPU)) for x in (frozen, dape.ALiBi(HEADS))] == [1, 1]
    with torch.no_grad():
        assert len(tables(dape.Kerple(HEADS), None, HEADS, COUNT, CPU)) == 1


def test_the_operator_of_fire_passes_every_check_of_pytorch():
    log_c, log_threshold = (torch.randn(1, requires_grad=True) for _ in range(2))
    torch.library.opcheck(operators.fire_operator, (log_c, log_threshold, 7, 2))
