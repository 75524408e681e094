"""Hooks before the forward of a retrofitted model and of its attentions."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from dape.errors import UserError
from dape.model.blocks import in_use
from dape.model.retrofit import asked
from dape.model.retrofit.interface import NAME


def before_each(undo: ExitStack, modules: Sequence[nn.Module], hook: Callable[..., None]) -> None:
    """Call `hook(module, arguments)` before every forward of the modules, until undone."""
    for module in modules:
        undo.callback(module.register_forward_pre_hook(hook).remove)


def around(undo: ExitStack, model: nn.Module, own_bias: bool) -> None:
    """Keep what a call of the model, or of a part, asks of every attention, until undone.

    RoBERTa's family counts positions from the number after that of padding.
    """
    counting = (x for x in model.modules() if hasattr(x, "create_position_ids_from_input_ids"))
    first = next((cast(int, each.padding_idx) + 1 for each in counting), 0)
    joins = joining(cast(PreTrainedModel, model).config.get_text_config())
    # Numbers, because DataParallel calls copies of the parts.
    parts = (each for each in model.modules() if isinstance(each, PreTrainedModel))
    for number, each in enumerate(parts):
        whose = id(model), number
        keep = partial(asked.keep, whose, own_bias, joins, first)
        forget = partial(asked.forget, whose)
        undo.callback(each.register_forward_pre_hook(keep, with_kwargs=True).remove)
        undo.callback(each.register_forward_hook(forget, always_call=True).remove)


def joining(config: PreTrainedConfig) -> tuple[str, int] | None:
    """Return why a model joins packed documents, and the longest row that keeps them apart."""
    if has_recurrence(config):
        reason = "has recurrent layers, which carry a state from each document packed in a row into"
        return f"{reason} the next", 0
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # Llama 4
        chunk: int = config.attention_chunk_size
        return (
            f"attends within chunks of {chunk} tokens, counted over all documents of a row",
            chunk,
        )
    return None


def has_recurrence(config: PreTrainedConfig) -> bool:
    """Return whether layers carry a state from token to token, beside or in place of attention.

    RecurrentGemma keeps states in the layers, and other models in the cache.
    """
    kinds = getattr(config, "layers_block_type", None) or ()
    layers = DynamicCache(config=config).layers
    return "recurrent" in kinds or any(hasattr(each, "update_recurrent_state") for each in layers)


def refuse_another(config: PreTrainedConfig, *_: Any) -> None:
    """Raise a `UserError` if an attention is about to leave out the adapter."""
    found = config._attn_implementation
    if found != NAME:
        raise UserError(
            f"attn_implementation={found!r} would leave out the mounted adapters; call "
            f"set_attn_implementation({NAME!r}), or unmount the adapters first"
        )


def warn_if_frozen(module: nn.Module, _: Any) -> None:
    """Warn in training about a frozen adapter that was mounted to train, as left by PEFT."""
    parameters = list(in_use(module.adapter).parameters())
    if _trains(module) and parameters and not any(each.requires_grad for each in parameters):
        warnings.warn(
            "the mounted adapters do not train: their parameters are frozen, as get_peft_model "
            "leaves them; say LoraConfig(modules_to_save=['adapter', 'position_bias']), or "
            "mounted.adapters.requires_grad_(True) after it",
            stacklevel=2,
        )


def warn_if_unsaved(model: nn.Module, _: Any) -> None:
    """Warn in training about adapters that train beside PEFT, whose folders leave them out."""
    beside = hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)
    if not (beside and _trains(model)):
        return
    modules, _ = model.retrofitted  # type: ignore[misc]
    own = [each.adapter for each in modules if not hasattr(each.adapter, "modules_to_save")]
    if any(each.requires_grad for part in own for each in part.parameters()):
        warnings.warn(
            "PEFT's folders, and the Trainer's checkpoints of a PEFT model, leave out the mounted "
            "adapters: say LoraConfig(modules_to_save=['adapter', 'position_bias']), or call "
            "mounted.save yourself",
            stacklevel=2,
        )


def _trains(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
