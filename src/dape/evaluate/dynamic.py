"""Dynamic RoPE of transformers, whose frequencies are those of the longest text read before."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_LONGEST = "max_seq_len_cached"  # with the type of a layer in front, if types differ


@contextmanager
def without_history(network: nn.Module) -> Iterator[nn.Module]:
    """Yield a model whose every pass has the frequencies of its own length.

    A model of transformers keeps the frequencies of the longest text until a text is shorter than
    the training length. Losses of a length would depend on the lengths measured before.
    """
    with ExitStack() as hooks:
        for module in filter(_is_dynamic, network.modules()):
            hooks.callback(module.register_forward_pre_hook(_forget).remove)
        yield network


def _is_dynamic(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    each = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any("dynamic" in str(kind) for kind in each)


def _forget(module: nn.Module, _: Any) -> None:
    """Let any length count as growth, at which transformers computes frequencies anew."""
    for name in [name for name in vars(module) if name.endswith(_LONGEST)]:
        setattr(module, name, 0)
