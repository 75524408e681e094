"""A study: all arms of a regime, measured on the test texts of a corpus."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dape.errors import UserError
from dape.evaluate.compare import Group, check_comparable
from dape.evaluate.record import Evaluation, load
from dape.paper import record
from dape.paper.cells import Cell, Regime, by_regime
from dape.paper.sweep import MEASURED_ON, evaluation

RISEN = 0.01  # a training was too long from this rise of the validation loss, in nats


@dataclass(frozen=True, slots=True)
class Study:
    """The finished cells of a regime, and the cells that failed because of the model.

    `groups` holds the evaluations by arm, and `errors` the reasons of failed cells by name.
    """

    regime: Regime
    corpus: str
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    errors: Mapping[str, str]

    @property
    def name(self) -> str:
        """Return the name, as `125m-mixed-128-150M-on-books`."""
        own = self.corpus == self.regime.corpus
        return self.regime.name if own else f"{self.regime.name}-on-{self.corpus}"

    @property
    def arms(self) -> list[str]:
        """Return the arms of the cells, in order of appearance."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))

    def group(self, arm: str) -> Group | None:
        """Return the evaluations of an arm, or None."""
        return next((each for each in self.groups if each.label == arm), None)

    @property
    def corpus_checksum(self) -> str:
        """Return the checksum of the training corpus."""
        return record.read(self.cells[0]).checksum or ""

    def repeated_too_often(self) -> list[str]:
        """Return the arms and seeds with a rise of the validation loss, with both losses."""
        found = []
        for cell in self.cells:
            if cell.name in self.errors:  # diverged, or not measured
                continue
            losses = [
                s["validation_loss"] for s in cell.record.read_metrics() if "validation_loss" in s
            ]
            if losses and losses[-1] > min(losses) + RISEN:
                found.append(f"{cell.name} from {min(losses):.3f} to {losses[-1]:.3f}")
        return found


def studies(ended: Sequence[Cell]) -> list[Study]:
    """Return the studies of finished and failed cells.

    Raises:
        UserError: for cells of a regime trained on different corpora, or evaluations in a study
            with different scored tokens.
    """
    found = []
    for regime, cells in by_regime(ended).items():
        _check_corpus(cells)
        errors = {cell.name: error for cell in cells if (error := record.read(cell).error)}
        finished = [cell for cell in cells if cell.name not in errors]
        found += [
            Study(regime, corpus, tuple(cells), _groups(finished, regime, corpus), errors)
            for corpus in MEASURED_ON.get(regime.corpus, (regime.corpus,))
        ]
    return found


def _check_corpus(cells: Sequence[Cell]) -> None:
    """Refuse cells of a regime with different corpora, which a machine without corpora cannot see.

    Raises:
        UserError: naming two cells.
    """
    first, *others = cells
    for other in others:
        if record.read(other).checksum != record.read(first).checksum:
            raise UserError(
                f"{other.name} and {first.name} were trained on corpora with different checksums;"
                " remove the record of one, and run the cell again"
            )


def _groups(cells: Sequence[Cell], regime: Regime, corpus: str) -> tuple[Group, ...]:
    by_arm: dict[str, list[Evaluation]] = {}
    kept = evaluation(regime, corpus)
    for cell in cells:
        if not any(kept in each.keeps for each in cell.commands):  # the training loss alone
            continue
        found = load(cell.record.path / kept)
        by_arm.setdefault(cell.arm, []).append(found)
    if by_arm:
        check_comparable([each for arm in by_arm.values() for each in arm], "perplexity")
    return tuple(Group(arm, tuple(found)) for arm, found in by_arm.items())
