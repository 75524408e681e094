"""An experiment is data: sweeps, and the claims of the paper that they decide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dape.paper.cells import Cell, Setting, once
from dape.paper.claims import Claim
from dape.paper.encoders import Encoders
from dape.paper.sweep import TINY, Bench, Sweep, Tuning

Part = Sweep | Tuning | Bench | Encoders


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table and a figure for each setting of its parts, and the claims they decide.

    `shows` says what it reproduces, `sections` what its results are (`results.SECTIONS`). They lie
    in `folder`, records of cells in `home`, which experiments share.
    """

    name: str
    title: str
    shows: str
    parts: tuple[Part, ...]
    claims: tuple[Claim, ...] = ()
    home: Path = Path("results/paper")
    sections: tuple[str, ...] = ("curves",)

    @property
    def folder(self) -> Path:
        """Return where table, figures and verdicts go."""
        return self.home if self.home.name == self.name else self.home / self.name

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return the settings of all parts, each once."""
        return tuple(dict.fromkeys(setting for part in self.parts for setting in part.settings))

    def cells(self, data: Mapping[str, str] | None = None) -> list[Cell]:
        """Return the cells of all parts, each once."""
        return once(cell for part in self.parts for cell in part.cells(self.home, data or {}))


def smoke(experiment: Experiment) -> Experiment:
    """Return the experiment in miniature: every arm once, on a tiny model, a CPU and bytes."""
    return replace(
        experiment,
        parts=tuple(part.tiny() for part in experiment.parts),
        claims=tuple(claim.moved(lambda setting: TINY) for claim in experiment.claims),
        home=Path("runs/smoke"),
    )
