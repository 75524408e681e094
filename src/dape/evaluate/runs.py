"""From a run folder and a corpus to an evaluation."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dape.data.hub import fetch
from dape.data.shards import Corpus
from dape.data.tokenizer import fingerprint, token_bytes
from dape.errors import UserError
from dape.evaluate.limits import STORED, Refused, Tables
from dape.evaluate.perplexity import Measurement, measure, token_losses, window_tokens
from dape.evaluate.protocols import Protocol, Windows, choose_blocks
from dape.evaluate.record import Evaluation, Targets

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

LEARNED_BY = ("data", "model", "training", "optimizer")


@dataclass(frozen=True, slots=True)
class Run:
    """A trained model: a folder of `dape train`, or any causal language model of transformers.

    `folder` is where results go, `source` the folder or the hub's name of the model, `config` its
    configuration; `recipe` the run's config.yaml, None without one.
    """

    folder: Path
    source: str
    config: "PreTrainedConfig"
    recipe: dict[str, Any] | None

    @property
    def scheme(self) -> str:
        """Return the position scheme, or the architecture of a model that is not ours."""
        return getattr(self.config, "scheme", self.config.model_type)

    @property
    def train_length(self) -> int | None:
        """Return the length trained at, or what another model's config says of it."""
        names = ("train_length", "max_position_embeddings", "max_seq_len")
        return next((n for name in names if (n := getattr(self.config, name, None))), None)

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe without its seed, layout and output."""
        if self.recipe is None:
            return None
        learned = {name: self.recipe.get(name) for name in LEARNED_BY}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]

    def facts(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what every record of a measurement says of the run and its model."""
        return {
            "run": str(self.folder),
            "scheme": self.scheme,
            "train_length": self.train_length,
            "seed": None if self.recipe is None else self.recipe["seed"],
            "settings": self.settings,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def corpus(self, data: Path | None) -> Corpus:
        """Return the corpus in `data`, or else the one trained on.

        Raises `UserError` for a model without a recipe, and for a corpus made by another tokenizer
        than the model's.
        """
        if data is None and self.recipe is None:
            raise UserError(f"{self.source} has no config.yaml that names a corpus; give --data")
        corpus = Corpus(data or Path(self.recipe["data"]))  # type: ignore[index]
        if corpus.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{corpus.folder} has token ids up to {corpus.vocab_size - 1}, the model "
                f"{self.source} only {self.config.vocab_size}; prepare it with its tokenizer"
            )
        own = self.tokenizer()
        if own and fingerprint(own) != fingerprint(corpus.tokenizer()):
            raise UserError(
                f"{corpus.folder} was prepared with another tokenizer than that of {self.source}; "
                f"prepare it with --tokenizer {self._tokenizer_file().parent}"
            )
        return corpus

    def tokenizer(self) -> "PreTrainedTokenizerFast | None":
        """Return the tokenizer that lies with the model, None if there is no tokenizer.json."""
        from transformers import PreTrainedTokenizerFast

        if Path(self.source).is_dir() and not self._tokenizer_file().is_file():
            return None
        return fetch(PreTrainedTokenizerFast.from_pretrained, self.source)

    def _tokenizer_file(self) -> Path:
        from huggingface_hub import try_to_load_from_cache

        if Path(self.source).is_dir():
            return Path(self.source) / "tokenizer.json"
        return Path(str(try_to_load_from_cache(self.source, "tokenizer.json")))

    def load(self, device: torch.device, longest: int = 0) -> torch.nn.Module:
        """Return the model on the device, in the precision it was saved in.

        A model that stores the values of a formula stores those up to `longest` tokens.
        """
        from transformers import AutoModelForCausalLM

        stored = STORED.get(self.config.model_type)
        options = {stored: max(longest, getattr(self.config, stored))} if stored else {}
        model = fetch(AutoModelForCausalLM.from_pretrained, self.source, **options)
        return model.to(device).eval()

    def precision(self, device: torch.device) -> torch.dtype:
        """Return the precision of products: on a GPU that of the training, else float32."""
        trained = (self.recipe or {}).get("training", {}).get("precision")
        mixed = device.type == "cuda" and trained == "bf16-mixed"
        return torch.bfloat16 if mixed else torch.float32

    @property
    def ours(self) -> bool:
        """Return whether the model is of this package, which tells of its limits itself."""
        return self.config.model_type == "dape"

    def beginning(self) -> int:
        """Return the token that the model's texts begin with, a `UserError` if there is none."""
        found = getattr(self.config, "bos_token_id", None)
        if found is None:
            raise UserError(f"--bos: the configuration of {self.source} has no bos_token_id")
        return int(found)

    def limits(self) -> AbstractContextManager[Any]:
        """Return the context in which a model that is not ours refuses what it cannot read."""
        return nullcontext() if self.ours else Tables()


def open_run(folder: Path) -> Run:
    """Return the run in a folder, or the model of that name on the Hugging Face hub.

    Raises `UserError` if there is no such model.
    """
    recipe = _recipe(folder / "config.yaml")
    if recipe and "base" in recipe.get("model", {}):
        from dape.evaluate.finetuned import open_finetuned

        return open_finetuned(folder, recipe)
    for model in (folder / "model", folder):
        if (model / "config.json").is_file():
            return Run(folder, str(model), _config(str(model)), recipe)
    if folder.exists():
        unfinished = (folder / "checkpoints").is_dir()
        raise UserError(
            f"no model in {folder}: neither model/config.json, as a finished `dape train` leaves "
            "it, nor config.json of a Hugging Face model"
            + f"; `dape export {folder} --out DIR` makes one of its latest checkpoint"
            * unfinished
        )
    name = folder.as_posix()
    return Run(Path("runs") / name, name, _config(name), None)


def _config(source: str) -> "PreTrainedConfig":
    from transformers import AutoConfig

    return fetch(AutoConfig.from_pretrained, source).get_text_config()


def _recipe(file: Path) -> dict[str, Any] | None:
    import yaml

    return yaml.safe_load(file.read_text()) if file.is_file() else None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to score on a corpus: the windows of each length, and the targets they share."""

    corpus: Corpus
    split: str
    windows: tuple[Windows, ...]
    targets: Targets

    @property
    def tokens(self) -> int:
        """Return how many tokens a model is fed."""
        return sum(each.tokens for each in self.windows)


def plan(
    corpus: Corpus,
    split: str,
    protocol: Protocol,
    lengths: list[int],
    *,
    documents: int,
    blocks: int,
    seed: int,
    bos: bool = False,
) -> Plan:
    """Return the plan for a split; most arguments are those of `choose_blocks`.

    With `bos` each window begins with the model's token for that.
    """
    part = corpus.split(split)
    chosen = choose_blocks(
        protocol, part.document_lengths - 1, documents=documents, blocks=blocks, seed=seed
    )
    windows = tuple(chosen.windows(length) for length in lengths)
    numbers, owner = np.unique(windows[0].documents, return_inverse=True)
    scored = window_tokens(part.document, windows[0], slice(None))[:, -windows[0].scored :]
    sizes = token_bytes(corpus.tokenizer())[scored].sum(axis=1)
    targets = Targets(
        data=corpus.checksum,
        split=split,
        protocol=protocol.name,
        block=protocol.block,
        longest=protocol.longest,
        documents=numbers.tolist(),
        tokens=(np.bincount(owner) * windows[0].scored).tolist(),
        bytes=np.bincount(owner, weights=sizes).astype(int).tolist(),
        bos=bos,
    )
    return Plan(corpus, split, windows, targets)


def evaluate(
    run: Run,
    plan: Plan,
    *,
    device: torch.device,
    batch_tokens: int,
    provenance: dict[str, Any],
    advance: Callable[[int], object],
    announce: Callable[[int, str], object],
) -> Evaluation:
    """Return the evaluation of a run's model; a length it refuses is told of and left out.

    `advance` is told the tokens of each forward, `announce` each length and what came of it.

    Raises `UserError` if windows are to begin with a token that the configuration lacks.
    """
    begin = run.beginning() if plan.targets.bos else None
    model = run.load(device, max(windows.length for windows in plan.windows))
    part = plan.corpus.split(plan.split)
    measurements: list[Measurement] = []
    refused: dict[int, str] = {}
    for windows in plan.windows:
        try:
            with run.limits():
                losses = token_losses(
                    model,
                    part.document,
                    windows,
                    batch_tokens=batch_tokens,
                    begin=begin,
                    device=device,
                    precision=run.precision(device),
                    advance=advance,
                )
        except Refused as reason:
            refused[windows.length] = str(reason)
            announce(windows.length, f"refused: {reason}")
            advance(windows.tokens)
            continue
        measurements.append(measure(losses, windows, np.array(plan.targets.bytes)))
        announce(windows.length, f"perplexity {measurements[-1].perplexity:,.2f}")
    return Evaluation(
        **run.facts(model),
        targets=plan.targets,
        measurements=measurements,
        provenance=provenance,
        refused=refused,
    )
