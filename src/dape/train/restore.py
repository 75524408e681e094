"""The model of a run, finished or not."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dape.data.shards import Corpus
from dape.data.tokenizer import saved
from dape.errors import UserError
from dape.model.loading import load_causal
from dape.runs import RunFolder
from dape.train.checkpoint import Progress, load_weights, newest
from dape.train.recipe import Recipe, read
from dape.train.task import draw, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Trained:
    """The model and the tokenizer of a run after `step` updates."""

    run: Path
    recipe: Recipe
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    step: int

    @property
    def finished(self) -> bool:
        """Return whether `step` is the last step of the recipe."""
        return self.step == self.recipe.training.steps


def restore(run: Path, say: Callable[[str], object] = print) -> Trained:
    """Return the model of a finished run, or of the latest checkpoint.

    `say` gets a line per unreadable checkpoint.

    Raises:
        UserError: without a run, a checkpoint, or the corpus with the tokenizer of a checkpoint.
    """
    folder = RunFolder(run)
    if not folder.exists:
        raise UserError(
            f"no run in {run}: no {folder.recipe.name}; give a folder written by `dape train`"
        )
    if folder.is_retrofit:
        raise UserError(f"{run} is a run of `dape retrofit`; share the saved adapters or model")
    recipe = read(folder.recipe, Recipe)
    if folder.has_model:
        return _finished(folder, recipe)
    if folder.latest_checkpoint is None:
        raise _unsaved(folder)
    corpus = _corpus(folder, recipe)
    with torch.device("meta"):  # drawing billions of weights would take minutes
        model = draw(recipe, vocabulary(recipe, corpus), corpus.end_of_text)
    model.to_empty(device="cpu").tie_weights()  # type: ignore[operator]
    progress = _newest(folder, model, say)
    return Trained(run, recipe, model, corpus.tokenizer(), progress.step)


def _newest(run: RunFolder, model: "PreTrainedModel", say: Callable[[str], object]) -> Progress:
    """Load the newest readable checkpoint of a run that may train, and drop checkpoints, meanwhile.

    Raises:
        UserError: if all checkpoints are unreadable, or gone.
    """
    while saved := run.saved_checkpoints():
        try:
            if found := newest(saved, partial(load_weights, model=model), say):
                return found
        except UserError:
            if saved == run.saved_checkpoints():
                raise
    raise _unsaved(run)


def _unsaved(run: RunFolder) -> UserError:
    return UserError(f"{run} has no checkpoint yet; resume the run with `dape train`")


def _finished(run: RunFolder, recipe: Recipe) -> Trained:
    model = load_causal(str(run.model))
    return Trained(run.path, recipe, model, saved(str(run.model)), recipe.training.steps)


def _corpus(run: RunFolder, recipe: Recipe) -> Corpus:
    corpus = Corpus(recipe.data)
    run.check_data(recipe.data, corpus.checksum, "restore the first corpus, or finish the run")
    return corpus
