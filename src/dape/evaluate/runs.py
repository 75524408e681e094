"""From a run folder and a corpus to an evaluation."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dape.data.shards import Corpus
from dape.data.tokenizer import fingerprint, token_bytes
from dape.errors import UserError
from dape.evaluate.perplexity import Measurement, Refused, measure, token_losses, window_tokens
from dape.evaluate.protocols import Protocol, Windows, choose_blocks
from dape.evaluate.record import Evaluation, Targets

LEARNED_BY = ("data", "model", "training", "optimizer")


@dataclass(frozen=True, slots=True)
class Run:
    """A trained model: a folder of `dape train`, or a Hugging Face model folder.

    `config` is the model's config.json; `recipe` the run's config.yaml, None without one.
    """

    folder: Path
    model_folder: Path
    config: dict[str, Any]
    recipe: dict[str, Any] | None

    @property
    def scheme(self) -> str:
        """Return the position scheme, or the architecture of a model that is not ours."""
        return self.config.get("scheme") or self.config.get("model_type") or "unknown"

    @property
    def train_length(self) -> int | None:
        """Return the length trained at, or what another model's config says of it."""
        return self.config.get("train_length") or self.config.get("max_position_embeddings")

    @property
    def settings(self) -> str | None:
        """Return a checksum of the recipe without its seed, layout and output."""
        if self.recipe is None:
            return None
        learned = {name: self.recipe.get(name) for name in LEARNED_BY}
        return hashlib.sha256(json.dumps(learned, sort_keys=True).encode()).hexdigest()[:16]

    def corpus(self, data: Path | None) -> Corpus:
        """Return the corpus in `data`, or else the one trained on.

        Raises `UserError` for a model without a recipe, and for a corpus made by another tokenizer
        than the model's.
        """
        if data is None and self.recipe is None:
            raise UserError(f"{self.folder} has no config.yaml that names a corpus; give --data")
        corpus = Corpus(data or Path(self.recipe["data"]))  # type: ignore[index]
        if corpus.vocab_size > self.config["vocab_size"]:
            raise UserError(
                f"{corpus.folder} has token ids up to {corpus.vocab_size - 1}, the model "
                f"{self.folder} only {self.config['vocab_size']}; prepare it with its tokenizer"
            )
        if (self.model_folder / "tokenizer.json").is_file():
            self._check_tokenizer(corpus)
        return corpus

    def _check_tokenizer(self, corpus: Corpus) -> None:
        from transformers import PreTrainedTokenizerFast

        own = PreTrainedTokenizerFast.from_pretrained(str(self.model_folder))
        if fingerprint(own) != fingerprint(corpus.tokenizer()):
            raise UserError(
                f"{corpus.folder} was prepared with another tokenizer than that of {self.folder}; "
                f"prepare it with --tokenizer {self.model_folder}"
            )

    def load(self, device: torch.device) -> torch.nn.Module:
        """Return the model on the device, in the precision it was saved in."""
        from transformers import AutoModelForCausalLM

        from dape.model.modeling import DapeForCausalLM

        kind = DapeForCausalLM if self.config.get("model_type") == "dape" else AutoModelForCausalLM
        return kind.from_pretrained(self.model_folder).to(device).eval()


def open_run(folder: Path) -> Run:
    """Return the run in a folder; raise `UserError` if there is no model in it."""
    for model_folder in (folder / "model", folder):
        if (model_folder / "config.json").is_file():
            config = json.loads((model_folder / "config.json").read_text())
            return Run(folder, model_folder, config, _recipe(folder / "config.yaml"))
    raise UserError(
        f"no model in {folder}: neither model/config.json, as a finished `dape train` leaves it, "
        "nor config.json of a Hugging Face model"
    )


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
) -> Plan:
    """Return the plan for a split; the arguments are those of `choose_blocks`."""
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
    """
    model = run.load(device)
    part = plan.corpus.split(plan.split)
    measurements: list[Measurement] = []
    refused: dict[int, str] = {}
    for windows in plan.windows:
        try:
            losses = token_losses(
                model,
                part.document,
                windows,
                batch_tokens=batch_tokens,
                device=device,
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
        run=str(run.folder),
        scheme=run.scheme,
        train_length=run.train_length,
        seed=None if run.recipe is None else run.recipe["seed"],
        settings=run.settings,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        targets=plan.targets,
        measurements=measurements,
        provenance=provenance,
        refused=refused,
    )
