"""A step of decoding whose kernel makes its tables, against the float64 textbook."""

import pytest
import torch
from torch.testing import assert_close

import dape
from dape.attention.fused import decode, decode_operator

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
BIASES = {
    "kerple": dape.Kerple,
    "power": dape.KerplePower,
    "alibi": dape.ALiBi,
    "t5": dape.T5,
    "none": None,
}


@pytest.fixture
def served(monkeypatch):
    """Return the list of terms that decoding served."""
    found, forward = [], decode.forward

    def spied(problem, terms, result):
        found.append(terms)
        return forward(problem, terms, result)

    monkeypatch.setattr(decode, "forward", spied)
    return found


def modules(bias="kerple", inputs="concat", residual=True, heads=4, hidden=5):
    kind = BIASES[bias]
    adapter = dape.DAPE(heads, hidden, inputs=inputs, residual=residual)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return kind and kind(heads), adapter


def drawn(rows=1, keys=70, heads=4, kv_heads=4, size=16, batch=2, dtype=torch.float32):
    lengths = ((heads, rows), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, n, length, size).to(dtype) for n, length in lengths]


@torch.no_grad()
def compared(tensors, bias, adapter, tolerance=2e-5, **how):
    """Compare the kernel with the textbook in float64; return what the kernel gives."""
    out, lse = dape.attention(*tensors, bias, adapter, backend="triton", return_lse=True, **how)
    doubles = [x and x.double() if isinstance(x, torch.nn.Module) else x for x in (bias, adapter)]
    tensors = [x.double() for x in tensors]
    true = dape.attention(*tensors, *doubles, backend="reference", return_lse=True, **how)
    for found, expected in zip((out, lse), true, strict=True):
        assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    return out


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("inputs", "residual"), [("concat", True), ("concat", False), ("sum", True), ("scores", True)]
)
def test_every_form_equals_the_textbook(bias, inputs, residual, served):
    inputs = "scores" if bias == "none" else inputs
    compared(drawn(), *modules(bias, inputs, residual), query_offset=69)
    assert [type(terms) for terms in served] == [decode.Sources]


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({"keys": 300}, {"query_offset": 299}),
        ({"batch": 1, "rows": 3}, {"query_offset": 67}),
        ({"batch": 1, "rows": 4}, {"causal": False, "query_offset": 20}),
        ({"kv_heads": 1}, {"query_offset": 69, "scale": 0.3}),
        ({"keys": 20}, {"query_offset": 9}),
        ({}, {"query_offset": 5000}),
        ({}, {"query_offset": -3}),
    ],
)
def test_every_place_of_the_queries_equals_the_textbook(sizes, how, served):
    compared(drawn(**sizes), *modules(), **how)
    assert [type(terms) for terms in served] == [decode.Sources]


def test_masked_keys_stay_unseen(served):
    mask = torch.rand(2, 70) < 0.7
    compared(drawn(), *modules(), mask=mask, query_offset=69)
    assert len(served) == 1 and isinstance(served[0], decode.Sources)


def test_tables_in_memory_give_the_same(monkeypatch, served):
    tensors, parts = drawn(keys=200), modules(heads=4, hidden=32)
    with torch.no_grad():
        made = dape.attention(*tensors, *parts, query_offset=199, backend="triton")
        monkeypatch.setattr(decode, "MOST_MADE", 0)
        read = dape.attention(*tensors, *parts, query_offset=199, backend="triton")
    assert len(served) == 2 and not isinstance(served[1], decode.Sources)
    assert_close(made, read, atol=2e-6, rtol=2e-6)


def test_half_precision_is_as_exact_as_its_digits(served):
    compared(drawn(dtype=torch.float16), *modules(), tolerance=5e-3, query_offset=69)
    assert len(served) == 1


@pytest.mark.parametrize("bias", ["alibi", "kerple", "t5"])
def test_large_distances_are_exact(bias, served):
    """Far from the keys a bias is large and differs little between keys."""
    compared(drawn(), *modules(bias), tolerance=5e-3, query_offset=262_144)
    assert len(served) == 1


@pytest.mark.parametrize(
    "kind", ["gradients", "sandwich", "v2", "many rows", "few keys", "the bias alone"]
)
def test_other_calls_read_tables(kind, served):
    tensors, (bias, adapter) = drawn(), modules()
    if kind == "gradients":
        tensors[1].requires_grad_()
    elif kind == "sandwich":
        bias = dape.Sandwich(4)
    elif kind == "v2":
        adapter = dape.DAPE(4, kernel_size=3)
    elif kind == "many rows":
        tensors = drawn(rows=3, keys=70)
    elif kind == "few keys":
        tensors = drawn(keys=10)
    else:
        adapter = dape.DAPE(4, inputs="bias")
    for parameter in [*bias.parameters(), *adapter.parameters()]:
        parameter.requires_grad_(False)
    dape.attention(*tensors, bias, adapter, query_offset=60, backend="triton")
    assert not any(isinstance(terms, decode.Sources) for terms in served)


@pytest.mark.parametrize("name", ["raw_a", "raw_p"])
def test_a_parameter_that_is_no_number_gives_none(name):
    bias, adapter = modules()
    with torch.no_grad():
        getattr(bias, name)[1] = torch.nan
        out = dape.attention(*drawn(), bias, adapter, query_offset=69, backend="triton")
    assert out.isnan().any()


def test_the_operator_passes_every_check_of_pytorch():
    bias, adapter = modules()
    layers = adapter.weight_in, adapter.bias_in, adapter.weight_out, adapter.bias_out
    sources = decode.Sources(bias.raw_p, bias.raw_a, *layers, "", 0, 4, True)
    sources = [x.detach() if isinstance(x, torch.Tensor) else x for x in sources]
    for mask in (None, torch.rand(2, 70) < 0.7):
        torch.library.opcheck(decode_operator.operator, (*drawn(), mask, 0.25, True, 69, *sources))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_against_float64(bias, rows, served, monkeypatch):
    inputs = "scores" if bias == "none" else "concat"
    parts = [x and x.cuda() for x in modules(bias, inputs, heads=12, hidden=32)]
    tensors = [x.cuda() for x in drawn(rows, 4099, 12, 12, 64, 1, torch.bfloat16)]
    with torch.no_grad():
        found = dape.attention(*tensors, *parts, query_offset=4099 - rows)
        assert isinstance(served[0], decode.Sources)
        monkeypatch.setattr(decode, "MOST_MADE", 0)
        read = dape.attention(*tensors, *parts, query_offset=4099 - rows)
        doubles = [x if x is None else x.double() for x in (*tensors, *parts)]
        true = dape.attention(*doubles, query_offset=4099 - rows, backend="reference")
    assert (found - true).norm() <= 1.05 * (read - true).norm()
