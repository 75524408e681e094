"""Tasks of the training loop: a model, batches, the loss, and the saved result."""

from abc import ABC, abstractmethod
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint

from dape.data.shards import Corpus, Windows
from dape.data.tokenizer import file_of_model, of_model
from dape.errors import UserError, unknown
from dape.files import whole
from dape.runs import RunFolder
from dape.train.estimate import TOKENS_AT_ONCE, flops_per_token, is_counted, size
from dape.train.recipe import Recipe, Retrofit, Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from transformers import PreTrainedModel

    from dape.attention.context_parallel import ContextParallel
    from dape.model.retrofit import Mounted

Batch = tuple[Tensor, ...]  # tensors with the examples on the first axis
_BALANCE = "output_router_logits"  # adds the loss of balance of a mixture of experts


class Task(ABC):
    """A training problem from a recipe: model, batches, loss and result.

    `data` is the record's entry on the data, with the checksum, None for generated batches.
    `tokens` is the number of tokens in a step, None if steps differ. `context_parallel` is the
    group of devices that share a sequence, None for a single device.
    """

    recipe: Settings
    data: dict[str, str] | None = None
    tokens: int | None = None
    context_parallel: "ContextParallel | None" = None

    @abstractmethod
    def build(self, device: torch.device) -> nn.Module:
        """Return the model on the device; the recipe's seed has been set."""

    @abstractmethod
    def batch(self, split: str, step: int, rank: int, ranks: int) -> Batch:
        """Return a rank's examples of batch `step` = 0, 1, ... of a split, on any device.

        The splits are `train` and `validation`. All ranks get equally many examples.
        """

    @abstractmethod
    def loss(self, model: nn.Module, *batch: Tensor) -> Float[Tensor, ""]:
        """Return the mean loss of the examples of a batch, or of a micro-batch."""

    @abstractmethod
    def save(self, fabric: "Fabric", model: nn.Module) -> None:
        """Write the trained model into the run folder; called on every rank."""

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Return entries for the record of the run, from the model on a single device."""
        return {}

    def flops(self, model: nn.Module) -> int | None:
        """Return the FLOP of training on a token, None if not known."""
        return None

    def origin(self, step: int) -> str:
        """Return in words where the examples of batch `step` = 0, 1, ... come from."""
        return f"batch {step} of seed {self.recipe.seed}"


class NextToken(Task):
    """Prediction of the next token in the windows of a corpus.

    Raises:
        UserError: if the corpus has too few tokens.
    """

    recipe: Recipe | Retrofit

    def __init__(self, recipe: Recipe | Retrofit, corpus: Corpus) -> None:
        self.recipe, self.corpus = recipe, corpus
        self.data = {"path": recipe.data, "checksum": corpus.checksum}
        self.tokens = recipe.training.batch_size * recipe.training.length
        seeds = {"train": recipe.seed, "validation": 0}
        self._windows = {
            split: Windows(corpus.split(split), recipe.training.length, seed)
            for split, seed in seeds.items()
        }

    def batch(self, split: str, step: int, rank: int, ranks: int) -> Batch:
        """Return windows of `length + 1` tokens: batch `step` is windows step * B and on."""
        size = self.recipe.training.batch_size
        rows, windows = size // ranks, self._windows[split]
        first = step * size + rank * rows
        return (torch.from_numpy(np.stack([windows[n] for n in range(first, first + rows)])),)

    def loss(self, model: nn.Module, *batch: Int[Tensor, "rows window"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy in nats a token, over all tokens after the first.

        In training, a mixture of experts adds its own loss of balance if `output_router_logits` of
        its configuration asks for the loss.
        """
        (tokens,) = batch
        targets = tokens[:, 1:].contiguous()
        alone = {_BALANCE: False} if hasattr(model.config, _BALANCE) and not model.training else {}
        found: Tensor = model(
            input_ids=tokens[:, :-1],
            labels=targets,
            shift_labels=targets,
            use_cache=False,
            **alone,
        ).loss
        return found

    def save(self, fabric: "Fabric", model: nn.Module) -> None:
        """Write the whole model and the tokenizer in the format of Hugging Face."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a progress bar for a single file
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=options)
        if fabric.is_global_zero:
            with whole(self.recipe.run.model) as partial:
                model.save_pretrained(  # type: ignore[operator]
                    partial, state_dict=shared_again(model, weights)
                )
                self.corpus.tokenizer().save_pretrained(partial)
        fabric.barrier()

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Return scheme, length and number of parameters."""
        numbers = size(model)
        return {
            "scheme": self.recipe.scheme,
            "train_length": self.recipe.training.length,
            "parameters": numbers.parameters,
            "position_parameters": numbers.positional,
        }

    def flops(self, model: nn.Module) -> int | None:
        """Return the FLOP of training on a token, None if not known."""
        return flops_per_token(model, self.recipe.training.length) if is_counted(model) else None

    def origin(self, step: int) -> str:
        """Return the numbers of the windows."""
        batch, length = self.recipe.training.batch_size, self.recipe.training.length
        return (
            f"windows {step * batch} to {(step + 1) * batch - 1} of split 'train' in"
            f" {self.recipe.data} (length {length}, seed {self.recipe.seed})"
        )


class LanguageModelling(NextToken):
    """A language model trained from random weights."""

    recipe: Recipe

    def loss(self, model: nn.Module, *batch: Int[Tensor, "rows window"]) -> Float[Tensor, ""]:
        """Return the mean cross-entropy, of this device's part of each shared sequence.

        Logits of many tokens are computed in parts, and again in the backward pass.
        """
        (tokens,) = batch
        inputs, targets, where = tokens[:, :-1], tokens[:, 1:], {}
        if self.context_parallel is None and targets.numel() <= TOKENS_AT_ONCE:
            return super().loss(model, tokens)
        if self.context_parallel is not None:
            inputs, targets = (self.context_parallel.part(each) for each in (inputs, targets))
            where = {"context_parallel": self.context_parallel}
        hidden = model.model(input_ids=inputs, use_cache=False, **where)  # type: ignore[operator]
        parts = (
            each.split(TOKENS_AT_ONCE)
            for each in (hidden.last_hidden_state.flatten(0, 1), targets.flatten())
        )
        sums = [
            checkpoint(_loss_of_part, model, *part, use_reentrant=False)
            for part in zip(*parts, strict=True)
        ]
        found: Tensor = torch.stack(sums).sum() / targets.numel()
        return found

    def build(self, device: torch.device) -> nn.Module:
        """Draw the whole model, with the same weights for any number of ranks."""
        entries = vocabulary(self.recipe, self.corpus)
        with device:
            return draw(self.recipe, entries, self.corpus.end_of_text)


class Retrofitting(NextToken):
    """A pretrained model, with mounted adapters or trainable parts."""

    recipe: Retrofit
    _mounted: "Mounted | None" = None
    _weights: str = ""

    def build(self, device: torch.device) -> nn.Module:
        """Load the model, mount adapters, and freeze all parameters outside `base.train`."""
        from dape.model.loading import check_base, check_causal
        from dape.model.position_tables import check_reach
        from dape.model.retrofit import retrofit, set_trainable

        chosen, source = self.recipe.model, source_of(self.recipe)
        length = self.recipe.training.length
        model = load(source, chosen.config, length).to(device)
        check_causal(model, source)
        check_reach(model, length)
        self._weights = check_base(model, source, self.recipe.run)
        tokens = model.config.get_text_config().vocab_size
        folder = file_of_model(source).parent
        self.corpus.check_model(source, tokens, of_model(source), folder)
        train = chosen.train.split(",")
        if chosen.adapter is None:
            set_trainable(model, train)
        else:
            self._mounted = retrofit(
                model,
                chosen.adapter,
                chosen.bias,
                options=chosen.options,
                train=train,
                backend=chosen.backend,
            )
        return model

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Return also the fingerprint of the pretrained weights."""
        return super().facts(model) | {"base_weights": self._weights}

    def save(self, fabric: "Fabric", model: nn.Module) -> None:
        """Write the adapters, or the model if no adapters are mounted."""
        if self._mounted is None:
            super().save(fabric, model)
            return
        if fabric.is_global_zero:
            with whole(self.recipe.run.adapters) as partial:
                self._mounted.save(partial)
        fabric.barrier()


def shared_again(model: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Return whole weights in which the names of a shared parameter share a tensor again.

    Gathered shards have a tensor for each name, and a file would have the tensor twice.
    """
    names: dict[nn.Parameter, str] = {}
    first = {
        name: names.setdefault(parameter, name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return {name: weights[first.get(name, name)] for name in weights}


def _loss_of_part(
    model: nn.Module, hidden: Float[Tensor, "tokens width"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Return the summed loss of tokens, from the input of the head."""
    logits = model.lm_head(hidden)  # type: ignore[operator]
    mean: Tensor = model.loss_function(  # type: ignore[operator]
        logits, None, logits.shape[-1], shift_labels=targets
    )
    return mean * len(targets)


def vocabulary(recipe: Recipe, corpus: Corpus) -> int:
    """Return the entries of the embedding.

    Raises:
        UserError: for fewer entries in the recipe than in the tokenizer of the corpus.
    """
    entries = recipe.model.vocab_size or corpus.vocab_size
    if entries < corpus.vocab_size:
        raise UserError(
            f"model.vocab_size={entries} is less than the {corpus.vocab_size} tokens of"
            f" {recipe.data}; leave the option out to take {corpus.vocab_size}"
        )
    return entries


def draw(recipe: Recipe, vocab_size: int, end_of_text: int | None = None) -> nn.Module:
    """Return the model of a recipe on the default device, drawn from the default generator.

    Raises:
        UserError: for an invalid scheme, option or backend.
    """
    from dape.model.configuration import DapeConfig
    from dape.model.modeling import DapeForCausalLM

    settings = asdict(recipe.model)
    settings |= {"vocab_size": vocab_size, "train_length": recipe.training.length}
    model: nn.Module = DapeForCausalLM(DapeConfig(**settings, eos_token_id=end_of_text))
    return model


def source_of(recipe: Retrofit) -> str:
    """Return the folder or hub name of the pretrained model; a run stands for its model."""
    base = RunFolder(Path(recipe.model.base))
    return str(base.model) if base.has_model else recipe.model.base


def load(source: str, changes: dict[str, Any], longest: int = 0) -> "PreTrainedModel":
    """Return a pretrained model in float32, with changed keys of the configuration.

    A table of positions stored by formula holds `longest` tokens.

    Raises:
        UserError: for an unknown model or key.
    """
    from dape.model.loading import load_causal, load_config
    from dape.model.rotation import check_rotation

    config, unused = load_config(source, return_unused_kwargs=True, **changes)
    for name in unused.keys() & changes.keys():
        raise unknown(f"key of the configuration of {source}", name, config.to_dict())
    if getattr(config, "rope_parameters", None):
        check_rotation(source, config)
    return load_causal(source, longest=longest, config=config, dtype=torch.float32)
