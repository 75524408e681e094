"""Files of someone else: code in them, names that a terminal obeys, what never ends."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from result import Result
from stage import copied
from trial import dape, run

_CANARY = "canary"  # a file that hostile code makes
_ESCAPE = "\x1b[31m<script>alert(1)</script> $x_1$ |\n# a"


class _Code:
    """Makes the canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (_CANARY,)


def _pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(name):
            file.write_bytes(pickle.dumps(_Code()))

    return change


def _torch_pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(name):
            torch.save({"model": _Code()}, file)

    return change


def _instead_of_safetensors(folder: Path) -> None:
    (folder / "ref/model/model.safetensors").unlink()
    torch.save({"a": _Code()}, folder / "ref/model/pytorch_model.bin")


def _huge_header(folder: Path) -> None:
    for file in folder.glob("ref/model/model.safetensors"):
        file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def _array_of_objects(folder: Path) -> None:
    for file in folder.glob("data/*.idx.npy"):
        with file.open("wb") as handle:
            np.save(handle, np.array([_Code()], dtype=object), allow_pickle=True)


def _own_code(type_of_model: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        code = f"import os; os.mkdir({_CANARY!r})\n"
        (folder / "ref/model/modeling_dape.py").write_text(code)
        _edit(folder / "ref/model/config.json", model_type=type_of_model)

    return change


def _edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _yaml_code(folder: Path) -> None:
    (folder / "r.yaml").write_text(f"name: !!python/object/apply:os.mkdir [{_CANARY}]\n")


def _bomb(folder: Path) -> None:
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (folder / "r.yaml").write_text("a0: &a0 [1]\n" + "\n".join(rows) + "\n")


def _names(folder: Path) -> None:
    _edit(folder / "ref/evaluation/last.json", scheme=_ESCAPE, run=_ESCAPE)


def _pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _endless(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def _cycle(folder: Path) -> None:
    (folder / "text/train/back").symlink_to(folder / "text")


def _document(folder: Path) -> None:
    (folder / "text/train/\x1b[31m\n.txt").write_bytes(b"\xff\xfe")


_TRAIN, _EXPORT = "train r.yaml --out part", "export part --out new"
_EVAL = "eval ref --lengths 16 --out new"
# A kind: how the files are changed, and the commands that read them.
HOSTILE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "pickled metadata": (_pickled("part/checkpoints/*/.metadata"), (_TRAIN, _EXPORT)),
    "pickled shards": (_pickled("part/checkpoints/*/*.distcp"), (_TRAIN, _EXPORT)),
    "objects for tensors": (_torch_pickled("part/checkpoints/*/*.distcp"), (_TRAIN, _EXPORT)),
    "pickled weights": (_instead_of_safetensors, (_EVAL, "export ref --out new")),
    "a huge header": (_huge_header, (_EVAL, "export ref --out new")),
    "an array of objects": (_array_of_objects, (_EVAL, "train r.yaml --out new")),
    "code beside a model of ours": (_own_code("dape"), (_EVAL, "export ref --out new")),
    "code of another model": (_own_code("other"), (_EVAL, "export ref --out new")),
    "code in YAML": (_yaml_code, ("train r.yaml",)),
    "a bomb in YAML": (_bomb, ("train r.yaml",)),
    "names with escapes": (_names, ("plot ref --out new/a.html", "plot ref --out new/a.md")),
    "names with escapes, measured": (_names, ("eval ref --lengths 16,32", "export ref --out new")),
    "a document's name with escapes": (
        _document,
        (
            "prepare text --out new --workers 1 --on-error skip",
            "prepare text --out new --workers 1",
        ),
    ),
    "a pipe for a recipe": (_pipe("r.yaml"), ("train r.yaml",)),
    "a device for a recipe": (_endless("r.yaml"), ("train r.yaml", "train /dev/zero")),
    "a pipe for weights": (_pipe("ref/model/model.safetensors"), (_EVAL,)),
    "a device for weights": (_endless("ref/model/model.safetensors"), (_EVAL,)),
    "a pipe for a record": (_pipe("ref/run.json"), (_EVAL, "train r.yaml --out ref")),
    "a pipe among texts": (_pipe("text/train/a.txt"), ("prepare text --out new --workers 1",)),
    "a device among texts": (_endless("text/train/a.txt"), ("prepare text --out new --workers 1",)),
    "folders in a circle": (_cycle, ("prepare text --out new --workers 1",)),
    "names that lead out": (
        lambda folder: None,
        ("train r.yaml --name ../../x", "train r.yaml --name /", "train r.yaml --name ."),
    ),
}


def hostile(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each hostile file: no code may run, no escape may reach a reader."""
    trials = [
        (kind, change, words)
        for kind, (change, all_words) in HOSTILE.items()
        for words in all_words
    ]
    for kind, change, words in trials[::every]:
        with copied(stage, room / "hostile") as folder:
            change(folder)
            outcome = run(dape(*words.split()), folder)
            pages = [path.read_text() for path in folder.glob("new/*.html")]
            texts = [outcome.text, *pages, *(path.read_text() for path in folder.glob("new/*.md"))]
            fault = ""
            if (folder / _CANARY).exists():
                fault = "code ran"
            elif outcome.kind not in ("accepted", "refused"):
                fault = f"{outcome.kind}: {outcome.last[:300]}"
            elif any("\x1b" in text for text in texts) or any("<script>al" in x for x in pages):
                fault = "an escape reaches a reader"
            yield Result("hostile", kind, words, outcome.kind, fault)
