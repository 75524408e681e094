"""The kernel that turns against complex numbers in float64, on the interpreter and on a GPU."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close

from dape.positions import turn as module
from dape.positions.rotary import RoPE, YaRN
from dape.positions.turn import Turn, formula, turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the interpreter's, of NumPy
]


def drawn(batch, heads, length, width, pairs, per_batch, dtype=torch.float32):
    """Return rows as a projection leaves them, heads inside tokens, and cosine and sine."""
    x = torch.randn(batch, length, heads, width, device=DEVICE).to(dtype).transpose(1, 2)
    shape = (batch, length, pairs) if per_batch else (length, pairs)
    angles = 10 * torch.randn(shape, device=DEVICE)
    return x, angles.cos(), angles.sin()


def exact(x, cos, sin):
    """Return x times e^{i angle} in the complex plane, pair by pair."""
    x, pairs = x.double(), cos.shape[-1]
    wave = torch.complex(cos.double(), sin.double()).unsqueeze(-3)
    turned = torch.complex(x[..., :pairs], x[..., pairs : 2 * pairs]) * wave
    return torch.cat([turned.real, turned.imag, x[..., 2 * pairs :]], dim=-1)


CASES = [  # batch, heads, length, width, pairs, angles of each element of the batch
    (2, 3, 33, 16, 8, False),
    (3, 2, 7, 20, 5, True),
    (1, 1, 1, 64, 8, False),
    (2, 4, 5, 24, 12, True),
    (0, 2, 4, 8, 4, False),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_turns_as_complex_numbers_do(case, dtype):
    x, cos, sin = drawn(*case, dtype)
    out = Turn.apply(x, cos, sin, 1.0)
    assert out.dtype == dtype and out.stride() == torch.empty_like(x).stride()
    tolerance = TOLERANCE[dtype]
    assert_close(out.double(), exact(x, cos, sin), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES[:4])
def test_its_gradients_are_those_of_the_formula(case):
    x, cos, sin = drawn(*case)
    x.requires_grad_()
    cotangent = torch.randn_like(x)
    (found,) = torch.autograd.grad(Turn.apply(x, cos, sin, 1.0), x, cotangent)
    (true,) = torch.autograd.grad(exact(x, cos, sin), x, cotangent.double())
    assert_close(found, true.float(), rtol=1e-6, atol=1e-6)


def test_it_can_be_differentiated_twice_and_forward():
    x, cos, sin = drawn(*CASES[0])
    x.requires_grad_()
    (first,) = torch.autograd.grad(Turn.apply(x, cos, sin, 1.0).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    (true,) = torch.autograd.grad(exact(x, cos, sin).pow(3).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad(true.sum(), x)
    assert_close(second, twice.float(), rtol=1e-4, atol=1e-4)
    plain, tangent = x.detach(), torch.randn_like(x)
    _, moved = torch.func.jvp(lambda x: Turn.apply(x, cos, sin, 1.0), (plain,), (tangent,))
    assert_close(moved.double(), exact(tangent, cos, sin), rtol=1e-6, atol=1e-6)


def test_vmap_maps_it_and_its_gradients():
    x, cos, sin = (
        torch.stack(both) for both in zip(drawn(*CASES[0]), drawn(*CASES[0]), strict=True)
    )
    found = torch.vmap(lambda x, c, s: Turn.apply(x, c, s, -1.0))(x, cos, sin)
    each = [formula(*(part[k] for part in (x, cos, -sin))) for k in range(2)]
    assert_close(found, torch.stack(each))

    def loss(x, cos, sin):
        return Turn.apply(x, cos, sin, 1.0).pow(2).mul(torch.arange(16.0, device=DEVICE)).sum()

    found = torch.vmap(torch.func.grad(loss))(x, cos, sin)
    each = [torch.func.grad(loss)(*(part[k] for part in (x, cos, sin))) for k in range(2)]
    assert_close(found, torch.stack(each), rtol=1e-5, atol=1e-4)


def test_a_cpu_float64_and_learnt_angles_take_the_formula():
    x, cos, sin = drawn(*CASES[0])
    assert torch.equal(turn(x.cpu(), cos.cpu(), sin.cpu()), formula(x.cpu(), cos.cpu(), sin.cpu()))
    angles = torch.randn(33, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    given = x.double().requires_grad_()
    torch.autograd.gradcheck(
        lambda x, a: turn(x[:, :1, :2], a[:2].cos(), a[:2].sin()), (given, angles)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rotation", [RoPE(64), RoPE(64, fraction=0.25), YaRN(64, 512)])
def test_on_a_gpu_rotations_are_those_of_a_cpu(rotation, compiled, dtype):
    query, key = (torch.randn(2, h, 700, 64, requires_grad=True) for h in (12, 4))
    positions = torch.stack([torch.arange(700), torch.arange(700) + 9])
    true = rotation(query.double(), key.double(), positions)
    cotangents = [torch.randn_like(x) for x in (query, key)]
    gradients = torch.autograd.grad(true, (query, key), [c.double() for c in cotangents])
    given = [x.detach().to("cuda", dtype).requires_grad_() for x in (query, key)]
    torch.compiler.reset()  # the cases are more than a function may have compilations
    turned = torch.compile(rotation, fullgraph=True) if compiled else rotation
    found = turned(*given, positions.cuda())
    moved = torch.autograd.grad(found, given, [c.to("cuda", dtype) for c in cotangents])
    # Angles of float32 at position 709 are off by up to 3e-5.
    tolerance = max(2e-4, 1.2 * TOLERANCE[dtype])
    for ours, theirs in zip([*found, *moved], [*true, *gradients], strict=True):
        assert_close(ours.cpu().double(), theirs.double(), rtol=tolerance, atol=2 * tolerance)


def test_a_compiler_takes_the_kernel_and_an_exporter_the_formula(monkeypatch):
    x, cos, sin = drawn(*CASES[0])
    graphs = []

    def kept(graph, _):
        graphs.append(str(graph.graph))
        return make_boxed_func(graph)

    monkeypatch.setattr(module, "served", lambda x, cos: True)  # as on a GPU
    compiled = torch.compile(turn, fullgraph=True, backend=aot_autograd(fw_compiler=kept))
    for length in (33, 34, 35):  # the second compilation is for every length
        x, cos, sin = drawn(2, 3, length, 16, 8, True)
        x.requires_grad_()
        cotangent = torch.randn_like(x)
        found = compiled(x, cos, sin)
        assert_close(found.double(), exact(x, cos, sin), rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(found, x, cotangent)
        (true,) = torch.autograd.grad(exact(x, cos, sin), x, cotangent.double())
        assert_close(gradient, true.float(), rtol=1e-6, atol=1e-6)
    assert len(graphs) == 4 and all("dape.turn" in graph for graph in graphs)
    x, cos, sin = drawn(2, 3, 1, 16, 8, True)
    assert_close(compiled(x, cos, sin).double(), exact(x, cos, sin), rtol=1e-6, atol=1e-6)
    assert "dape.turn" not in graphs.pop(), "a step of decoding"
    exported = torch.export.export(Turned(), (x.detach(), cos, sin))
    assert "dape" not in str(exported.graph) and "mul" in str(exported.graph)


class Turned(torch.nn.Module):
    def forward(self, x, cos, sin):
        return turn(x, cos, sin)


def test_the_operator_keeps_its_promises_to_pytorch():
    for case in CASES[:4]:
        x, cos, sin = drawn(*case)
        for given in (x, x.contiguous(), x.mT.contiguous().mT):
            given = given.detach().requires_grad_()
            torch.library.opcheck(module.operator, (given, cos, sin, -1.0))


@pytest.mark.parametrize("by", ["vmap", "grad", "jvp"])
def test_transforms_of_compiled_code_read_the_formula(by, monkeypatch):
    monkeypatch.setattr(module, "served", lambda x, cos: True)
    x, cos, sin = drawn(*CASES[1])
    each = torch.stack([x, 2 * x, x + 1])

    def loss(turn):
        return lambda x: turn(x, cos, sin).pow(3).sum()

    def transformed(turn):
        return {
            "vmap": torch.vmap(lambda x: turn(x, cos, sin)),
            "grad": torch.vmap(torch.func.grad(loss(turn))),
            "jvp": lambda each: torch.func.jvp(loss(turn), (each[0] + 1,), (each[1] + 1,))[1],
        }[by]

    compiled = torch.compile(transformed(turn), backend="aot_eager")
    assert_close(compiled(each).double(), transformed(exact)(each.double()), rtol=1e-5, atol=1e-4)
