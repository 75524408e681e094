"""A kernel of a known key starts without Triton's look at it; any other goes to Triton."""

import random
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from dape.jit import Started, kind, started


class Recorded:
    """Stands for Triton's kernel: it notes what it compiled, and each start of a compiled one."""

    def __init__(self, **parameters):
        self.params = [
            SimpleNamespace(name=name, is_constexpr=constant, default=8, has_default=name == "LAST")
            for name, constant in parameters.items()
        ]
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def compile_and_start(*args, **options):
            self.compiled.append((grid, args, options))
            return self

        return compile_and_start if len(grid) < 3 else lambda *args: self.started.append(args)


PARAMETERS = {"x": False, "size": False, "scale": False, "ROWS": True, "LAST": True}


def test_a_known_kernel_gets_all_arguments_in_the_order_of_its_signature():
    kernel = Recorded(**PARAMETERS)
    ours = Started(kernel, device=lambda: 0)
    x, y = torch.zeros(8), torch.zeros(16)
    ours[(4, 2)](x, 32, 0.5, ROWS=16, num_warps=4)
    ours[(5, 2)](y, size=48, scale=1.5, ROWS=16, num_warps=4)
    ours[(5, 2)](y, 64, 2.5, ROWS=16, num_warps=4)
    assert len(kernel.compiled) == 2  # arguments by name make a key of their own
    (started,) = kernel.started
    assert started[0] is y and started[1:] == (64, 2.5, 16, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(8, dtype=torch.bfloat16)},
        {"x": torch.zeros(9)[1:]},
        {"size": 33},
        {"size": 1},
        {"size": 2**31},
        {"size": -(2**40)},
        {"scale": 1},
        {"scale": None},
        {"ROWS": 32},
        {"ROWS": True},
        {"num_warps": 8},
        {"num_stages": 3},
    ],
)
def test_all_that_triton_compiles_for_is_in_the_key(change):
    kernel = Recorded(**PARAMETERS)
    ours = Started(kernel, device=lambda: 0)
    given = {"x": torch.zeros(8), "size": 32, "scale": 0.5, "ROWS": 16, "num_warps": 4}
    for options in (given, given, given | change, given | change):
        ours[(1,)](**options)
    assert len(kernel.compiled) == 2 and len(kernel.started) == 2


def test_a_second_device_compiles_for_itself():
    kernel, devices = Recorded(**PARAMETERS), iter([0, 1, 0, 1])
    ours = Started(kernel, device=lambda: next(devices))
    for _ in range(4):
        ours[(1,)](torch.zeros(8), 32, 0.5, 16)
    assert len(kernel.compiled) == 2 and len(kernel.started) == 2


def triton_s_kind(value):
    """Return the class of an integer by Triton's rules: 32, 64 or unsigned 64 bits; 1; 16 | n."""
    width = next(
        name
        for name, low, high in (
            ("i32", -(2**31), 2**31),
            ("i64", -(2**63), 2**63),
            ("u64", 0, 2**64),
        )
        if low <= value < high
    )
    return width, value == 1, value % 16 == 0


def test_integers_of_one_kind_are_of_one_kind_to_triton():
    random.seed(0)
    edges = [s * 2**p + d for p in (0, 4, 31, 32, 63) for s in (1, -1) for d in (-1, 0, 1)]
    drawn = [random.getrandbits(random.randint(1, 63)) * random.choice((1, -1)) for _ in range(500)]
    values = [v for v in (*edges, *drawn) if -(2**63) <= v < 2**64]
    classes = {}
    for value in values:
        assert classes.setdefault(kind(value, True), triton_s_kind(value)) == triton_s_kind(value)


def test_the_interpreter_keeps_its_own():
    if not torch.cuda.is_available():
        assert type(add_kernel).__name__ == "InterpretedFunction"


@started
@triton.jit
def add_kernel(x, out, size, step, BLOCK: tl.constexpr):
    """Write x plus a step."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + where, tl.load(x + where, where < size) + step, where < size)


@pytest.mark.gpu
def test_on_a_gpu_every_start_is_right():
    random.seed(1)
    for _ in range(200):
        size, start, block = random.randint(1, 70), random.randint(0, 5), random.choice((16, 64))
        step = random.choice((1, 2, 16, 2.5))
        dtype = random.choice((torch.float32, torch.float16))
        x = torch.randn(80, device="cuda").to(dtype)[start : start + size]
        out = torch.full((96,), torch.nan, device="cuda", dtype=dtype)
        add_kernel[(triton.cdiv(size, block),)](x, out[start:], size, step, BLOCK=block)
        assert torch.equal(out[start : start + size], x + step)
        assert out.isnan().sum() == 96 - size
    assert 8 < len(add_kernel.compiled) < 64
