"""The fused operators inside PyTorch: its own checks, compilation, autocast, checkpointing."""

import copy

import pytest
import torch
from problems import Problem, differentiate, leaves
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dape
from dape.attention import select
from dape.attention.fused import operator
from dape.errors import UserError
from dape.registered import straight

# The interpreter's own warnings, of NumPy.
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]
CPU = torch.device("cpu")
PARTS = {
    "nothing": (None, None),
    "kerple": (dape.Kerple, None),
    "fire": (dape.FIRE, None),
    "dape-kerple": (dape.Kerple, (5,)),
    "dape3-kerple": (dape.Kerple, (5, 3)),
    "dape-fire": (dape.FIRE, (5,)),
}
every_kind = pytest.mark.parametrize("name", PARTS)


def built(name):
    bias, sizes = PARTS[name]
    return bias and bias(4), sizes and dape.DAPE(4, *sizes)


class Layer(nn.Module):
    """Attention of four heads of four, from one projection."""

    def __init__(self, name, backend="triton"):
        super().__init__()
        self.projection = nn.Linear(16, 48)
        self.bias, self.adapter = built(name)
        self.backend = backend

    def heads(self, x):
        """Return query, key and value `[B, 4, T, 4]`."""
        return self.projection(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        return dape.attention(*self.heads(x), self.bias, self.adapter, backend=self.backend)


def results(function, layer, x):
    """Return output and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = function(x)
    return out, *differentiate(out, [x, *layer.parameters()])


@pytest.mark.parametrize(
    ("name", "masked"),
    [*((name, False) for name in PARTS), ("kerple", True), ("dape-kerple", True)],
)
def test_the_operators_pass_every_check_of_pytorch(name, masked):
    problem = Problem(rows=3, keys=5, kv_heads=2)
    tensors, modules, _ = leaves(problem.tensors(torch.float32), built(name))
    tables = [x.detach().requires_grad_() for x in operator.tables(*modules, 4, 5, CPU)]
    mask = torch.rand(2, 5) < 0.7 if masked else None
    how = (0.5, True, 2, (0, 0), "triton")
    forward, backward = operator.forward_operator, operator.backward_operator
    torch.library.opcheck(forward, (*tensors, tables, mask, None, *how, True))
    with torch.no_grad():
        *found, flag = forward(*tensors, tables, mask, None, *how, True)
    tensors, tables = ([x.detach() for x in given] for given in (tensors, tables))
    grad_out, grad_lse = torch.randn_like(found[0]), torch.randn_like(found[1])
    for also, learns in ((None, True), (grad_lse, False)):
        given = (*tensors, tables, mask, None, *found, flag, grad_out, also)
        torch.library.opcheck(backward, (*given, *how, learns))


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "triton") for name in PARTS), ("nothing", "auto")]
)
def test_two_graphs_serve_every_batch_and_length(name, backend):
    torch.compiler.reset()
    layer, counter = Layer(name, backend), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    # The first sizes are taken to be the only ones, the second to be some of many.
    for batch, length, graphs in ((5, 9, 1), (3, 13, 2), (2, 34, 2)):
        x = torch.randn(batch, length, 16)
        for ours, theirs in zip(results(compiled, layer, x), results(layer, layer, x), strict=True):
            assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert counter.frame_count == graphs


def test_under_autocast_tables_stay_in_float32():
    layer = Layer("dape-kerple")
    distances = torch.arange(600.0, dtype=torch.float64)[None]
    p, a = ((1 + raw.double().exp()).log()[:, None] for raw in (layer.bias.raw_p, layer.bias.raw_a))
    values = -p * (1 + a * distances).log()
    adapter = copy.deepcopy(layer.adapter).double()
    with torch.autocast("cpu", torch.float16):
        assert layer.heads(torch.randn(1, 2, 16)).dtype == torch.float16
        static, hidden, *_ = operator.tables(layer.bias, layer.adapter, 4, 600, CPU)
    assert static.dtype == hidden.dtype == torch.float32
    true_hidden = values.T @ adapter.weight_in[:, 4:, 0].T + adapter.bias_in
    at_zero = adapter.weight_out[:, :, 0] @ torch.nn.functional.leaky_relu(true_hidden, 0.01).T
    true_static = values + adapter.bias_out[:, None] + at_zero
    assert_close(static.double(), true_static, rtol=1e-6, atol=1e-6)
    assert_close(hidden.double(), true_hidden, rtol=1e-6, atol=2e-6)


@every_kind
def test_autocast_changes_nothing_but_the_projection(name):
    layer = Layer(name)
    x = torch.randn(2, 11, 16)

    def run(autocast):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            query, key, value = qkv
            out = dape.attention(query, key, value, layer.bias, layer.adapter, backend="triton")
        return out, *differentiate(out, [*qkv, *parameters])

    with torch.autocast("cpu", torch.float16):
        qkv = [t.detach().requires_grad_() for t in layer.heads(x)]
    parameters = [p for m in (layer.bias, layer.adapter) if m for p in m.parameters()]
    inside, outside = run(True), run(False)
    assert [t.dtype for t in inside] == [torch.float16] * 4 + [torch.float32] * len(parameters)
    for ours, theirs in zip(inside, outside, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["nothing", "kerple", "fire", "dape-kerple"])
def test_no_second_derivative_is_ever_zero_unseen(name):
    """Neither in a Hessian, nor in a loss with a penalty on its gradient."""
    layer, x = Layer(name), torch.randn(1, 9, 16, requires_grad=True)

    def loss(x):
        return layer(x).sin().sum()

    second = pytest.raises(UserError, match="first derivatives alone; give backend='chunked'")
    with second:
        torch.autograd.functional.hvp(loss, x, torch.ones_like(x))
    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with second as error:
        torch.autograd.grad(loss(x) + gradient.square().sum(), x)
    assert "\n" not in str(error.value)
    for parameter in layer.parameters():
        (gradient,) = torch.autograd.grad(loss(x), parameter, create_graph=True)
        with second:
            torch.autograd.grad(gradient.square().sum() + x.sum(), x)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of jvp and vmap
def test_transforms_go_to_another_backend(monkeypatch):
    """As on a GPU, where `auto` asks the kernels first."""
    monkeypatch.setattr(select, "order", lambda _: ["sdpa", "triton", "chunked"])
    layer, x, moved = Layer("dape-kerple"), torch.randn(2, 1, 9, 16), torch.randn(1, 9, 16)
    for function, reason in (
        (lambda: torch.func.jvp(layer, (x[0],), (moved,)), "forward-mode derivatives"),
        (lambda: torch.func.vmap(layer)(x), "transforms of torch.func"),
    ):
        with pytest.raises(UserError, match=f"the kernels know no {reason}"):
            function()
    for name in ("nothing", "dape-kerple"):
        layer = Layer(name, "auto")
        exact = copy.deepcopy(layer).double()
        exact.backend = "reference"
        _, found = torch.func.jvp(layer, (x[0],), (moved,))
        _, expected = torch.autograd.functional.jvp(exact, x[0].double(), moved.double())
        assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        rows = torch.func.vmap(layer)(x)
        assert_close(rows, torch.stack([layer(x[0]), layer(x[1])]), rtol=1e-4, atol=1e-5)


@every_kind
def test_checkpointing_changes_nothing(name):
    layer, x = Layer(name), torch.randn(2, 11, 16)
    ours = results(lambda x: checkpoint(layer, x, use_reentrant=False), layer, x)
    for mine, theirs in zip(ours, results(layer, layer, x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # Inductor's own
@pytest.mark.parametrize("scheme", ["rope", "kerple", "dape-kerple", "dape-fire", "dape3-kerple"])
def test_on_a_gpu_a_compiled_model_is_as_near_to_float64_as_eager(scheme):
    torch.compiler.reset()
    config = dape.DapeConfig(
        scheme=scheme, vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = dape.DapeForCausalLM(config).cuda()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True)
    for length in (129, 200):
        ids = torch.randint(64, (2, length), device="cuda")
        true = loss_and_gradients(exact, exact, ids)
        with torch.autocast("cuda", torch.bfloat16):
            eager, ours = (loss_and_gradients(f, model, ids) for f in (model, compiled))
        errors = [distance(found, true) for found in (ours, eager)]
        assert errors[0] < 1.5 * errors[1] < 0.1, errors


def loss_and_gradients(function, model, ids):
    """Return the loss and the gradients of all parameters, as one vector each."""
    loss = function(input_ids=ids, labels=ids, use_cache=False).loss
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    return loss.double(), torch.cat([g.double().flatten() for g in gradients])


def distance(found, true):
    """Return the largest relative error of the two, in the Euclidean norm."""
    pairs = zip(found, true, strict=True)
    return max((torch.linalg.norm(a - b) / torch.linalg.norm(b)).item() for a, b in pairs)


def ways(x):
    """Return which of both a call takes: the operator, or the function behind it."""
    return straight(lambda *_: "operator", lambda *_: "function")(x, 3, [None, x])


class Marked(torch.Tensor):
    """A subclass, as those of FSDP."""


@pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_the_dispatcher_is_left_out_where_nothing_watches():
    x, found = torch.ones(2), []
    learnt = torch.nn.Parameter(torch.ones(2))
    assert ways(x) == "function" and ways(learnt) == "operator"
    with torch.no_grad():
        assert ways(learnt) == "function"
    with torch.inference_mode():
        assert ways(torch.ones(2)) == "function"
    assert ways(x.to("meta")) == ways(x.as_subclass(Marked)) == "operator"
    with FlopCounterMode(display=False):
        assert ways(x) == "operator"
    with FakeTensorMode() as fake:
        assert ways(fake.from_tensor(x)) == "operator"
    with forward_ad.dual_level():
        assert ways(forward_ad.make_dual(x, x)) == "operator"
    torch.func.vmap(lambda each: found.append(ways(each)) or each)(x)
    torch.jit.trace(lambda each: found.append(ways(each)) or each + 1, x, check_trace=False)
    assert set(found) == {"operator"}
    compiled = torch.compile(lambda each: each + len(ways(each)), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x + len("operator"))
