"""The attention modules of a pretrained model, found by a short forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from dape.errors import UserError, first_line
from dape.model.blocks import DapeAttention
from dape.model.retrofit.architectures import architecture_of
from dape.model.retrofit.interface import layer_mask

SURVEY = "dape_survey"
# Tensors given to an attention beyond softmax(scale q k^T + mask) v.
BEYOND = {"s_aux": "attention sinks", "position_bias": "a separate bias"}
TOKENS = 8


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention module of a pretrained model.

    Attributes:
        module: the module.
        num_heads: number of query heads.
        head_dim: width of a head.
        device: device of the computation, also for weights offloaded to disk.
        bias: bias of the model, such as ALiBi.
        forward: replacement of the module's `forward`, if the attention interface is not enough.
    """

    module: nn.Module
    num_heads: int
    head_dim: int
    device: torch.device
    bias: nn.Module | None = None
    forward: Callable[..., Any] | None = None


_found: ContextVar[dict[nn.Module, Attention]] = ContextVar("found")


def attentions(model: PreTrainedModel) -> list[Attention]:
    """Return the attention modules of a model, in the order of the calls.

    Raises:
        UserError: if no attention is supported, with the reason.
    """
    ours = [module for module in model.modules() if isinstance(module, DapeAttention)]
    if ours:
        heads = model.config.num_attention_heads
        return [
            Attention(each, heads, each.head_dim, device_of(each), each.position_bias)
            for each in ours
        ]
    known = [(each, own) for each in model.modules() if (own := architecture_of(each))]
    if known:
        return [
            Attention(
                module,
                getattr(module, own.heads),
                module.head_dim,
                device_of(module),
                own.bias(module),
                own.forward,
            )
            for module, own in known
        ]
    return surveyed(model)


def surveyed(model: PreTrainedModel) -> list[Attention]:
    """Return the modules that call transformers' attention interface."""
    token = _found.set({})
    try:
        with implementation(model, SURVEY):
            call(model)
        found = list(_found.get().values())
    except UserError:
        raise
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{type(model).__name__} cannot be retrofitted: {reason(model)}") from error
    finally:
        _found.reset(token)
    if not found:
        raise UserError(
            f"{type(model).__name__} cannot be retrofitted: attention does not go through the "
            "attention interface of transformers (ALL_ATTENTION_FUNCTIONS)"
        )
    return found


def reason(model: PreTrainedModel) -> str:
    """Return why a survey failed, by a call of the model's own code."""
    try:
        call(model)
    except (AttributeError, TypeError, IndexError, ValueError) as error:
        return f"a call with tokens alone ends in {type(error).__name__}: {first_line(error)}"
    return (
        "the model's code computes attention outside the attention interface of transformers "
        "(ALL_ATTENTION_FUNCTIONS), or reads the mask, as to choose keys"
    )


def record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """Record an attention, and return zeros in place of the output.

    Raises:
        UserError: for an unsupported attention.
    """
    name = type(module).__name__
    for key_word, given in more.items():
        # Models such as MiniMax M3 leave out keys by a tensor that has no effect in short texts.
        if isinstance(given, Tensor) and key_word != "position_ids":
            meaning = BEYOND.get(key_word, "a further tensor")
            raise UserError(f"{name} cannot be retrofitted: attention with {meaning} ({key_word})")
    if not getattr(module, "is_causal", True):
        raise UserError(f"{name} cannot be retrofitted: attention is not causal")
    _found.get()[module] = Attention(module, query.shape[1], query.shape[3], query.device)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let the model attend by the registered function `name`."""
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's computation, from the weights or from Accelerate."""
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    for each in module.modules():
        device = getattr(getattr(each, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("cpu")


@torch.no_grad()
def call(model: PreTrainedModel) -> Tensor:
    """Return the first output of the model for a few tokens, usually the logits."""
    training = [module for module in model.modules() if module.training]
    embeddings = model.get_input_embeddings()
    places = torch.arange(1, TOKENS + 1, device=device_of(embeddings))[None]
    tokens = places % embeddings.weight.shape[0]
    try:
        # Moshi in its own code sees later tokens without a mask.
        mask = torch.ones_like(tokens)
        return model.eval()(input_ids=tokens, attention_mask=mask, use_cache=False)[0]
    finally:
        for module in training:
            module.training = True


AttentionInterface.register(SURVEY, record)
AttentionMaskInterface.register(SURVEY, layer_mask)
