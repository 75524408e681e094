"""Sources of text: files, folders, datasets, the standard library of Python."""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from platform import python_version
from typing import Any, Literal

from dape.data.hub import reachable
from dape.errors import UserError, first_line, install
from dape.packages import has_package

Kind = Literal["text", "json", "dataset"]

STANDARD_LIBRARY = "python-stdlib"
TEXT = "text"  # the default key of text in JSON lines and datasets
KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".tex": "text",
    ".jsonl": "json",
    ".jsonl.zst": "json",
}
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A file or a split of a dataset, read from front to back.

    `key` identifies a document independent of the folder of the source, and decides the split of
    the document. `size` is in bytes, None if unknown. `split` is None for documents without a named
    split. `text_key` is the key of the text in a JSON object or row.
    """

    location: str
    key: str
    kind: Kind
    size: int | None
    split: str | None
    text_key: str = TEXT


@dataclass(frozen=True, slots=True)
class Source:
    """A named source: parts in a fixed order, and the number of ignored files.

    Files of unknown kind are ignored, and further links to a file of the source.
    """

    name: str
    parts: tuple[Part, ...]
    ignored: int
    details: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry, with a fingerprint of names, sizes and splits."""
        contents = repr([(part.key, part.size, part.split) for part in self.parts])
        return {
            "name": self.name,
            "files": len(self.parts),
            "ignored_files": self.ignored,
            "bytes": sum(part.size or 0 for part in self.parts),
            "fingerprint": hashlib.sha256(contents.encode()).hexdigest(),
            **self.details,
        }


def resolve(name: str, text_key: str = TEXT) -> Source:
    """Return the source `name`: `python-stdlib`, a folder, a file, or a Hugging Face dataset.

    Raises:
        UserError: for an unknown source, or a source without readable files.
    """
    source = _resolve(name)
    return replace(source, parts=tuple(replace(x, text_key=text_key) for x in source.parts))


def _resolve(name: str) -> Source:
    path = Path(name).expanduser()
    if name == STANDARD_LIBRARY:
        return _standard_library()
    if path.is_dir():
        return _folder(name, path)
    if path.is_file():
        if not _kind(path):
            raise UserError(f"source {name!r} is of an unknown kind (known: {', '.join(KINDS)})")
        return Source(name, (_part(path, path.name, path.name),), 0, {})
    if _kind(path) or path.is_absolute() or name.startswith((".", "~")):
        raise UserError(f"no file or folder {name!r}; check the path")
    return _dataset(name)


def _kind(path: Path) -> Kind | None:
    return next((kind for suffix, kind in KINDS.items() if path.name.endswith(suffix)), None)


def _part(path: Path, key: str, names: str) -> Part:
    """Return a part; reading reports a broken link."""
    kind = _kind(path) or "text"
    size = path.stat().st_size if path.exists() else 0
    return Part(str(path), key, kind, size, named_split(names, kind))


def _folder(name: str, folder: Path) -> Source:
    found = list(_files(folder))
    # Neither pipe nor socket, but possibly a broken link, which reading reports.
    known = _once(x for x in found if _kind(x) and (x.is_file() or not x.exists()))
    keys = [path.relative_to(folder).as_posix() for path in known]
    parts = tuple(
        _part(path, key, f"{folder.resolve().name}/{key}")
        for path, key in zip(known, keys, strict=True)
    )
    if not parts:
        raise UserError(f"source {name!r} has no files of a known kind ({', '.join(KINDS)})")
    return Source(name, parts, len(found) - len(parts), {})


def _once(files: Iterable[Path]) -> list[Path]:
    """Return the files without further links to a file, whose text could be in two splits."""
    first: dict[str, Path] = {}
    for path in files:
        first.setdefault(os.path.realpath(path), path)
    return [*first.values()]


def _files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in a folder and below, in order, without hidden names; links are followed.

    A link to a folder above is not followed.

    Raises:
        UserError: for a folder that cannot be read.
    """
    real = folder.resolve()
    if real in above:
        return
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(
            f"cannot read {folder}: {error.strerror}; make it readable, or leave it out"
        ) from None
    for path in (folder / name for name in names if not name.startswith(".")):
        if path.is_dir():
            yield from _files(path, (*above, real))
        else:
            yield path


def _standard_library() -> Source:
    """Return the modules of Python's standard library, without tests and code tables."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    paths = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    parts = tuple(
        Part(str(path), key, "text", path.stat().st_size, None)
        for key, path in paths.items()
        if not left_out & set(PurePosixPath(key).parts)
        and not key.startswith(("config-", "_sysconfigdata"))
    )
    if not parts:
        raise UserError(f"{STANDARD_LIBRARY}: {root} has no source files; name a text source")
    return Source(STANDARD_LIBRARY, parts, 0, {"python": python_version()})


def named_split(name: str, kind: Kind) -> str | None:
    """Return the split named in a file's path, the innermost name first, or None.

    Folders name a split (`train/00.jsonl`). JSON lines name a split by any word of the file name
    (`wiki.test-01.jsonl`), datasets by any word of the split (`test_sft`), and texts by the whole
    file name (`test-01.txt`), because the file name of a text may be a title.
    """
    *folders, file = PurePosixPath(name).parts
    stem = file.lower()
    for suffix in KINDS:
        stem = stem.removesuffix(suffix)
    words = [re.sub(r"[-_.]?\d+$", "", stem)] if kind == "text" else re.split(r"[-_.]", stem)
    candidates = [*reversed(words), *(folder.lower() for folder in reversed(folders))]
    return next((SPLITS[word] for word in candidates if word in SPLITS), None)


def _dataset(name: str) -> Source:
    if not has_package("datasets"):
        raise UserError(
            f"no file or folder {name!r}; to read a Hugging Face dataset, {install('datasets')}"
        )
    if not reachable():
        raise UserError(
            f"no file or folder {name!r}, and the Hugging Face hub cannot be reached to look for "
            "a dataset of this name; give a file or folder of texts"
        )
    return Source(name, tuple(_dataset_parts(name)), 0, {})


def _dataset_parts(name: str) -> Iterator[Part]:
    """Yield the splits; `datasets` names a dataset without splits train."""
    opened = open_dataset(name)
    for split, rows in opened.items():
        sizes = rows.info.splits or {}
        size = sizes[split].num_bytes if split in sizes else None
        named = named_split(split, "dataset") if [*opened] != ["train"] else None
        yield Part(f"{name}#{split}", split, "dataset", size or None, named)


def open_dataset(name: str) -> Any:
    """Open the splits of `NAME` or `NAME:CONFIGURATION`, to be read row by row.

    Raises:
        UserError: with the message of the `datasets` library.
    """
    from datasets import load_dataset

    repository, _, configuration = name.partition(":")
    try:
        return load_dataset(repository, configuration or None, streaming=True)
    except Exception as error:  # the readers of formats and networks raise anything
        raise UserError(
            f"the Hugging Face dataset {name!r} cannot be opened: {first_line(error)}; a name has"
            " the form OWNER/DATASET or OWNER/DATASET:CONFIGURATION"
        ) from error
