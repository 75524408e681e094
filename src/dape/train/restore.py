"""The model of a run, finished or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dape.data.shards import Corpus
from dape.errors import UserError
from dape.train import checkpoint, config, folder, strict
from dape.train.config import Recipe
from dape.train.loop import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Trained:
    """A model and its tokenizer, as a run has them after `step` updates."""

    run: Path
    recipe: Recipe
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    step: int

    @property
    def finished(self) -> bool:
        """Return whether that is all that the recipe asks for."""
        return self.step == self.recipe.training.steps


def restore(run: Path) -> Trained:
    """Return the model that a finished run left, or else that of its latest checkpoint.

    Raises:
        UserError: if there is no run, no checkpoint yet, or not the corpus any more that tells the
            tokenizer of a checkpoint.
    """
    if not (run / folder.RECIPE).is_file():
        raise UserError(f"no run in {run}: it has no {folder.RECIPE}, as `dape train` writes one")
    if "base" in strict.load(run / folder.RECIPE).get("model", {}):
        raise UserError(f"{run} is of `dape retrofit`: share what it saved, adapters or a model")
    recipe = config.read(run / folder.RECIPE)
    if (run / "model" / "config.json").is_file():
        return _finished(run, recipe)
    saved = checkpoint.latest(run / "checkpoints")
    if saved is None:
        raise UserError(f"{run} has no checkpoint yet; let `dape train` go on")
    corpus = _corpus(run, recipe)
    model = build(recipe, recipe.model.vocab_size or corpus.vocab_size, corpus.end_of_text)
    step = checkpoint.load_weights(saved, model).step
    return Trained(run, recipe, model, corpus.tokenizer(), step)


def _finished(run: Path, recipe: Recipe) -> Trained:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(run / "model"))
    return Trained(run, recipe, model, tokenizer, recipe.training.steps)


def _corpus(run: Path, recipe: Recipe) -> Corpus:
    corpus = Corpus(recipe.data)
    trained_on = folder.record(run)["data"]["checksum"]
    if corpus.checksum != trained_on:
        raise UserError(
            f"{run} was trained on other data: {recipe.data} has checksum {corpus.checksum[:12]},"
            f" not {trained_on[:12]}; put that corpus back, or finish the run"
        )
    return corpus
