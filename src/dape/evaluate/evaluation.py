"""Perplexity over length of several models, on the same tokens, kept length by length."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dape.attention.context_parallel import ContextParallel
from dape.data.shards import Corpus
from dape.device import choose_device, device_of
from dape.errors import UserError, check_whole
from dape.evaluate.lengths import chosen_lengths
from dape.evaluate.opening import Given, note_unchecked, open_models
from dape.evaluate.perplexity import Measurement, measure, token_losses
from dape.evaluate.plan import Plan, plan
from dape.evaluate.protocols import Windows
from dape.evaluate.protocols import protocol as protocol_of
from dape.evaluate.record import Evaluation, load
from dape.evaluate.refusal import Refused
from dape.evaluate.results import KEPT, Kept, origins, results_folders
from dape.evaluate.subject import PRECISIONS, Model, Subject
from dape.evaluate.watch import SILENT, Watch
from dape.ranks import check_same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def evaluate(
    models: Given | Sequence[Given],
    corpus: str | Path | Corpus | None = None,
    lengths: Sequence[int] | None = None,
    protocol: str = "last",
    *,
    stride: int | None = None,
    split: str = "test",
    documents: int = 100,
    blocks: int = 4,
    bos: bool = False,
    metric: str = "perplexity",
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    batch_tokens: int = 16384,
    out: str | Path | None = None,
    again: bool = False,
    partial_weights: bool = False,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    command: str = "dape.evaluate.evaluate",
    watch: Watch = SILENT,
    context_parallel: ContextParallel | None = None,
) -> list[Evaluation]:
    """Return the perplexity over length of each model, on equal tokens for all lengths and models.

    A result file receives a length as soon as the length is measured, and a repeated call reads
    finished lengths from the file. Results of modules in memory are written only with `out`. A
    length refused by a model is left out.

    Args:
        models: run folders, folders or hub names of causal language models, modules in memory.
        corpus: a prepared corpus; by default the corpus of each run's training.
        lengths: tokens in a window; by default the training length, doubled up to 16 times.
        protocol: `last`, `sliding` or `non_overlapping` (`dape.evaluate.protocols`).
        stride: tokens between windows of `sliding`.
        split: split of the corpus.
        documents: largest number of documents, drawn among documents longer than the longest
            window.
        blocks: largest number of blocks of scored tokens in a document.
        bos: put the model's token for the beginning of a text in place of a window's first token.
        metric: number to compare models by; only `bits_per_byte` allows different corpora.
        seed: seed of the choice of documents.
        device: device of models loaded from files.
        precision: precision of products, `fp32` or `bf16`; `auto` is the precision of the training
            on a GPU, `fp32` on a CPU. A model of others takes the precision of the runs beside it.
        batch_tokens: most tokens in a forward pass; a longer window goes alone.
        out: folder for all results; the folder of each model by default.
        again: measure finished lengths again.
        partial_weights: accept model files with missing or unused weights.
        tokenizer: tokenizer of the modules in memory, equal to the tokenizer of the corpus.
        command: command to record with the results.
        watch: receiver of the progress.
        context_parallel: devices that share a window. The process of every device calls this
            function, and the first process keeps the results.

    Returns:
        An evaluation for each model, in the order of `models`.

    Raises:
        UserError: for models, a corpus, lengths or options that do not fit together, unwritable
            results, or too little memory.
    """
    check_whole(0, seed=seed)
    check_whole(documents=documents, blocks=blocks, batch_tokens=batch_tokens)
    opened = open_models(models, tokenizer, partial_weights, watch)
    _check_models(opened, bos, spread=context_parallel is not None)
    asked = chosen_lengths(lengths, opened)
    plan_of = partial(
        plan,
        split=split,
        protocol=protocol_of(protocol, asked, stride),
        lengths=asked,
        documents=documents,
        blocks=blocks,
        seed=seed,
        bos=bos,
    )
    plans = _plans([model.corpus(corpus) for model in opened], metric, plan_of)
    chosen = choose_device(device)
    made = origins(opened, chosen, precision, command=command, seed=seed)
    place = (protocol, stride, split)
    first = context_parallel is None or context_parallel.rank == 0
    folders_of = results_folders(opened, out, lambda each: [each.evaluation(*place)], writes=first)
    with folders_of as folders:
        watch.begin(sum(each.tokens for each in plans))
        found = [
            _Session(
                model,
                each,
                Kept(folder.evaluation(*place) if folder else None, load, writes=first),
                chosen,
                batch_tokens,
                its,
                watch,
                context_parallel,
            ).run(again)
            for model, each, folder, its in zip(opened, plans, folders, made, strict=True)
        ]
    note_unchecked(opened, watch)
    return found


def _check_models(models: Sequence[Model], bos: bool, spread: bool) -> None:
    """Refuse models without a token for `bos`, or whose windows several devices cannot share."""
    if spread:
        for model in models:
            model.check_spread()
    if bos:
        for model in models:
            model.beginning()


def _plans(corpora: Sequence[Corpus], metric: str, plan_of: Callable[[Corpus], Plan]) -> list[Plan]:
    """Return a plan for each corpus; equal corpora share a plan."""
    unique = {each.checksum: each for each in corpora}
    if metric != "bits_per_byte" and len(unique) > 1:
        raise UserError(
            f"{metric} cannot be compared over different corpora or tokenizers "
            f"({', '.join(sorted({str(each.folder) for each in corpora}))}); give --data, "
            "--metric bits_per_byte, or evaluate the runs separately"
        )
    plans = {checksum: plan_of(each) for checksum, each in unique.items()}
    return [plans[each.checksum] for each in corpora]


@dataclass(frozen=True, slots=True)
class _Session:
    """The evaluation of a model by a plan."""

    model: Model
    plan: Plan
    kept: Kept[Evaluation]
    device: torch.device
    batch_tokens: int
    origin: dict[str, Any]
    watch: Watch
    context_parallel: ContextParallel | None

    @property
    def name(self) -> str:
        return str(self.model.folder)

    def run(self, again: bool) -> Evaluation:
        """Return the evaluation, with earlier measurements unless `again`."""
        asked = {windows.length for windows in self.plan.windows}
        self.kept.note_lost(
            self.model,
            self.watch,
            self.origin,
            lambda each: each.targets == self.plan.targets and {*each.lengths} <= asked,
        )
        done = None if again else self._before()
        if self.context_parallel is not None:  # other machines may see other files
            done, first = self.context_parallel.of_first((done, self.plan.targets.data))
            check_same(self.plan.corpus.folder, self.plan.targets.data, first)
        missing = [
            each for each in self.plan.windows if not done or each.length not in done.lengths
        ]
        if done is not None:
            self._announce(done)
        if missing or done is None:
            longest = max(windows.length for windows in self.plan.windows)
            precision = self.origin["precision"]
            with self.model.loaded(self.device, longest, precision) as network:
                self._check_weights(network)
                done = done or self._empty(self.model.subject(network))
                for windows in missing:
                    done = self._with(done, windows, network)
                    self.kept.keep(done)
        self.kept.finish(done)
        return done

    def _check_weights(self, network: nn.Module) -> None:
        """Refuse weights unlike those of the first of several processes."""
        from dape.model.loading import fingerprint

        if self.context_parallel is not None:
            own = fingerprint(network)
            check_same(self.model.source, own, self.context_parallel.of_first(own))

    def _empty(self, subject: Subject) -> Evaluation:
        return Evaluation(subject, self.plan.targets, [], self.origin)

    def _with(self, done: Evaluation, windows: Windows, network: nn.Module) -> Evaluation:
        """Return the evaluation with a further length."""
        try:
            measurement = self._measure(windows, network)
        except Refused as reason:
            self.watch.announce(self.name, windows.length, f"refused: {reason}")
            self.watch.advance(windows.tokens)
            return replace(done, refused={**done.refused, windows.length: str(reason)})
        outcome = f"perplexity {measurement.perplexity:,.2f}"
        self.watch.announce(self.name, windows.length, outcome)
        measured = {**done.by_length, windows.length: measurement}
        return replace(done, measurements=[measured[length] for length in sorted(measured)])

    def _measure(self, windows: Windows, network: nn.Module) -> Measurement:
        with self.model.refusing(network):
            losses = token_losses(
                network,
                self.plan.corpus.split(self.plan.split).document,
                windows,
                batch_tokens=self.batch_tokens,
                begin=self.model.beginning() if self.plan.targets.bos else None,
                device=device_of(network, self.device),
                precision=PRECISIONS[self.origin["precision"]],
                advance=self.watch.advance,
                context_parallel=self.context_parallel,
            )
        return measure(losses, windows, self.plan.bytes)

    def _before(self) -> Evaluation | None:
        """Return earlier measurements of the same model and tokens, with the same settings."""
        found = self.kept.before(
            self.model, self.origin, lambda each: each.targets == self.plan.targets
        )
        if not found:
            return None
        asked = {windows.length for windows in self.plan.windows}
        measured = {n: one for each in found for n, one in each.by_length.items() if n in asked}
        refused = {n: why for each in found for n, why in each.refused.items() if n in asked}
        return replace(
            found[-1],
            measurements=[measured[length] for length in sorted(measured)],
            refused=refused,
            provenance=self.origin,
        )

    def _announce(self, before: Evaluation) -> None:
        for windows in self.plan.windows:
            if windows.length in before.lengths:
                self.watch.announce(self.name, windows.length, KEPT)
                self.watch.advance(windows.tokens)
