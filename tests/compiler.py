"""PyTorch's compiler without work for messages alone: it compiles the same."""

from traceback import StackSummary, walk_stack

from torch._dynamo import config, exc, guards


def quicken():
    """Let it leave out what no graph depends on.

    It times no guards, and looks for no columns in the stack above a graph and for no garbage after
    each graph.
    """
    guards.profile_guard_manager = lambda *_: 0.0
    exc._extract_stack_with_positions = _stack
    config.run_gc_after_compile = False


def _stack():
    """Return the frames above, the oldest first."""
    found = StackSummary.extract(walk_stack(None), lookup_lines=False)
    found.reverse()
    return found
