"""What came of a trial."""

from dataclasses import dataclass

from trial import Outcome


@dataclass(frozen=True, slots=True)
class Result:
    """A trial of a part: what was tried, how it ended, and what is wrong with that, if anything."""

    part: str
    kind: str
    name: str
    outcome: str
    fault: str = ""


def judged(part: str, kind: str, name: str, outcome: Outcome, *wanted: str) -> Result:
    """Return the result of a trial that should end in one of the ways `wanted`."""
    fault = "" if outcome.kind in wanted else f"{outcome.kind}: {outcome.last[:300]}"
    return Result(part, kind, name, outcome.kind, fault)
