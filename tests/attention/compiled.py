"""Compile Triton kernels that a call of attention starts for a GPU that need not be there.

    python compiled.py '{"heads": 5, "kv_heads": 1, "head_dim": 128, "hidden": 48}' ...

Prints a line of JSON for each call: the bytes of shared memory of its kernels by name. `kernels`
names the kernels to compile, all by default. Fails for a kernel that reads or writes memory before
it waits for the kernel before, and for machine code that multiplies other numbers than its PTX.
"""

import json
import os
import sys
from importlib import import_module
from pkgutil import walk_packages

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import dape
import dape.attention.fused
from dape.attention.fused import geometry, passes, serves

HOPPER = GPUTarget("cuda", 90, 32)
CHAINED = {"CHAINED": True, "launch_pdl": True}  # as on Hopper
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]


def shared_memory(kernel, args, options):
    """Return the bytes of shared memory of a kernel started with such arguments."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False)) | {n: v for n, v in options.items() if n in names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize
        signature[name] = "constexpr"
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and special)
        ):
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(place,)] = ALIGNED
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and special:
                attributes[(place,)] = ALIGNED
        else:
            signature[name] = "fp32"
    own = {name: value for name, value in options.items() if name not in names}
    source = ASTSource(kernel, signature, constants, attributes)
    found = triton.compile(source, target=HOPPER, options=own)
    if CHAINED.items() <= options.items():
        before = found.asm["ptx"].partition("griddepcontrol.wait")[0]
        assert before != found.asm["ptx"], f"{kernel.__name__} never waits"
        assert ".global." not in before, f"{kernel.__name__} reads or writes before it waits"
    assert not machine_code.wrong(found)[1], f"{kernel.__name__} multiplies other numbers"
    return found.metadata.shared


def call(
    heads, kv_heads, head_dim, hidden, rows=40, keys=40, bias="Kerple", dtype="float16", taps=1,
    gradients=True, mapped=False, room=geometry.SCORES_PER_BAND, cut=False,
    most_bands=passes.MOST_BANDS,
):  # fmt: skip
    """Run attention, or a map across heads, and its gradients; kernels are only noted.

    `room` is the most scores of a band. With more than `most_bands` bands the wide way of a forward
    pass is the kernel of decoding. Rows of tensors that are `cut` out begin anywhere.
    """
    torch.set_grad_enabled(gradients)
    geometry.SCORES_PER_BAND, passes.MOST_BANDS = room, most_bands
    if mapped:
        from dape.chomsky.heads import mapped as map_heads

        weights = dict(dape.DAPE(heads, hidden, kernel_size=taps).named_parameters())
        scores = torch.zeros(1, heads, rows, keys, requires_grad=True)
        map_heads(scores, scores[0].detach(), **weights).sum().backward()
        return
    query, key, value = (
        torch.zeros(1, n, length, head_dim + 3 * cut, dtype=getattr(torch, dtype))
        for n, length in ((heads, rows), (kv_heads, keys), (kv_heads, keys))
    )
    query, key, value = (x[..., 3 * cut :].requires_grad_() for x in (query, key, value))
    adapter = dape.DAPE(heads, hidden, kernel_size=taps) if hidden else None
    parts = getattr(dape, bias)(heads), adapter
    out = dape.attention(query, key, value, *parts, query_offset=keys - rows, backend="triton")
    if gradients:
        out.sum().backward()


def main(*calls):
    """Print the shared memory of the kernels of each call."""
    for module in walk_packages(dape.attention.fused.__path__, "dape.attention.fused."):
        import_module(module.name)
    import_module("dape.chomsky.heads_kernels")
    os.environ["TRITON_INTERPRET"] = "1"  # the backend serves a CPU; kernels are Triton's own
    serves.obstacle = lambda call: None  # bfloat16 too, which the interpreter cannot multiply
    started = []
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: started.append((kernel, args, options))
    )
    for text in calls:
        started.clear()
        given = json.loads(text)
        names = given.pop("kernels", None)
        call(**given)
        found: dict[str, list[int]] = {}
        for kernel, args, options in started:
            if names is None or kernel.__name__ in names:
                options = options | (CHAINED if "CHAINED" in options else {})
                sizes = found.setdefault(kernel.__name__, [])
                sizes.append(shared_memory(kernel, args, options))
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
