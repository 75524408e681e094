"""How much a call starts on the device: the host's time for a short one is that of its launches."""

from math import prod

import pytest
import torch
from launches import of_a_call

import dape
from dape.attention.fused import operator, plan
from dape.attention.fused.sizes import WIDE_PROGRAMS

pytestmark = [
    pytest.mark.unhooked,
    pytest.mark.skipif(torch.cuda.is_available(), reason="counted with Triton's interpreter"),
]
# Bias, adapter, and the most launches of a forward pass without gradients and of both passes.
MOST = {
    "nope": (lambda: (None, None), 1, 5),
    "alibi": (lambda: (dape.ALiBi(4), None), 2, 6),
    "kerple": (lambda: (dape.Kerple(4), None), 2, 8),
    "kerple-power": (lambda: (dape.KerplePower(4), None), 2, 8),
    "t5": (lambda: (dape.T5(4), None), 2, 10),
    "dape-kerple": (lambda: (dape.Kerple(4), dape.DAPE(4)), 8, 23),
    "dape-alibi": (lambda: (dape.ALiBi(4), dape.DAPE(4)), 8, 23),
    "dape-t5": (lambda: (dape.T5(4), dape.DAPE(4)), 8, 23),
    "fire": (lambda: (dape.FIRE(4), None), 10, 28),
    "dape-fire": (lambda: (dape.FIRE(4), dape.DAPE(4)), 11, 31),
    "dape3-kerple": (lambda: (dape.Kerple(4), dape.DAPE(4, kernel_size=3)), 11, 35),
}


@pytest.mark.parametrize("name", MOST)
def test_a_call_starts_no_more_than_so_much(name):
    modules, *most = MOST[name]
    bias, adapter = modules()
    tensors = [torch.randn(1, 4, 64, 16).half().requires_grad_() for _ in range(3)]
    parameters = [p for m in (bias, adapter) if m is not None for p in m.parameters()]

    def attend():
        return dape.attention(*tensors, bias, adapter, backend="triton")

    with torch.no_grad():
        forward = of_a_call(attend, tensors, parameters, backward=False)
    both = of_a_call(attend, tensors, parameters)
    assert forward.total() <= most[0], forward
    assert both.total() <= most[1], both
    assert both.total() > forward.total() > 0


def noted(*shapes):
    """Return the kernels of a backward pass of DAPE as (name, options, number of programs)."""
    query, *tables = (torch.empty(shape, device="meta") for shape in shapes)
    query = query.half()
    recorder = plan._Recorder()
    with pytest.MonkeyPatch.context() as patch, recorder:
        patch.setattr(plan._current, "recorder", recorder)
        how = 1.0, True, 0, (0, 0), "triton", True
        found = operator._solved((query, query, query, None, None, *tables), *how)
        given = query, query, query, None, None, *found, found.out, None, *tables
        recorder.noted.clear()
        operator._gradients(given, *how)
    return [
        (kernel.__name__, arguments[kernel.arg_names.index("GATED")], prod(grid))
        for kernel, grid, arguments, _ in recorder.noted
        if "GATED" in kernel.arg_names
    ]


def test_kernels_of_a_wide_way_that_does_not_run_have_few_programs():
    heads, length, units = 12, 8192, 32
    kernels = noted(
        (1, heads, length, 64), (heads, length), (length, units), (units, heads), (heads, units)
    )
    narrow, wide = ([x for x in kernels if x[1] == gated] for gated in (0, 1))
    assert len(wide) > len(narrow) > 10
    assert sum(number for *_, number in wide) <= 13_100
    walking = [x for x in wide if x[0].startswith(("scores", "grad_", "balance"))]
    assert len(walking) >= 16 and all(number <= 2 * WIDE_PROGRAMS for *_, number in walking)


@pytest.mark.parametrize(("bias", "most"), [(dape.Kerple, 2), (dape.T5, 2), (dape.FIRE, 5)])
def test_a_step_of_decoding_starts_no_more_than_so_much(bias, most):
    tensors = [torch.randn(1, 4, length, 16).half() for length in (1, 300, 300)]
    parts = bias(4), dape.DAPE(4)

    def attend():
        return dape.attention(*tensors, *parts, query_offset=299, backend="triton")

    with torch.no_grad():
        found = of_a_call(attend, tensors, [], backward=False)
    assert found["decode_kernel"] == found["combine_kernel"] == 1
    assert found.total() <= most, found
