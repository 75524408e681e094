"""The record of a benchmark, `results.json`."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dape.errors import UserError
from dape.files import read_json, write_json
from dape.provenance import Provenance
from dape.strict import Number, build

FORMAT = 1
# Reasons of a missing number.
NOT_SERVED, OUT_OF_MEMORY, FAILED = "not served", "out of memory", "failed"
# Medians over fastest runs on an H200: at most 1.05 inside CUDA graphs, and 1.19 beside tests on
# the same GPU.
STEADY = 1.1


@dataclass(frozen=True, slots=True)
class Missing:
    """The reason of a missing number: `not served`, `out of memory` or `failed`, with details."""

    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Check:
    """The errors of a method against float64, on `batch` sequences of `checked` tokens.

    `errors` are relative Frobenius norms of the errors of output and gradients, and `limits` the
    allowed errors. `missing` gives the reason of absent errors.
    """

    method: str
    length: int
    direction: str
    batch: int
    checked: int
    errors: dict[str, Number] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    missing: Missing | None = None

    @property
    def worst(self) -> str:
        """Return the tensor with the largest ratio of error to limit; NaN is the largest."""
        return max(self.errors, key=lambda name: (not self.within(name), self.share(name)))

    def within(self, name: str) -> bool:
        """Return whether the error of a tensor is within the limit."""
        return self.errors[name] <= self.limits[name]

    def share(self, name: str) -> float:
        """Return the error of a tensor divided by the limit."""
        return self.errors[name] / self.limits[name]


@dataclass(frozen=True, slots=True)
class Entry:
    """A method at a length: milliseconds of a call, and bytes at the peak beyond the inputs.

    `milliseconds` is the median over `runs` of `calls` calls, between `fastest` and `slowest`.
    `clock` names the clock. `peak` is None on a CPU. `eager` and `launches` accompany a time inside
    a CUDA graph. `missing` gives the reason if all numbers are None.
    """

    method: str
    length: int
    batch: int
    direction: str
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    runs: int = 0
    calls: int = 0
    clock: str = ""
    peak: int | None = None
    missing: Missing | None = None
    eager: float | None = None
    launches: int | None = None

    @property
    def unsteady(self) -> tuple[float, float] | None:
        """Return the fastest and the slowest run if the median is far above the fastest."""
        if self.milliseconds is None or self.fastest is None or self.slowest is None:
            return None
        return (self.fastest, self.slowest) if self.milliseconds > STEADY * self.fastest else None


@dataclass(frozen=True, slots=True)
class Results:
    """All entries of a command, with checks and provenance.

    `yardstick` is the backend chosen by PyTorch's attention.
    """

    scheme: str
    shape: str
    heads: int
    head_dim: int
    dtype: str
    tokens: int
    seed: int
    provenance: Provenance
    yardstick: str = ""
    checks: list[Check] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    format: int = FORMAT

    @property
    def lengths(self) -> list[int]:
        """Return the lengths in the order of measurement."""
        return list(dict.fromkeys(entry.length for entry in self.entries))

    @property
    def methods(self) -> list[str]:
        """Return the names of the methods in the order of measurement."""
        return list(dict.fromkeys(entry.method for entry in self.entries))

    def entry(self, method: str, length: int, direction: str) -> Entry | None:
        """Return an entry, or None."""
        asked = (method, length, direction)
        found = (e for e in self.entries if (e.method, e.length, e.direction) == asked)
        return next(found, None)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, asdict(self))


def load(path: Path) -> Results:
    """Read a file of `Results.save`.

    Raises:
        UserError: for a missing file, or a file of another version or program.
    """
    remedy = "measure again with `dape bench attention`"
    if not path.exists():
        raise UserError(f"{path}: the results are missing; {remedy}")
    return read_json(path, _results, remedy)


def _results(content: dict[str, Any]) -> Results:
    if content.get("format") != FORMAT:
        raise UserError(f"not results of format {FORMAT}")
    results: Results = build(Results, content)
    return results
