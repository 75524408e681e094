"""Perplexity over length of several models, on the same tokens, each length kept as it is done."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dape.attention.context_parallel import ContextParallel
from dape.data.shards import Corpus
from dape.device import choose_device, device_of
from dape.errors import UserError, unknown
from dape.evaluate.lengths import default_lengths
from dape.evaluate.opening import Given, open_models
from dape.evaluate.perplexity import Measurement, measure, token_losses
from dape.evaluate.plan import Plan, plan
from dape.evaluate.protocols import Windows
from dape.evaluate.protocols import protocol as protocol_of
from dape.evaluate.record import Evaluation, load
from dape.evaluate.refusal import Refused
from dape.evaluate.results import results_folders
from dape.evaluate.subject import PRECISIONS, Model, Subject
from dape.evaluate.watch import SILENT, Watch
from dape.files import remove
from dape.provenance import provenance
from dape.runs import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A measurement made otherwise, with other versions or elsewhere is not taken for one of today.
_SAME = ("commit", "versions", "device", "precision")


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

    A result file receives each length as soon as the length is measured, and a repeated call reads
    finished lengths from the file. Results of modules in memory are written only with `out`. A
    length that a model refuses is left out.

    Args:
        models: run folders, folders or hub names of causal language models, modules in memory.
        corpus: a prepared corpus; by default the corpus of each run's training.
        lengths: tokens in a window; by default the training length, doubled up to 16 times.
        protocol: `last`, `sliding` or `non_overlapping` (`dape.evaluate.protocols`).
        stride: tokens between windows of `sliding`.
        split: split of the corpus.
        documents: largest number of documents, drawn among those longer than the longest window.
        blocks: largest number of blocks of scored tokens in a document.
        bos: put the model's token for the beginning of a text in place of a window's first token.
        metric: number to compare models by; only `bits_per_byte` allows different corpora.
        seed: seed of the choice of documents.
        device: device of models that are not in memory.
        precision: precision of products, `fp32` or `bf16`; `auto` is that of the training on a GPU.
        batch_tokens: most tokens in a forward pass; a longer window goes alone.
        out: folder for all results; the folder of each model by default.
        again: measure finished lengths again.
        partial_weights: accept model files with missing or unused weights.
        tokenizer: tokenizer of the modules in memory, equal to that of the corpus.
        command: command to record with the results.
        watch: receiver of the progress.
        context_parallel: devices that share each window. The process of each device calls this
            function, and the first process keeps the results.

    Returns:
        An evaluation for each model, in the order of `models`.

    Raises:
        UserError: for models, a corpus, lengths or options that do not fit together, results that
            cannot be written, and if memory runs out.
    """
    opened = open_models(models, tokenizer, partial_weights, watch)
    if context_parallel is not None:
        for model in opened:
            model.check_spread()
    if bos:
        for model in opened:
            model.beginning()
    asked = sorted(set(lengths or default_lengths(opened)))
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
    folders = results_folders(opened, out, lambda each: each.evaluation(protocol, stride, split))
    files = [_files(folder, protocol, stride, split) for folder in folders]
    chosen = choose_device(device)
    origin = provenance(chosen) | {"command": command, "seed": seed}
    made = partial(_made, origin=origin, precision=precision, device=chosen)
    watch.begin(sum(each.tokens for each in plans))
    return [
        _Session(model, each, file, chosen, batch_tokens, made(model), watch, context_parallel).run(
            again
        )
        for model, each, file in zip(opened, plans, files, strict=True)
    ]


def _made(
    model: Model, origin: dict[str, Any], precision: str, device: torch.device
) -> dict[str, Any]:
    """Return where a measurement of a model comes from, with the precision of its products."""
    if precision not in (*PRECISIONS, "auto"):
        raise unknown("precision", precision, (*PRECISIONS, "auto"))
    chosen = model.precision(device) if precision == "auto" else precision
    return origin | {"precision": chosen}


def _plans(corpora: Sequence[Corpus], metric: str, plan_of: Callable[[Corpus], Plan]) -> list[Plan]:
    """Return a plan for each corpus; equal corpora share one."""
    unique = {each.checksum: each for each in corpora}
    if metric != "bits_per_byte" and len(unique) > 1:
        raise UserError(
            f"{metric} cannot be compared over different corpora or tokenizers "
            f"({', '.join(sorted({str(each.folder) for each in corpora}))}); give one --data, "
            "--metric bits_per_byte, or evaluate the runs one by one"
        )
    plans = {checksum: plan_of(each) for checksum, each in unique.items()}
    return [plans[each.checksum] for each in corpora]


@dataclass(frozen=True, slots=True)
class _Files:
    """The file of an evaluation, and the file of measured lengths until all are finished."""

    finished: Path
    unfinished: Path

    def read(self) -> Iterator[Evaluation]:
        """Yield what is kept; what cannot be read is measured anew."""
        for file in (self.finished, self.unfinished):
            with suppress(UserError):
                yield load(file)

    def finish(self, evaluation: Evaluation) -> None:
        """Write the whole evaluation."""
        evaluation.save(self.finished)
        remove(self.unfinished)


def _files(folder: RunFolder | None, *place: Any) -> _Files | None:
    if folder is None:
        return None
    return _Files(folder.evaluation(*place), folder.unfinished(*place))


@dataclass(frozen=True, slots=True)
class _Session:
    """The evaluation of one model by one plan; `files` keep it, if anything does."""

    model: Model
    plan: Plan
    files: _Files | None
    device: torch.device
    batch_tokens: int
    origin: dict[str, Any]
    watch: Watch
    context_parallel: ContextParallel | None

    @property
    def keeper(self) -> "_Files | None":
        """The files, where this process is the one that writes them."""
        first = self.context_parallel is None or self.context_parallel.rank == 0
        return self.files if first else None

    @property
    def name(self) -> str:
        return str(self.model.folder)

    def run(self, again: bool) -> Evaluation:
        """Return the evaluation, with what was measured before unless all is asked for again."""
        done = None if again else self._before()
        if self.context_parallel is not None:  # nothing is written until all have read
            self.context_parallel.sum(torch.zeros((), device=self.device))
        missing = [
            each for each in self.plan.windows if not done or each.length not in done.lengths
        ]
        if done is not None:
            self._announce(done)
        if missing or done is None:
            longest = max(windows.length for windows in self.plan.windows)
            with self.model.loaded(self.device, longest) as network:
                done = done or self._empty(self.model.subject(network))
                for windows in missing:
                    done = self._with(done, windows, network)
                    if self.keeper is not None:
                        done.save(self.keeper.unfinished)
        if self.keeper is not None:
            self.keeper.finish(done)
        return done

    def _empty(self, subject: Subject) -> Evaluation:
        return Evaluation(subject, self.plan.targets, [], self.origin)

    def _with(self, done: Evaluation, windows: Windows, network: nn.Module) -> Evaluation:
        """Return the evaluation with one more length."""
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
        with self.model.refusing():
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
        """Return what was measured before of the same model and tokens, the same way."""
        if self.files is None or self.model.weights is None:
            return None
        found = [each for each in self.files.read() if self._same(each)]
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

    def _same(self, before: Evaluation) -> bool:
        then, now = before.provenance, self.origin
        return (
            before.subject.weights == self.model.weights
            and before.subject.run == self.name
            and before.targets == self.plan.targets
            and all(then.get(name) == now[name] for name in _SAME)
        )

    def _announce(self, before: Evaluation) -> None:
        for windows in self.plan.windows:
            if windows.length in before.lengths:
                self.watch.announce(
                    self.name, windows.length, "measured before; --again repeats it"
                )
                self.watch.advance(windows.tokens)
