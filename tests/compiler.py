"""PyTorch's compiler without work for messages and checks alone: it compiles the same."""

from traceback import StackSummary, walk_stack

import torch
from torch._dynamo import config, exc, guards
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import recording
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def quicken():
    """Let it leave out what no graph depends on.

    It times no guards, looks for no columns in the stack above a graph and for no garbage after
    each, notes no question about a size, and checks its memory of results once for each kind.
    """
    guards.profile_guard_manager = lambda *_: 0.0
    exc._extract_stack_with_positions = _stack
    config.run_gc_after_compile = False
    for name, method in list(vars(ShapeEnv).items()):
        if getattr(method, "__globals__", None) is vars(recording):
            setattr(ShapeEnv, name, method.__wrapped__)
    _remember_kinds()


def _stack():
    """Return the frames above, the oldest first."""
    found = StackSummary.extract(walk_stack(None), lookup_lines=False)
    found.reverse()
    return found


def _remember_kinds():
    """Compare the dispatch keys of a result and of what a note of it makes once for each kind."""
    noted = FakeTensorMode._get_output_info_for_cache_entry
    made = FakeTensorMode._output_from_cache_entry
    results, equal = [], set()

    def note(mode, *given):
        results.append(given[-1])
        try:
            return noted(mode, *given)
        finally:
            results.clear()

    def make(mode, *given):
        if not results:
            return made(mode, *given)
        result, func = results.pop(), given[3]
        keys = torch._C._dispatch_key_set(result)
        kind = (
            *(keys, result.device, result.dtype, result.layout, result.requires_grad),
            *(result.is_conj(), result.is_neg(), torch.is_inference_mode_enabled()),
            getattr(func, "is_view", False),
        )
        if kind in equal:
            return result
        again = made(mode, *given)
        if torch._C._dispatch_key_set(again) == keys:
            equal.add(kind)
        return again

    FakeTensorMode._get_output_info_for_cache_entry = note
    FakeTensorMode._output_from_cache_entry = make
