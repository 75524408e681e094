"""Files that are cut, empty, garbage, of other fields, or no files."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from result import Result
from stage import copied, differences, state, undisturbed
from trial import dape, run

_NOBODY = 65534
# Commands that read a folder: words, and what they fill.
READERS = {
    "part": (("train r.yaml --out part", "part"), ("export part --out new", "new")),
    "ref": (
        ("eval ref --lengths 16,32 --out new", "new"),
        ("eval retrieval ref --lengths 64 --trials 1 --out new", "new"),
        ("export ref --out new", "new"),
        ("plot ref --out new/a.md", "new"),
        ("train r.yaml --out ref", "ref"),
    ),
    "tuned": (("eval tuned --lengths 16,32 --out new", "new"),),
    "encoders": (
        ("chomsky map encoders --task parity-check --scheme dape-kerple --out new/a.md", "new"),
        ("chomsky train c.yaml --device cpu --out encoders", "encoders"),
        ("chomsky table c.yaml --out encoders", "encoders"),
    ),
    "data": (("train r.yaml --out new", "new"), ("eval ref --lengths 16,32 --out new", "new")),
}


def _remove(path: Path) -> None:
    path.unlink()


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, change)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "gone": _remove,
    "a folder": _folder,
    "a pipe": _pipe,
    "a link to itself": _loop,
    "empty": _bytes(lambda content: b""),
    "cut": _bytes(lambda content: content[: len(content) // 2]),
    "cut at its end": _bytes(lambda content: content[:-1]),
    "garbage": _bytes(lambda content: bytes(range(256)) * (1 + len(content) // 256)),
    "a byte flipped": _bytes(
        lambda content: (
            content[: len(content) // 2]
            + bytes([content[len(content) // 2] ^ 1])
            + content[len(content) // 2 + 1 :]
        )
    ),
    "an empty object": _bytes(lambda content: b"{}"),
    "null": _bytes(lambda content: b"null"),
    "deep": _bytes(lambda content: b"[" * 100_000),
}


def damaged(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each reader of each file with each damage.

    A command may say what is wrong, or do without the file: then its result is as without damage.
    """
    for source, readers in READERS.items():
        expected = {words: undisturbed(stage, room, words, target)[1] for words, target in readers}
        trials = [
            (file.relative_to(stage), damage, reader)
            for file in sorted((stage / source).rglob("*"))
            if file.is_file() and "tensorboard" not in file.parts
            for damage in (*DAMAGES, *_fields(file))
            # Tokens alone have checksums.
            if damage != "a byte flipped" or file.suffix in (".bin", ".npy")
            for reader in readers
        ]
        for file, damage, (words, target) in trials[::every]:
            with copied(stage, room / "damaged") as folder:
                _damage(folder / file, damage)
                outcome = run(dape(*words.split()), folder)
                fault = ""
                if outcome.kind not in ("accepted", "refused"):
                    fault = f"{outcome.kind}: {outcome.last[:300]}"
                elif outcome.kind == "accepted" and not _tells(outcome.text, file):
                    (folder / file).unlink() if (folder / file).is_symlink() else None
                    place = folder / target
                    found = _differences(expected[words], place, str(file), target, damage)
                    fault = f"differs: {', '.join(found[:3])}" if found else ""
                yield Result("damaged", source, f"{file} {damage}, {words}", outcome.kind, fault)


def _tells(text: str, file: Path) -> bool:
    """Return whether an output names a file, or the checkpoint that it is of."""
    return any(str(place) in text for place in (file, *file.parents) if len(place.parts) > 2)


def _differences(
    expected: dict[str, Any], folder: Path, file: str, target: str, damage: str
) -> list[str]:
    """Return the files that differ, but for the damaged one itself and copies of it."""
    # Pages show what the record and the metrics of a run say, and an evaluation that is there.
    pages = file.endswith(("run.json", "metrics.jsonl"))
    pages |= "evaluation" in file and damage in ("gone", "text in run", "text in scheme")
    told = ("README.md", "a.md") if pages else ()
    # A benchmark without a cell is one that is not finished, as its table says.
    if "cells" in file and damage == "gone":
        told = ("lengths.svg", "scores.svg", "training.svg", "table.md")
    # Settings beside the weights are copied as they are.
    if Path(file).parent.name in ("model", "tokenizer"):
        told = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    states = [expected, state(folder)]
    if Path(file).name == "tokenizer_config.json":
        states = [_without_tokenizer(each) for each in states]
    found = differences(*states)
    return [x for x in found if f"{target}/{x}" != file and Path(x).name not in told]


def _without_tokenizer(files: dict[str, Any]) -> dict[str, Any]:
    """Return files without the checksum of the tokenizer, which a record of passkeys has."""
    return {
        name: {key: content[key] for key in content if key != "tokenizer"}
        if Path(name).name == "passkey.json" and isinstance(content, dict)
        else content
        for name, content in files.items()
    }


def _fields(file: Path) -> list[str]:
    """Return the damages of the fields of a JSON object."""
    if file.suffix != ".json":
        return []
    content = json.loads(file.read_text())
    return [f"{form} {name}" for name in content for form in ("without", "null", "text in")]


def _damage(file: Path, damage: str) -> None:
    if damage in DAMAGES:
        DAMAGES[damage](file)
        return
    form, _, name = damage.rpartition(" ")
    content = json.loads(file.read_text())
    if form == "without":
        del content[name]
    else:
        content[name] = None if form == "null" else "some text"
    file.write_text(json.dumps(content))


def unreadable(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of files that another user may not read."""
    for source, readers in READERS.items():
        files = [file for file in sorted((stage / source).rglob("*")) if file.is_file()]
        for file in files[:: 2 * every]:
            for words, _ in readers:
                with copied(stage, room / "closed") as folder:
                    for each in (folder, *folder.rglob("*")):
                        shutil.chown(each, _NOBODY, _NOBODY)
                    (folder / file.relative_to(stage)).chmod(0)
                    outcome = run(dape(*words.split()), folder, uid=_NOBODY)
                name = f"{file.relative_to(stage)}, {words}"
                fault = "" if outcome.kind in ("accepted", "refused") else outcome.last[:300]
                yield Result("damaged", "unreadable", name, outcome.kind, fault)
