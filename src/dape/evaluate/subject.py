"""The measured models, and their description in every record of a measurement.

A model is a run folder, a folder or hub name of any causal language model of transformers, or a
module in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dape.data.shards import Corpus
from dape.data.tokenizer import file_of_model, of_model
from dape.errors import UserError, unknown
from dape.evaluate.dynamic import without_history
from dape.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SETTINGS = ("data", "model", "training", "optimizer")
_WEIGHTS = ("*.safetensors", "*.bin", "*.json")


@dataclass(frozen=True, slots=True)
class Subject:
    """The measured model, as described in records.

    Attributes:
        run: the folder of the results, or the name of a model in memory.
        scheme: the position scheme, or the architecture of a foreign model.
        train_length: the training length in tokens, None if unknown.
        seed: seed of the training; None for a model without a run.
        settings: checksum of the recipe without the seed, equal for runs that differ only in the
            seed; None for a model without a run.
        parameters: number of parameters.
        weights: checksum of names, sizes and times of the model's files; None without files.
        trained_on: checksum of the training corpus, for a fine-tuning with the base model; None if
            the run has no record of the corpus, for a model without a run, and in records of
            earlier versions.
    """

    run: str
    scheme: str
    train_length: int | None
    seed: int | None
    settings: str | None
    parameters: int
    weights: str | None = None
    trained_on: str | None = None


@dataclass(frozen=True)
class Model:
    """A run of `dape train`, or any causal language model of transformers.

    Results go to `folder`. `source` is the folder or hub name of the model, `config` the
    configuration, and `recipe` the recipe of the run, or None.
    """

    folder: RunFolder
    source: str
    config: "PreTrainedConfig"
    recipe: dict[str, Any] | None = None
    partial_weights: bool = False

    @property
    def scheme(self) -> str:
        """Return the position scheme, or the architecture of a foreign model."""
        return getattr(self.config, "scheme", self.config.model_type)

    @property
    def train_length(self) -> int | None:
        """Return the training length, from the recipe or a foreign model's configuration."""
        names = ("train_length", "max_position_embeddings", "max_seq_len")
        return next((n for name in names if (n := getattr(self.config, name, None))), None)

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe without seed, layout and output."""
        if self.recipe is None:
            return None
        return _checksum({name: self.recipe.get(name) for name in _SETTINGS})

    @property
    def trained_on(self) -> str | None:
        """Return the checksum of the training corpus; settings hold no more than the folder."""
        return None if self.recipe is None else self.folder.data_checksum

    @property
    def weights(self) -> str | None:
        """Return a checksum of the names, sizes and times of the model's files."""
        if not Path(self.source).is_dir():
            return getattr(self.config, "_commit_hash", None)
        return files_checksum(Path(self.source))

    def subject(self, network: nn.Module) -> Subject:
        """Return the description of the model for records, after loading."""
        return Subject(
            run=str(self.folder),
            scheme=self.scheme,
            train_length=self.train_length,
            seed=None if self.recipe is None else self.recipe["seed"],
            settings=self.settings,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            weights=self.weights,
            trained_on=self.trained_on,
        )

    def corpus(self, data: str | Path | Corpus | None) -> Corpus:
        """Return the corpus in `data`, by default the training corpus.

        Raises:
            UserError: for a model without a recipe, a corpus prepared with another tokenizer, or a
                training corpus that was prepared anew since.
        """
        corpus = self._training_corpus() if data is None else data
        corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        tokenizer, folder = self.tokenizer(), self._tokenizer_folder()
        corpus.check_model(self.source, self.config.vocab_size, tokenizer, folder)
        return corpus

    def _training_corpus(self) -> Corpus:
        """Return the corpus of the training, whose test split the model never read."""
        if self.recipe is None:
            raise UserError(f"{self.source} has no recipe with a corpus; give --data")
        corpus, remedy = Corpus(self.recipe["data"]), "give --data, with texts that it did not read"
        self.folder.check_data(self.recipe["data"], corpus.checksum, remedy)
        return corpus

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the tokenizer of the model, None without a tokenizer.json."""
        return of_model(self.source)

    def _tokenizer_folder(self) -> str:
        return str(file_of_model(self.source).parent)

    @contextmanager
    def loaded(
        self, device: torch.device, longest: int = 0, precision: str | None = None
    ) -> Iterator[nn.Module]:
        """Yield the model for inference on the device.

        For products of the `precision` fp32 the weights are in float32, and otherwise in the saved
        precision. A model with a stored table of positions by formula stores `longest` tokens.

        Raises:
            UserError: for a model that is not causal.
        """
        from dape.model.loading import load_causal

        model = load_causal(self.source, self.partial_weights, longest, **_dtype(precision))
        with without_history(self._checked(model.to(device).eval())) as network:
            yield network

    def _checked(self, network: nn.Module) -> nn.Module:
        """Return a network, a `UserError` for a foreign network not causal or without its cap."""
        from dape.model.loading import check_capped, check_causal

        if self.config.model_type != "dape":
            check_capped(network, self.source)
            check_causal(network, self.source)
        return network

    @contextmanager
    def on_demand(
        self, device: torch.device, longest: int, precision: str | None = None
    ) -> Iterator[Callable[[], nn.Module]]:
        """Yield a function that returns the model `loaded`, once for all calls."""
        with ExitStack() as stack:
            yield cache(lambda: stack.enter_context(self.loaded(device, longest, precision)))

    def precision(self, device: torch.device, asked: str = "auto") -> str:
        """Return the precision of products; `auto` on a GPU is that of training or file, else fp32.

        A file in 16 bits is measured in bf16, since float32 weights would need twice the memory.

        Raises:
            UserError: for an unknown precision.
        """
        if asked != "auto":
            if asked not in PRECISIONS:
                raise unknown("precision", asked, (*PRECISIONS, "auto"))
            return asked
        trained = (self.recipe or {}).get("training", {}).get("precision")
        saved = getattr(self.config.get_text_config(), "dtype", None)
        low = trained == "bf16-mixed" or saved in (torch.bfloat16, torch.float16)
        return "bf16" if device.type == "cuda" and low else "fp32"

    def check_spread(self) -> None:
        """Raise a `UserError` for a model whose windows several devices cannot share."""
        if self.config.model_type != "dape":
            raise UserError(
                f"{self.source} is not a DAPE model, and its windows cannot be spread over"
                " several devices; start a single process, without torchrun"
            )

    def beginning(self) -> int:
        """Return the model's token for the beginning of a text, a `UserError` without any."""
        found = getattr(self.config, "bos_token_id", None)
        if found is None:
            raise UserError(
                f"--bos: the configuration of {self.source} has no bos_token_id; leave --bos out"
            )
        return int(found)

    def refusing(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Return the context in which the loaded model refuses unreadable windows.

        DAPE models need no context.
        """
        from dape.model.position_tables import Tables

        return nullcontext() if self.config.model_type == "dape" else Tables(network)


@dataclass(frozen=True)
class Finetuned(Model):
    """A run of `dape retrofit` on the model `base`, with a recipe."""

    base: Model | None = None

    @property
    def _chosen(self) -> dict[str, Any]:
        return self.recipe["model"]  # type: ignore[index]

    @property
    def _untrained(self) -> bool:
        return self.recipe["training"].get("steps") == 0  # type: ignore[index]

    @property
    def scheme(self) -> str:
        """Return the scheme of the base, with the mounted adapters or the changes."""
        if self._untrained:
            return super().scheme
        change = _mounted(self._chosen) if self._chosen["adapter"] else "fine-tuned"
        return f"{super().scheme} {change}"

    @property
    def train_length(self) -> int | None:
        """Return the length of the fine-tuning, if any, or else of the base."""
        if self._untrained:
            return self.base.train_length  # type: ignore[union-attr]
        return self.recipe["training"]["length"]  # type: ignore[index]

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe and of the base's settings, without both seeds."""
        settings = {name: self.recipe.get(name) for name in _SETTINGS}  # type: ignore[union-attr]
        base = self.base.settings or self.base.source  # type: ignore[union-attr]
        settings["model"] = {**self._chosen, "base": base}
        return _checksum(settings)

    @property
    def trained_on(self) -> str | None:
        """Return a checksum of the corpora of both trainings, or of the base model of others."""
        base: Model = self.base  # type: ignore[assignment]
        own = super().trained_on
        weights = self.folder.read_record().get("base_weights")
        before = base.trained_on if base.recipe else weights
        return own and _checksum([own, before])

    @property
    def weights(self) -> str | None:
        """Return a checksum of the files of the base and of the adapters."""
        if self._chosen["adapter"] is None:
            return super().weights
        return _checksum([super().weights, files_checksum(self.folder.adapters)])

    @contextmanager
    def loaded(
        self, device: torch.device, longest: int = 0, precision: str | None = None
    ) -> Iterator[nn.Module]:
        """Yield the model on the device, with the adapters, if any.

        Raises:
            UserError: for a base whose weights changed since the training.
        """
        if self._chosen["adapter"] is None:
            with super().loaded(device, longest, precision) as model:
                yield model
            return
        from dape.model.loading import check_base, load_causal
        from dape.model.retrofit import load_adapters

        options = {"config": self.config, **_dtype(precision)}
        model = load_causal(self.source, self.partial_weights, longest, **options)
        check_base(model, self.source, self.folder)
        model.to(device)
        load_adapters(model, self.folder.adapters, backend=self._chosen["backend"])
        with without_history(model.eval()) as network:
            yield network


@dataclass(frozen=True)
class InMemory(Model):
    """A model of `dape` or of transformers in memory, which stays on its device."""

    network: nn.Module = field(default_factory=nn.Module)
    own_tokenizer: "PreTrainedTokenizerFast | None" = None

    @property
    def scheme(self) -> str:
        """Return the scheme or the architecture, with the mounted adapters."""
        choice = getattr(self.network, "retrofitted", (None, None))[1]
        scheme = super().scheme
        return f"{scheme} {_mounted(choice.names())}" if choice else scheme

    @property
    def weights(self) -> str | None:
        """Return None: weights in memory have no files."""
        return None

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the tokenizer given with the model, if any."""
        return self.own_tokenizer

    def _tokenizer_folder(self) -> str:
        return "FOLDER, the folder of the tokenizer"

    def precision(self, device: torch.device, asked: str = "auto") -> str:
        """Return the precision of products, bf16 for weights below float32.

        Raises:
            UserError: for an unknown precision, or fp32 for weights below float32.
        """
        found = super().precision(device, asked)
        low = {x.dtype for x in self.network.parameters()} & {torch.bfloat16, torch.float16}
        if low and asked == "fp32":
            raise UserError(
                f"precision='fp32': {self.source} has weights in {min(map(str, low))}; give"
                " model.float(), or precision='bf16'"
            )
        return "bf16" if low else found

    @contextmanager
    def loaded(
        self, device: torch.device, longest: int = 0, precision: str | None = None
    ) -> Iterator[nn.Module]:
        """Yield the model in evaluation mode on its device; afterwards restore the mode."""
        training = [module for module in self.network.modules() if module.training]
        try:
            with without_history(self._checked(self.network.eval())) as network:
                yield network
        finally:
            for module in training:
                module.training = True


def files_checksum(folder: Path, patterns: Sequence[str] = _WEIGHTS) -> str:
    """Return a checksum of the names, sizes and times of a model's files in a folder."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
    states = [(file.name, file.stat()) for file in files]
    return _checksum([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def _mounted(chosen: Mapping[str, Any]) -> str:
    """Return the label of mounted adapters, such as `+ dape-kerple`."""
    return "+ " + "-".join(filter(None, (chosen["adapter"], chosen["bias"])))


def _dtype(precision: str | None) -> dict[str, torch.dtype]:
    """Return the option of loading for weights in float32, if products are in float32."""
    return {"dtype": torch.float32} if precision == "fp32" else {}


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
