"""PyTorch's compiler without work for messages alone: it compiles the same."""

from traceback import StackSummary, walk_stack

from torch._dynamo import exc, guards


def quicken():
    """Let it neither time the guards of a graph nor look for columns in the stack above it."""
    guards.profile_guard_manager = lambda *_: 0.0
    exc._extract_stack_with_positions = _stack


def _stack():
    """Return the frames above, the oldest first."""
    found = StackSummary.extract(walk_stack(None), lookup_lines=False)
    found.reverse()
    return found
