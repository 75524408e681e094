"""Runs that are killed, at every file event, and given again; and two at once."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from result import Result
from stage import copied, differences, state, undisturbed
from trial import Outcome, Trial, dape, run

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
    "plot learned": ("plot learned ref --length 16 --out new/a.json new/a.md", "new"),
    "explore": ("explore ref --length 16 --out new/a.html", "new"),
    "chomsky train": ("chomsky train c.yaml --device cpu --out new", "new"),
}


def kills(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each command that is killed at a file event, again at another, and then
    given a third time."""
    for name, (words, target) in COMMANDS.items():
        action = dape(*words.split())
        events, expected = undisturbed(stage, room, words, target)
        for number in range(1, events + 1, every):
            with copied(stage, room / "kill") as folder:
                first = run(action, folder, at=number)
                second = run(action, folder, at=1 + 7 * number % events)
                last = run(action, folder)
                killed = [each.kind for each in (first, second)].count("killed")
                fault = _fault(last, expected, folder / target)
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
        events, expected = undisturbed(stage, room, words, target)
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


def _fault(last: Outcome, expected: dict[str, object], folder: Path) -> str:
    """Return what is wrong with the last start, if anything.

    A command that was killed behind its end may refuse to write over its whole result.
    """
    found = differences(expected, state(folder))
    behind = last.kind == "refused" and "not empty" in last.last and not found
    if last.kind != "accepted" and not behind:
        return f"{last.kind}: {last.last}"
    return f"differs: {', '.join(found[:3])}" if found else ""
