"""How much a call starts on the device: the host's time for a short one is that of its launches."""

import pytest
import torch
from launches import of_a_call

import dape

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
    "dape-kerple": (lambda: (dape.Kerple(4), dape.DAPE(4)), 6, 29),
    "dape-alibi": (lambda: (dape.ALiBi(4), dape.DAPE(4)), 6, 29),
    "dape-t5": (lambda: (dape.T5(4), dape.DAPE(4)), 6, 29),
    "fire": (lambda: (dape.FIRE(4), None), 10, 40),
    "dape-fire": (lambda: (dape.FIRE(4), dape.DAPE(4)), 11, 49),
    "dape3-kerple": (lambda: (dape.Kerple(4), dape.DAPE(4, kernel_size=3)), 13, 56),
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
