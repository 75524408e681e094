"""The check that new adapters leave a model unchanged, attention by attention.

A model in 16 bits may be sensitive, and two ways to round give different logits. Therefore the
check compares every attention alone, on the hidden states from a forward pass of the model's own
code.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from dape.errors import UserError
from dape.model.retrofit.survey import call, implementation

OWN = "dape_own"
STATES = "hidden_states"  # the first argument of an attention in every model of transformers
States = Mapping[nn.Module, Tensor]


def own(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend by the eager code of a module, in float32 if the code would round scores."""
    names = inspect.unwrap(type(module).forward).__globals__
    eager = names.get("eager_attention_forward", sdpa_attention_forward)
    wide = torch.promote_types(query.dtype, torch.float32)
    query_key_value = (x.to(wide) for x in (query, key, value))
    mask = None if attention_mask is None else attention_mask.to(wide)
    out, weights = eager(module, *query_key_value, mask, **more)
    return out.to(query.dtype), weights


def own_states(model: PreTrainedModel, modules: Sequence[nn.Module]) -> tuple[States, States]:
    """Return inputs and outputs of all attentions, by the model's own code.

    Eager code is complete, where PyTorch's attention has no cap of the scores. Falcon is the
    exception. The eager code adds ALiBi twice, and the SDPA code once, as in training.
    """
    with implementation(model, "sdpa" if model.config.model_type == "falcon" else OWN):
        return states(model, modules)


def states(
    model: PreTrainedModel, modules: Sequence[nn.Module], given: States | None = None
) -> tuple[States, States]:
    """Return inputs and outputs of all attentions; inputs are `given`, if any."""
    into: dict[nn.Module, Tensor] = {}
    out: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = kwargs[STATES] if STATES in kwargs else args[0]
        into[module] = first if given is None else given[module]
        if STATES in kwargs:
            return args, {**kwargs, STATES: into[module]}
        return (into[module], *args[1:]), kwargs

    def after(module: nn.Module, _: Any, found: Any) -> None:
        out[module] = found[0] if isinstance(found, tuple) else found

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(after).remove)
        call(model)
    return into, out


def check_unchanged(model: PreTrainedModel, own: tuple[States, States]) -> None:
    """Compare the outputs of all attentions with the model's own code, up to rounding.

    Raises:
        UserError: for an attention with different outputs.
    """
    into, expected = own
    _, found = states(model, list(into), into)
    for module, value in expected.items():
        tolerance = max(1e-5, torch.finfo(value.dtype).eps ** 0.5)
        difference, largest = (x.abs().max().item() for x in (found[module] - value, value))
        if not difference <= tolerance * largest:
            raise UserError(
                f"{type(model).__name__} cannot be retrofitted: with an adapter without "
                f"effect the output of {type(module).__name__} differs by {difference:.2g} from "
                f"outputs up to {largest:.2g}: attention is more than softmax(scale q k^T + "
                "mask) v"
            )


AttentionInterface.register(OWN, own)
AttentionMaskInterface.register(OWN, eager_mask)
