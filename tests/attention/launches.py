"""What a call starts on the device, counted on a CPU: kernels of Triton, PyTorch's operations."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

# Operations that give memory or look at it another way: a GPU runs nothing for them.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "as_strided",
    "reshape", "expand", "permute", "transpose", "t", "select", "slice", "unsqueeze", "squeeze",
    "unflatten", "flatten", "split", "split_with_sizes", "unbind", "detach", "alias", "narrow",
    "result_type", "promote_types", "resize_", "to", "contiguous", "lift_fresh", "chunk",
    "resolve_conj", "resolve_neg", "_reshape_alias", "is_same_size",
}  # fmt: skip


@contextmanager
def counted():
    """Count launches by name, in a `Counter` filled at the end. No kernel of Triton runs."""
    from triton.runtime import interpreter

    found = Counter()

    def start(self, *args, **kwargs):
        found[self.fn.__name__] += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", start)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            yield found
    for event in recorded.events():
        name = event.name.removeprefix("aten::")
        if event.name != name and not event.cpu_children and name not in FREE:
            found[name] += 1


def of_a_call(attend, tensors, parameters, backward=True):
    """Return the launches of a forward and, if asked for, a backward pass, once warm."""
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=tensors[2].dtype)

    def run():
        out = attend()
        if backward:
            torch.autograd.grad(out, [*tensors, *parameters], grad)

    with counted():
        run()
    with counted() as found:
        run()
    return found
