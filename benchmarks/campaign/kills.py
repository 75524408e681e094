"""Runs that are killed, at every file event, and given again; and two at once."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from result import Result
from stage import copied, differences, must, state
from trial import Trial, dape, run

# A command by name: its words, and the folder that it fills.
COMMANDS = {
    "prepare": ("prepare text --out new --workers 1", "new"),
    "train": ("train r.yaml --out new", "new"),
    "retrofit": (
        "retrofit base/model --data data --out new --training.length 16 --training.batch-size 4"
        " --training.steps 4 --training.precision fp32 --hardware.device cpu"
        " --tracking.validate-every 2 --tracking.validation-batches 1"
        " --tracking.checkpoint-every 2 --lengths 16,32",
        ".",
    ),
    "eval": ("eval ref --lengths 16,32,64 --out new", "new"),
    "eval context": ("eval context ref --lengths 16,32 --out new", "new"),
    "eval retrieval": (
        "eval retrieval ref --tasks passkey,needle --lengths 64,128 --trials 1 --out new",
        "new",
    ),
    "eval harness": (
        "eval harness ref --tasks letters --include-path tasks --lengths 8,16 --out new",
        "new",
    ),
    "export": ("export ref --out new", "new"),
    "plot": ("plot ref --out new/a.html", "new"),
}


def kills(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each command that is killed at a file event, again at another, and then
    given a third time."""
    for name, (words, target) in COMMANDS.items():
        action = dape(*words.split())
        with copied(stage, room / "whole") as whole:
            events = must(run(action, whole)).events
            expected = state(whole / target)
        for number in range(1, events + 1, every):
            with copied(stage, room / "kill") as folder:
                first = run(action, folder, at=number)
                second = run(action, folder, at=1 + 7 * number % events)
                last = run(action, folder)
                killed = [each.kind for each in (first, second)].count("killed")
                fault = _fault(last.kind, last.last, expected, folder / target, "accepted")
                yield Result(
                    "kills",
                    name,
                    f"event {number}",
                    ("not killed", "killed once", "killed twice")[killed],
                    fault,
                )


def two_at_once(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of a command that is given while another stands still at a file event."""
    for name, (words, target) in COMMANDS.items():
        action = dape(*words.split())
        with copied(stage, room / "whole") as whole:
            events = must(run(action, whole)).events
            expected = state(whole / target)
        for number in range(1, events + 1, 2 * every):
            with copied(stage, room / "two") as folder:
                first = Trial(action, folder, at=number, stroke=signal.SIGSTOP)
                if not first.stopped():
                    continue
                second = run(action, folder)
                first.go_on()
                end = first.outcome()
                kinds = sorted((end.kind, second.kind))
                fault = ""
                if kinds not in (["accepted", "accepted"], ["accepted", "refused"]):
                    fault = f"first {end.kind}: {end.last}; second {second.kind}: {second.last}"
                found = differences(expected, state(folder / target))
                if not fault and found:
                    fault = f"differs: {', '.join(found[:3])}"
                yield Result("two at once", name, f"event {number}", " and ".join(kinds), fault)
    shutil.rmtree(room / "two", ignore_errors=True)


def _fault(kind: str, line: str, expected: dict[str, object], folder: Path, wanted: str) -> str:
    if kind != wanted:
        return f"{kind}: {line}"
    found = differences(expected, state(folder))
    return f"differs: {', '.join(found[:3])}" if found else ""
