"""Adapters into the attentions of a pretrained model, and out again."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from dape.attention.select import check_backend
from dape.errors import UserError, unknown
from dape.model.arguments import check_goes_on, refuse_pages
from dape.model.base import DapePreTrainedModel
from dape.model.blocks import in_use
from dape.model.retrofit.choice import Choice, Factory
from dape.model.retrofit.hooks import (
    around,
    before_each,
    refuse_another,
    warn_if_frozen,
    warn_if_unsaved,
)
from dape.model.retrofit.interface import NAME
from dape.model.retrofit.storage import write
from dape.model.retrofit.survey import Attention, attentions
from dape.model.retrofit.unchanged import check_unchanged, own_states

ADAPTERS, ALL = "adapters", "all"
# Names of the training length in configurations.
TRAIN_LENGTH = ("train_length", "max_position_embeddings")


@dataclass(frozen=True, slots=True, eq=False)
class Mounted:
    """A pretrained model with mounted adapters.

    Attributes:
        model: the pretrained model, used as before.
        attentions: the attention modules, in order.
        choice: adapter and bias of the attention modules.
        train: names of the trainable parts.
        parts: trainable parameters of the model, by name.
    """

    model: PreTrainedModel
    attentions: tuple[nn.Module, ...]
    choice: Choice
    train: tuple[str, ...]
    parts: dict[str, nn.Parameter]
    _undo: ExitStack

    @property
    def adapters(self) -> nn.ModuleList:
        """The `adapter` of each attention, in order, and the `position_bias` if new.

        Raises:
            UserError: after `unmount`.
        """
        if getattr(self.model, "retrofitted", (None,))[0] is not self.attentions:
            raise UserError("the adapters are unmounted; save or read adapters before unmount()")
        return mounted_in(self.attentions, self.choice)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the adapters and of the trainable parts, by name."""
        parts = {f"part.{name}": part.detach() for name, part in self.parts.items()}
        return {**self.adapters.state_dict(), **parts}

    def save(self, folder: str | Path) -> None:
        """Write `adapters.safetensors` and `adapters.json` for `dape.load_adapters`.

        Args:
            folder: folder to write.
        """
        write(Path(folder), self.model.config, self.choice, self.train, self.state())

    def unmount(self) -> None:
        """Restore the model to the bit, trained parts included."""
        self._undo.close()


def retrofit(
    model: nn.Module,
    adapter: Factory = "dape",
    bias: Factory | None = None,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    train: str | Sequence[str] = ADAPTERS,
    backend: str = "auto",
) -> Mounted:
    r"""Mount an adapter in every attention of a pretrained model, without a change of the logits.

    Training then changes the logits. A = scale q k^T are the scores of the model, after rotations
    and norms, and f is the MLP of Zheng et al., 2024. The last layer of f starts at zero.

    | model | `bias` | logits |
    |---|---|---|
    | without bias (GPT-2, OPT, Llama, Mistral, Qwen, Gemma, GPT-NeoX) | none | A + f(A) |
    | without bias | given, B | A + f([A; B]) |
    | with ALiBi, B (BLOOM, MPT, Falcon-RW) | none | A + B + f([A; B]) |

    `transformers` calls `dape.attention` through the attention interface, with caches, padding,
    windows and `generate`. The code of the model stays unchanged.

    Args:
        model: a causal language model of transformers, changed in place until `unmount`.
        adapter: `dape`, `dape3`, `talking-heads`, `cope`, ..., or a factory such as `dape.DAPE`. A
            factory is called per layer, with arguments named `num_heads`, `head_dim`, `hidden_size`
            or `train_length`.
        bias: `kerple`, `alibi`, `fire`, `t5`, ..., or a factory.
        options: options of the constructors, as `{"adapter": {"hidden": 64}, "bias": {...}}`.
        train: trainable parts, as `adapters` (with new biases), components of parameter names such
            as `o_proj`, or `all`; further parameters are frozen.
        backend: backend of attention, as in `dape.attention`.

    Returns:
        A handle that saves and unmounts the adapters.

    Raises:
        UserError: for an unsupported model, or arguments that do not fit.

    """
    is_list = isinstance(train, Iterable) and not isinstance(train, str)
    names: tuple[Any, ...] = tuple(train) if is_list else (train,)
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"train={train!r} must name parts, as 'adapters' or ['q_proj', 'norm']")
    choice = Choice(adapter, bias, {} if options is None else options)
    choice.check()
    check_backend(backend)
    return mount(servable(model), choice, names, backend)


def mount(model: PreTrainedModel, choice: Choice, train: tuple[str, ...], backend: str) -> Mounted:
    """Mount a choice, or nothing at all if a `UserError` is raised on the way."""
    found = attentions(model)
    modules = tuple(each.module for each in found)
    own = own_states(model, modules)
    with ExitStack() as undo:
        for each in found:
            install(undo, each, choice, model, backend)
        if not {ADAPTERS, ALL}.isdisjoint(train):
            before_each(undo, modules, warn_if_frozen)
            before_each(undo, [model], warn_if_unsaved)
        if isinstance(model, DapePreTrainedModel):
            put(undo, model.config, "backend", backend)
        else:
            text = model.config.get_text_config()
            undo.callback(setattr, text, "_attn_implementation", text._attn_implementation)
            text._attn_implementation = NAME
            before_each(undo, modules, partial(refuse_another, text))
            put(undo, model, "create_masks_for_generate", mask_as_given)
            put(undo, model, "init_continuous_batching", refuse_pages)
            if isinstance(model, GenerationMixin):
                # transformers reads the parameters of the class's method
                own_step = type(model).prepare_inputs_for_generation
                step = update_wrapper(partial(inputs_of_step, model), own_step, (), ())
                put(undo, model, "prepare_inputs_for_generation", step)
            around(undo, model, own_bias=any(each.bias is not None for each in found))
        parts = keep_trainable(undo, model, train, mounted_in(modules, choice))
        check_unchanged(model, own)
        put(undo, model, "retrofitted", (modules, choice))
        put(undo, model, "save_pretrained", partial(save_pretrained, model))
        return Mounted(model, modules, choice, train, parts, undo.pop_all())


def mounted_in(modules: Sequence[nn.Module], choice: Choice) -> nn.ModuleList:
    """Return the mounted modules of each attention, by name."""
    names = ("adapter",) if choice.bias is None else ("adapter", "position_bias")
    return nn.ModuleList(
        nn.ModuleDict({name: in_use(getattr(module, name)) for name in names}) for module in modules
    )


def save_pretrained(
    self: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
) -> None:
    """Save a model with adapters as the class does, and the files for `load_adapters`.

    Trained parts are saved with the model.

    Raises:
        UserError: for `push_to_hub=True`, at which the class would upload too early.
    """
    if kwargs.get("push_to_hub"):
        raise UserError(
            "save_pretrained(push_to_hub=True) would upload the model without its adapters; call "
            "model.push_to_hub(NAME), which uploads both"
        )
    type(self).save_pretrained(self, save_directory, is_main_process, **kwargs)
    if is_main_process:
        modules, choice = self.retrofitted
        state = mounted_in(modules, choice).state_dict()
        write(Path(save_directory), self.config, choice, (ADAPTERS,), state)


def servable(model: nn.Module) -> PreTrainedModel:
    """Return the model; raise a `UserError` for a model that no adapter fits."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{name} cannot be retrofitted: not a PreTrainedModel of transformers")
    if model.config.is_encoder_decoder:
        raise UserError(f"{name} cannot be retrofitted: an encoder precedes the decoder")
    if any(isinstance(getattr(each, "adapter", None), nn.Module) for each in model.modules()):
        raise UserError(
            f"{name} has adapters already, of the scheme or mounted; unmount mounted adapters first"
        )
    return model


def install(
    undo: ExitStack, each: Attention, choice: Choice, model: PreTrainedModel, backend: str
) -> None:
    """Put adapter and bias into an attention."""
    config = model.config.get_text_config()
    dimensions = {
        "num_heads": each.num_heads,
        "head_dim": each.head_dim,
        "hidden_size": config.hidden_size,
    }
    lengths = (getattr(config, name, None) for name in TRAIN_LENGTH)
    if length := next(filter(None, lengths), None):
        dimensions["train_length"] = length
    adapter, bias = choice.build(dimensions, each.bias)
    put(undo, each.module, "adapter", adapter.to(each.device))
    if bias is not None and bias is not getattr(each.module, "position_bias", None):
        put(undo, each.module, "position_bias", bias.to(each.device))
    put(undo, each.module, "attention_backend", backend)
    if each.forward is not None:
        put(undo, each.module, "forward", partial(each.forward, each.module))


def put(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute, until undone."""
    before = {name: vars(owner)[name]} if name in vars(owner) else {}

    def back() -> None:
        delattr(owner, name)
        for attribute, kept in before.items():
            setattr(owner, attribute, kept)

    setattr(owner, name, value)
    undo.callback(back)


def mask_as_given(attention_mask: Tensor | None, **_: Any) -> Tensor | None:
    """Return the padding mask, because `generate` needs no mask of four axes."""
    return attention_mask


def inputs_of_step(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the inputs of a step of `generate`, as the class does.

    Prompt and prefix tuning of PEFT put a method in place of this one, call this one, and look for
    the cache by the name `past_key_values`.

    Raises:
        UserError: for a cache from which the step would not go on.
    """
    inputs: dict[str, Any] = type(self).prepare_inputs_for_generation(self, *args, **kwargs)
    check_goes_on(inputs, kwargs.get("next_sequence_length"))
    if "cache" in inputs and not isinstance(self.prepare_inputs_for_generation, partial):
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs


def set_trainable(
    model: nn.Module, train: Sequence[str], adapters: nn.Module | None = None
) -> dict[str, nn.Parameter]:
    """Let parameters named by `train` require gradients, and return those outside adapters.

    Raises:
        UserError: for a name unknown in the model, or if nothing would train.
    """
    new = set() if adapters is None else {id(each) for each in adapters.parameters()}
    named = dict(model.named_parameters())
    words = {name: set(name.split(".")) for name, each in named.items() if id(each) not in new}
    known = {ADAPTERS, ALL}.union(*words.values())
    for name in train:
        if name not in known:
            raise unknown("part to train", name, (each for each in known if not each.isdigit()))
    for name, parameter in named.items():
        parameter.requires_grad_(not {ALL, *words.get(name, {ADAPTERS})}.isdisjoint(train))
    trained = {name: each for name, each in named.items() if each.requires_grad}
    if not trained:
        raise UserError(f"train={list(train)}: nothing would train; name parts, or 'all'")
    return {name: each for name, each in trained.items() if name in words}


def keep_trainable(
    undo: ExitStack, model: nn.Module, train: Sequence[str], adapters: nn.Module
) -> dict[str, nn.Parameter]:
    """Call `set_trainable`, and restore flags and values when undone."""
    for parameter in model.parameters():
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
    own = set_trainable(model, train, adapters)
    for parameter in own.values():
        undo.callback(restore, parameter, parameter.detach().to("cpu", copy=True))
    return own


@torch.no_grad()
def restore(parameter: Tensor, value: Tensor) -> None:
    """Restore the value of a parameter."""
    parameter.copy_(value)
