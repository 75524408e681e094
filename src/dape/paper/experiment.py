"""An experiment is data: sweeps, and the claims of the paper that they decide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dape.paper.cells import Cell, Setting, Sweep, once
from dape.paper.claims import Claim


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table and a figure for each setting of its sweeps, and the claims they decide.

    `shows` says what it reproduces; the table lies in `folder`, records of cells in `home`, which
    experiments share.
    """

    name: str
    title: str
    shows: str
    sweeps: tuple[Sweep, ...]
    claims: tuple[Claim, ...] = ()
    home: Path = Path("results/paper")

    @property
    def folder(self) -> Path:
        """Return where table, figures and verdicts go."""
        return self.home if self.home.name == self.name else self.home / self.name

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Return the settings of all sweeps, each once."""
        return tuple(dict.fromkeys(s for sweep in self.sweeps for s in sweep.settings))

    def cells(self, data: Mapping[str, str] | None = None) -> list[Cell]:
        """Return the cells of all sweeps, each once."""
        return once(cell for sweep in self.sweeps for cell in sweep.cells(self.home, data or {}))


def smoke(experiment: Experiment) -> Experiment:
    """Return the experiment in miniature: every arm once, on a tiny model, a CPU and bytes."""

    def tiny(setting: Setting) -> Setting:
        return Setting("smoke", "python-stdlib", 32, 2**13)

    sweeps = tuple(
        Sweep("smoke", ("python-stdlib",), (32,), sweep.arms, tokens=(2**13,), reads="32,...,512")
        for sweep in experiment.sweeps
    )
    claims = tuple(claim.moved(tiny) for claim in experiment.claims)
    return replace(experiment, sweeps=sweeps, claims=claims, home=Path("runs/smoke"))
