"""The models that are measured, and what every record of a measurement says of them.

A model is the folder of a run, a folder or a hub's name of any causal language model of
transformers, or a module in memory.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dape.data.hub import fetch
from dape.data.shards import Corpus
from dape.data.tokenizer import fingerprint
from dape.errors import UserError
from dape.evaluate.refusal import STORED, Tables
from dape.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LEARNED_BY = ("data", "model", "training", "optimizer")
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that a measurement is about.

    Attributes:
        run: the folder of its results, or the name of a model in memory.
        scheme: its position scheme, or the architecture of a model that is not ours.
        train_length: the length trained at, None if the model does not say.
        seed: of the training; None for a model that no run of ours trained.
        settings: checksum of the recipe without its seed, equal for runs that differ in nothing
            else; None for a model that no run of ours trained.
        parameters: their number.
        weights: tells the files of one model from those of another; None if there are none.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    weights: str | None = None


@dataclass(frozen=True)
class Model:
    """A run of `dape train`, or any causal language model of transformers.

    `folder` is where results go, `source` the folder or the hub's name of the model, `config` its
    configuration; `recipe` the run's recipe, None without one.
    """

    folder: RunFolder
    source: str
    config: "PreTrainedConfig"
    recipe: dict[str, Any] | None = None
    partial_weights: bool = False

    @property
    def scheme(self) -> str:
        """Return the position scheme, or the architecture of a model that is not ours."""
        return getattr(self.config, "scheme", self.config.model_type)

    @property
    def train_length(self) -> int | None:
        """Return the length trained at, or what another model's configuration says of it."""
        names = ("train_length", "max_position_embeddings", "max_seq_len")
        return next((n for name in names if (n := getattr(self.config, name, None))), None)

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe without its seed, layout and output."""
        if self.recipe is None:
            return None
        return _checksum({name: self.recipe.get(name) for name in _LEARNED_BY})

    @property
    def weights(self) -> str | None:
        """Return a checksum of the names, sizes and times of the model's files."""
        if not Path(self.source).is_dir():
            return getattr(self.config, "_commit_hash", None)
        return _files_checksum(Path(self.source))

    def subject(self, network: nn.Module) -> Subject:
        """Return what records say of the model, once it is loaded."""
        return Subject(
            run=str(self.folder),
            scheme=self.scheme,
            train_length=self.train_length,
            seed=None if self.recipe is None else self.recipe["seed"],
            settings=self.settings,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            weights=self.weights,
        )

    def corpus(self, data: str | Path | Corpus | None) -> Corpus:
        """Return the corpus in `data`, or else the one trained on.

        Raises:
            UserError: for a model without a recipe, and for a corpus made by another tokenizer
                than the model's.
        """
        if data is None and self.recipe is None:
            raise UserError(f"{self.source} has no recipe that names a corpus; give --data")
        corpus = data if isinstance(data, Corpus) else Corpus(data or self.recipe["data"])  # type: ignore[index]
        if corpus.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{corpus.folder} has token ids up to {corpus.vocab_size - 1}, the model "
                f"{self.source} only {self.config.vocab_size}; prepare it with its tokenizer"
            )
        own = self.tokenizer()
        if own and fingerprint(own) != fingerprint(corpus.tokenizer()):
            raise UserError(
                f"{corpus.folder} was prepared with another tokenizer than that of {self.source}; "
                f"prepare it with {self._tokenizer_option()}"
            )
        return corpus

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the tokenizer that lies with the model, None if there is no tokenizer.json."""
        from transformers import PreTrainedTokenizerFast

        if Path(self.source).is_dir() and not self._tokenizer_file().is_file():
            return None
        return fetch(PreTrainedTokenizerFast.from_pretrained, self.source)

    def _tokenizer_option(self) -> str:
        return f"--tokenizer {self._tokenizer_file().parent}"

    def _tokenizer_file(self) -> Path:
        from huggingface_hub import try_to_load_from_cache

        if Path(self.source).is_dir():
            return Path(self.source) / "tokenizer.json"
        return Path(str(try_to_load_from_cache(self.source, "tokenizer.json")))

    @contextmanager
    def loaded(self, device: torch.device, longest: int = 0) -> Iterator[nn.Module]:
        """Yield the model for inference on the device, in the precision it was saved in.

        A model that stores the values of a formula stores those up to `longest` tokens.
        """
        from dape.model.loading import load_causal

        stored = STORED.get(self.config.model_type)
        options = {stored: max(longest, getattr(self.config, stored))} if stored else {}
        model = load_causal(self.source, self.partial_weights, **options)
        yield model.to(device).eval()

    def precision(self, device: torch.device) -> str:
        """Return the precision of products: on a GPU that of the training, else fp32."""
        trained = (self.recipe or {}).get("training", {}).get("precision")
        return "bf16" if device.type == "cuda" and trained == "bf16-mixed" else "fp32"

    def check_spread(self) -> None:
        """Raise a `UserError` for a model that cannot be spread over several devices."""
        if self.config.model_type != "dape":
            raise UserError(
                f"{self.source} is no model of this package: its windows cannot be spread over"
                " several devices; start one process, without torchrun"
            )

    def beginning(self) -> int:
        """Return the token that the model's texts begin with, a `UserError` if there is none."""
        found = getattr(self.config, "bos_token_id", None)
        if found is None:
            raise UserError(f"--bos: the configuration of {self.source} has no bos_token_id")
        return int(found)

    def refusing(self) -> AbstractContextManager[Any]:
        """Return the context in which the model refuses what it cannot read.

        Models of this package refuse it themselves.
        """
        return nullcontext() if self.config.model_type == "dape" else Tables()


@dataclass(frozen=True)
class Finetuned(Model):
    """A run of `dape retrofit`, which began with the model `base`; it has a recipe."""

    base: Model | None = None

    @property
    def _chosen(self) -> dict[str, Any]:
        return self.recipe["model"]  # type: ignore[index]

    @property
    def scheme(self) -> str:
        """Return what the model was, and what was mounted in it or done to it."""
        mounted = "-".join(filter(None, (self._chosen["adapter"], self._chosen["bias"])))
        change = f"+ {mounted}" if self._chosen["adapter"] else "fine-tuned"
        return f"{super().scheme} {change}"

    @property
    def train_length(self) -> int | None:
        """Return the length of the fine-tuning."""
        return self.recipe["training"]["length"]  # type: ignore[index]

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe and of the base's settings, without the seeds of both."""
        learned = {name: self.recipe.get(name) for name in _LEARNED_BY}  # type: ignore[union-attr]
        base = self.base.settings or self.base.source  # type: ignore[union-attr]
        learned["model"] = {**self._chosen, "base": base}
        return _checksum(learned)

    @property
    def weights(self) -> str | None:
        """Return a checksum that tells of the base's files and of the adapters'."""
        if self._chosen["adapter"] is None:
            return super().weights
        return _checksum([super().weights, _files_checksum(self.folder.adapters)])

    @contextmanager
    def loaded(self, device: torch.device, longest: int = 0) -> Iterator[nn.Module]:
        """Yield the model on the device, with the adapters mounted if there are any."""
        if self._chosen["adapter"] is None:
            with super().loaded(device, longest) as model:
                yield model
            return
        from dape.model.loading import load_causal
        from dape.model.retrofit import load_adapters

        model = load_causal(self.source, self.partial_weights, config=self.config)
        model.to(device)
        load_adapters(model, self.folder.adapters, backend=self._chosen["backend"])
        yield model.eval()


@dataclass(frozen=True)
class InMemory(Model):
    """A model of this package or of transformers that is in memory, where it stays."""

    network: nn.Module = field(default_factory=nn.Module)
    own_tokenizer: "PreTrainedTokenizerFast | None" = None

    @property
    def weights(self) -> str | None:
        """Return None: weights in memory have no files."""
        return None

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the tokenizer that was given with the model, if any."""
        return self.own_tokenizer

    def _tokenizer_option(self) -> str:
        return "--tokenizer FOLDER, where that tokenizer is saved"

    @contextmanager
    def loaded(self, device: torch.device, longest: int = 0) -> Iterator[nn.Module]:
        """Yield the model where it is, for inference; then it trains or not as before."""
        training = [module for module in self.network.modules() if module.training]
        try:
            yield self.network.eval()
        finally:
            for module in training:
                module.training = True


def _files_checksum(folder: Path) -> str:
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    states = [(file.name, file.stat()) for file in files]
    return _checksum([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
