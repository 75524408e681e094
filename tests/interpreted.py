"""A kernel of every operator that kernels use, by Triton's interpreter.

    TRITON_INTERPRET=1 python interpreted.py SEED

Prints the numbers of the operators as JSON, computed by the interpreter as it is.
"""

import json
import sys

import torch
import triton
import triton.language as tl

SIZE, MOST = 16, 64


@triton.jit
def all_operators(f, h, i, j, out, whole, N: tl.constexpr):
    """Store floats and integers of N elements, a line for each operator or few of them."""
    n = tl.arange(0, N)
    a, b, x, y = tl.load(f + n), tl.load(f + N + n), tl.load(h + n), tl.load(h + N + n)
    p, q, wide = tl.load(i + n), tl.load(i + N + n), tl.load(j + n)
    tl.store(out + n, a + b)
    out += N
    tl.store(out + n, a - 2.0 * b + 1)
    out += N
    tl.store(out + n, 1 / a + a / b + b / 3)
    out += N
    tl.store(out + n, 2 - a - x)
    out += N
    tl.store(out + n, (x * y + x - y * 3).to(tl.float32))
    out += N
    tl.store(out + n, (0.1 * x + y).to(tl.float32) * -a)
    out += N
    tl.store(out + n, a.to(tl.float16).to(tl.float32) + p.to(tl.float32) + (p < q).to(tl.float32))
    out += N
    tl.store(out + n, tl.maximum(a, b))
    out += N
    tl.store(out + n, tl.minimum(1.0, a))
    out += N
    tl.store(out + n, tl.where((a < b) & (p >= q) | (a != a), a, float("-inf")))
    out += N
    tl.store(out + n, tl.where(x <= 0, 1.0, b) + tl.where(p == 3, b, 0.0))
    out += N
    tl.store(out + n, tl.load(f + n, (n % 3 > 0) & (n < N - 2), 7.0) + tl.load(f + n, n > 4, 0.0))
    out += N
    tl.store(out + n, tl.load(f + 9 + (n - 8)) - tl.load(f + N + (4 - n.to(tl.int64))))
    out += N
    matrix = tl.load(f + n[:, None] * 2 + n[None, :])
    half = tl.load(h + (n[:, None] + n[None, :]), (n < 9)[None, :], 0.0)
    tl.store(out + n, tl.sum(tl.dot(matrix, tl.trans(matrix), input_precision="ieee"), 0))
    out += N
    found = tl.dot(half, half, matrix) + tl.dot(half, half) * (n[:, None] + 0.5)
    tl.store(out + n, tl.max(found, 1))
    out += N
    tl.store(out + n, tl.sum(matrix * a[:, None] + b[None, :] - half, 1), n != 5)
    tl.store(whole + n, p + q * 2 - 7)
    whole += N
    tl.store(whole + n, p // q + p % q + q // 3 + p % 5)
    whole += N
    tl.store(whole + n, wide * p + q + (p & q) - (q | 6))
    whole += N
    tl.store(whole + n, 9 - p + tl.minimum(p, q) + tl.where(p > q, p, 2) + (wide > q).to(tl.int32))
    whole += N
    tl.store(whole + n, wide // 7 + n.to(tl.int64) * 3 + tl.cdiv(n, 4))


def numbers(seed):
    """Return what the operators make of random numbers, as bits."""
    draw = torch.Generator().manual_seed(seed)
    floats = torch.randn(4 * SIZE, generator=draw)
    floats[2], floats[9], floats[20] = float("nan"), float("inf"), -0.0
    halves = torch.randn(2 * SIZE, generator=draw).half()
    signs = 2 * torch.randint(2, (2 * SIZE,), generator=draw) - 1
    integers = (torch.randint(1, MOST, (2 * SIZE,), generator=draw) * signs).int()
    wide = torch.randint(-(2**40), 2**40, (SIZE,), generator=draw)
    out, whole = torch.zeros(16 * SIZE), torch.zeros(5 * SIZE, dtype=torch.int64)
    all_operators[(1,)](floats, halves, integers, wide, out, whole, N=SIZE)
    return out.view(torch.int32).tolist(), whole.tolist()


if __name__ == "__main__":
    print(json.dumps(numbers(int(sys.argv[1]))))
