"""Files and folders that are whole or absent, and a clear error for an unreadable file.

A writer fills `NAME.partial` beside the target, brings the content onto the disk and renames
`NAME.partial` to the target. If the process dies meanwhile, the target is unchanged, or absent
between the renames of an old and a new folder. The next writer finishes the renames, and removes
leftovers. Writers of the same target take turns, by the lock `.NAME.lock`.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from os.path import isdir, lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from dape.errors import UserError
from dape.plain_yaml import parse

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl
except ImportError:  # on Windows, where no file is written
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"
LOCK = ".lock"
# What file systems answer that have no locks, as Lustre without the option `flock`.
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

Read = TypeVar("Read")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which replaces `path` at the end of the block.

    An exception inside the block leaves `path` unchanged. Files get the mode of the umask, also
    from libraries that create private files.
    """
    partial = partial_of(path)
    with _turn(path):
        _clear(path)
        mode = _file_mode(partial)
        try:
            yield partial
            _settle(partial, mode)
            # A folder with content cannot be renamed over, and a removal may be interrupted.
            if partial.is_dir() and path.is_dir():
                os.replace(path, partial_of(partial))
            os.replace(partial, path)
            _sync(path.parent)
            _clear(path)
        except BaseException as error:
            with suppress(OSError):  # the first error is the error to report
                _clear(path)
            if code := _code_of_disk(error):
                raise OSError(code, os.strerror(code), str(path)) from None
            raise


def _clear(path: Path) -> None:
    """Remove leftovers of a writer of `path`, who may have ended between both renames."""
    partial = partial_of(path)
    old = partial_of(partial)
    if lexists(old) and lexists(partial) and not lexists(path):
        os.replace(partial, path)
    remove(old)
    remove(partial)


def _turn(path: Path, busy: str | None = None) -> AbstractContextManager[None]:
    """Return the lock on `path` of a writer, who waits for an earlier writer without `busy`."""
    return locked(path.parent, busy, f".{path.name}")


def _code_of_disk(error: BaseException) -> int | None:
    """Return the errno of a disk error, also from an exception of a library."""
    if number := re.search(r"\(os error (\d+)\)", str(error)):  # in Rust
        return int(number[1])
    # The writer of PyTorch's archives reports missing bytes, without the cause.
    return errno.ENOSPC if "unexpected pos" in str(error) else None


def partial_of(path: Path) -> Path:
    """Return the temporary path from which `path` is renamed."""
    return path.with_name(path.name + PARTIAL)


def check_writable(*paths: Path, remedy: str = "give another --out") -> None:
    """Refuse files that cannot be written, before the work; nothing is created.

    Raises:
        UserError: for a folder in place of the file, a name that is too long, and a parent folder
            that is a file or not writable.
    """
    _check_system()
    for path in paths:
        above = next(each for each in path.absolute().parents if lexists(each))
        longest = os.statvfs(above).f_namemax - len(PARTIAL) if isdir(above) else 0
        names = map(os.fsencode, path.absolute().relative_to(above).parts)
        fault = ""
        if isdir(path):
            fault = "it is a folder"
        elif not isdir(above):
            fault = f"{above} is no folder"
        elif not os.access(above, os.W_OK | os.X_OK):
            fault = f"{above} is not writable"
        elif any(len(name) > longest for name in names):
            fault = f"a name has more than {longest} bytes"
        if fault:
            raise UserError(f"{path} cannot be written: {fault}; {remedy}")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, as_json(content, indent=1) + "\n")


def as_json(content: Any, indent: int | None = None) -> str:
    """Return JSON, with null for NaN and infinities, which JSON lacks.

    A field of the type `strict.Number` reads null as NaN.
    """
    return json.dumps(_without_nan(content), indent=indent, allow_nan=False)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def read_text(path: Path, remedy: str = "") -> str:
    """Return the text of a file.

    Raises:
        UserError: naming file and remedy, for a file that is missing, unreadable or not text.
    """
    try:
        check_ordinary(path, remedy=remedy)
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), remedy) from None
    except UnicodeDecodeError:
        raise UserError(_with(f"{path} is not a text file", remedy)) from None


def check_ordinary(*paths: Path, remedy: str = "") -> None:
    """Raise a `UserError` for a folder, a pipe or a device, because reading may never end."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise _unreadable(path, "it is no ordinary file", remedy)


def read_json(path: Path, build: Callable[[dict[str, Any]], Read], remedy: str) -> Read:
    """Return `build(object)` for the object in a JSON file.

    Raises:
        UserError: naming file and remedy, for a file that is missing, holds no JSON object, or
            lacks a field for `build`.
    """
    text = read_text(path, remedy)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(_with(f"{path} is not JSON ({error})", remedy)) from None
    if not isinstance(content, dict):
        raise UserError(_with(f"{path} holds no JSON object", remedy))
    try:
        return build(content)
    except UserError as error:
        raise UserError(_with(f"{path}: {error}", remedy)) from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        fault = f"{path} has not the expected fields ({type(error).__name__}: {error})"
        raise UserError(_with(fault, remedy)) from None


def read_tensors(path: Path, remedy: str) -> "dict[str, Tensor]":
    """Return the tensors of a file of safetensors by name.

    Raises:
        UserError: naming the file and the remedy, if it is missing, unreadable or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        check_ordinary(path, remedy=remedy)
        return load_file(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error), remedy) from None
    except SafetensorError as error:
        raise _unreadable(path, str(error), remedy) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe.

    The recipes of the repository, such as `recipes/demo.yaml`, are found from every folder: an
    installed package holds them, and an editable one lies in the checkout.

    Raises:
        UserError: naming the file, and for an absent file the known recipes.
    """
    if path.exists():
        return read_yaml(path)
    shipped = Path(__file__).parent, Path(__file__).parents[2]
    for base in shipped:
        if (base / path).is_file():
            return read_yaml(base / path)
    known = {
        str(each.relative_to(base))
        for base in (Path(), *shipped)
        for each in base.glob("recipes/*.yaml")
    }
    return read_yaml(path, f"known recipes: {', '.join(sorted(known))}" if known else "")


def read_yaml(path: Path, remedy: str = "") -> dict[str, Any]:
    """Return the mapping in a YAML file, by the rules of `dape.plain_yaml`.

    Raises:
        UserError: naming the file, the line if known, and the remedy.
    """
    text = read_text(path, remedy)
    try:
        data = parse(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(_with(f"{path}{line}: {error.problem}", remedy)) from None
    except ValueError as error:
        raise UserError(_with(f"{path}: {error}", remedy)) from None
    if not isinstance(data, dict):
        raise UserError(_with(f"{path} holds no `key: value` lines", remedy))
    return data


def remove(path: Path) -> None:
    """Remove a file or a folder; an absent path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove leftovers of interrupted writes from a folder, but nothing of a writer at work."""
    partials = (re.sub(r"(\.partial)+$", "", each.name) for each in folder.glob(f"*{PARTIAL}"))
    locks = (each.name[1:].removesuffix(LOCK) for each in folder.glob(f".?*{LOCK}"))
    for name in {*partials, *locks}:
        with suppress(UserError), _turn(folder / name, busy=""):
            _clear(folder / name)


def is_free(folder: Path) -> bool:
    """Return whether a folder is absent, or holds nothing but leftovers of interrupted writes."""
    try:
        return not contents(folder)
    except NotADirectoryError:
        return not lexists(folder)  # a folder in a file is absent


def contents(folder: Path) -> set[str]:
    """Return the names in a folder without leftovers and locks, none in an absent folder."""
    try:  # one question: between two of them another rank may create the folder
        inside = list(folder.iterdir())
    except FileNotFoundError:
        return set()
    return {
        path.name
        for path in inside
        if path.suffix != PARTIAL and not (path.name.startswith(".") and path.name.endswith(LOCK))
    }


def tidy(folder: Path) -> None:
    """Remove leftovers of killed processes, unless the folder is locked or read-only."""
    with suppress(OSError, UserError), locked(folder, ""):
        remove_leftovers(folder)


@contextmanager
def locked(folder: Path, busy: str | None, name: str = "") -> Iterator[None]:
    """Keep other processes out of a folder; a lock ends with the process that took the lock.

    An absent folder is created, and removed again if empty at the end. With a `name` the lock
    covers the entry of the folder with this name. Without a text `busy`, wait for the lock, or
    go on without a lock on a file system that has none.

    Raises:
        UserError: with the text `busy` if another process has the lock.
    """
    file, absent = (
        folder / f"{name}{LOCK}",
        [each for each in (folder, *folder.parents) if not each.exists()],
    )
    handle = _lock(file, busy)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        with suppress(OSError):  # a folder has content
            for each in absent:
                each.rmdir()
        os.close(handle)


def _lock(file: Path, busy: str | None) -> int:
    """Return the handle of an existing, locked file."""
    _check_system()
    while True:
        handle = _opened(file)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # the owner removed the file meanwhile
                if os.path.samestat(os.fstat(handle), file.stat()):
                    return handle
        except BlockingIOError:
            os.close(handle)
            raise UserError(busy) from None
        except OSError as error:
            if busy is None and error.errno in _WITHOUT_LOCKS:
                return handle
            os.close(handle)
            raise
        os.close(handle)


def _opened(file: Path, attempts: int = 100) -> int:
    """Return the handle of a file in a folder that other processes may create and remove."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except (FileExistsError, FileNotFoundError):
        if attempts == 1:
            raise
    return _opened(file, attempts - 1)


def _check_system() -> None:
    if fcntl is None:
        raise UserError("dape writes files on Linux and macOS alone; on Windows, run dape in WSL")


def _file_mode(absent: Path) -> int:
    """Return the mode of new files beside a path where nothing lies yet."""
    absent.mkdir()  # os.umask would change the mode for all threads
    mode = absent.stat().st_mode & 0o666
    absent.rmdir()
    return mode


def _settle(path: Path, mode: int) -> None:
    """Set the mode of a file, or of all files in a folder, and bring the content onto the disk."""
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if each.is_file() and not each.is_symlink():
            each.chmod(mode)
        _sync(each)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unreadable(path: Path, reason: str, remedy: str) -> UserError:
    return UserError(_with(f"cannot read {path}: {reason}", remedy))


def _with(fault: str, remedy: str) -> str:
    return f"{fault}; {remedy}" if remedy else fault
