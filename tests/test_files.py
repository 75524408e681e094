import errno
import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from dape.errors import UserError
from dape.files import (
    check_writable,
    is_free,
    locked,
    partial_of,
    read_json,
    read_text,
    read_yaml,
    remove_leftovers,
    tidy,
    whole,
    write_json,
    write_text,
)
from dape.plain_yaml import parse


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    file = tmp_path / "new" / "notes.txt"
    write_text(file, "old")
    with whole(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(file.parent.iterdir()) == [file]


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    folder = tmp_path / "model"
    for content in ("old", "new"):
        with whole(folder) as partial:
            (partial / "deep").mkdir(parents=True)
            (partial / "deep" / content).write_text(content)
    assert [path.name for path in (folder / "deep").iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_killed_while_the_old_one_is_removed_is_whole(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with whole(folder) as partial:
        partial.mkdir()
    remove, found = shutil.rmtree, []

    def watched(path):
        found.append((path == folder, [each.name for each in folder.iterdir()]))
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", watched)
    for content in ("old", "new"):
        with whole(folder) as partial:
            partial.mkdir()
            (partial / content).touch()
    assert found == [(False, ["old"]), (False, ["new"])]
    (tmp_path / "model.partial.partial").mkdir()  # of a process killed at this moment
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def names_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("way", ["tidy", "a failed writer", "a writer"])
def test_a_folder_of_a_process_killed_between_both_renames_is_the_new_one(tmp_path, way):
    for name in ("model.partial/new", "model.partial.partial/old"):
        (tmp_path / name).mkdir(parents=True)
    if way == "tidy":
        remove_leftovers(tmp_path)
    elif way == "a failed writer":
        with pytest.raises(RuntimeError), whole(tmp_path / "model"):
            raise RuntimeError
    else:
        with whole(tmp_path / "model") as partial:
            assert names_in(tmp_path) == [".model.lock", "model", "model/new"]
            (partial / "new").mkdir(parents=True)
    assert names_in(tmp_path) == ["model", "model/new"]


def test_a_folder_is_the_new_one_after_an_interruption_between_both_renames(tmp_path, monkeypatch):
    folder, replace = tmp_path / "model", os.replace
    (folder / "old").mkdir(parents=True)

    def interrupted(source, target):
        replace(source, target)
        if source == folder:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole(folder) as partial:
        (partial / "new").mkdir(parents=True)
    assert names_in(tmp_path) == ["model", "model/new"]


@pytest.mark.parametrize("way", ["tidy", "a writer"])
def test_an_old_folder_is_no_new_one(tmp_path, way):
    """A process was killed while the old folder was removed, and the user removed the new one."""
    (tmp_path / "model.partial.partial" / "old").mkdir(parents=True)
    if way == "tidy":
        remove_leftovers(tmp_path)
    else:
        with pytest.raises(RuntimeError), whole(tmp_path / "model") as partial:
            assert names_in(tmp_path) == [".model.lock"]
            partial.mkdir()
            raise RuntimeError
    assert names_in(tmp_path) == []


def test_an_error_leaves_the_old_one_and_no_leftover(tmp_path):
    write_text(tmp_path / "notes.txt", "old")
    with pytest.raises(RuntimeError), whole(tmp_path / "notes.txt") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert (tmp_path / "notes.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("folder", [True, False])
def test_the_leftover_of_a_killed_writer_is_replaced(tmp_path, folder):
    left, lock = partial_of(tmp_path / "notes.txt"), tmp_path / ".notes.txt.lock"
    left.mkdir() if folder else left.write_text("half")
    lock.touch()
    assert is_free(tmp_path)
    write_text(tmp_path / "notes.txt", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    left.mkdir()
    lock.touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert not is_free(tmp_path) and is_free(tmp_path / "absent") and not is_free(left.parent)
    assert not is_free(tmp_path / "notes.txt") and is_free(tmp_path / "notes.txt" / "run")


def test_a_folder_that_another_process_creates_meanwhile_is_free(tmp_path):
    """Of two ranks the first creates the folder of a run while the second asks."""
    turns = "import os, sys\nwhile True:\n    os.mkdir(sys.argv[1])\n    os.rmdir(sys.argv[1])"
    other = subprocess.Popen([sys.executable, "-c", turns, tmp_path / "run"])
    try:
        asked = [is_free(tmp_path / "run") for _ in range(10_000)]
    finally:
        other.kill()
        other.wait()
    assert all(asked)


def test_writers_of_a_file_take_turns(tmp_path, monkeypatch):
    """The second would write into the file of the first, which would find no file to rename."""
    file, waits, flock = tmp_path / "table.md", threading.Event(), fcntl.flock
    second = threading.Thread(target=write_text, args=(file, "second"))

    def noted(handle, kind):
        if threading.current_thread() is second:
            waits.set()
        flock(handle, kind)

    monkeypatch.setattr(fcntl, "flock", noted)
    with whole(file) as partial:
        partial.write_text("first")
        second.start()
        while second.is_alive() and not waits.is_set():
            time.sleep(0.001)
        assert partial.read_text() == "first"
    second.join()
    assert file.read_text() == "second" and list(tmp_path.iterdir()) == [file]


def test_where_a_file_system_has_no_locks_files_are_written_and_runs_refused(tmp_path, monkeypatch):
    def absent(handle, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    write_text(tmp_path / "table.md", "new")
    assert (tmp_path / "table.md").read_text() == "new" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="not implemented"), locked(tmp_path / "run", "busy"):
        pass


def test_the_partial_file_of_a_writer_at_work_is_no_leftover(tmp_path):
    with whole(tmp_path / "table.md") as partial:
        partial.write_text("new")
        remove_leftovers(tmp_path)
        tidy(tmp_path)
    assert (tmp_path / "table.md").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_files_have_the_mode_of_the_umask_whoever_created_them(tmp_path):
    before = os.umask(0o027)
    try:
        for name in ("folder", "file"):
            with whole(tmp_path / name) as partial:
                file = partial / "weights" if name == "folder" else partial
                file.parent.mkdir(exist_ok=True)
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    for file in (tmp_path / "folder/weights", tmp_path / "file"):
        assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "message",
    [
        "while serializing: No space left on device (os error 28)",
        "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
    ],
)
def test_a_full_disk_is_an_error_of_the_system_whoever_reports_it(tmp_path, message):
    with pytest.raises(OSError, match="No space left") as caught, whole(tmp_path / "weights"):
        raise RuntimeError(message)
    assert caught.value.filename == str(tmp_path / "weights") and not list(tmp_path.iterdir())


def test_json_comes_back(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "ä"}}
    write_json(tmp_path / "record.json", content)
    assert read_json(tmp_path / "record.json", dict, "measure again") == content


def test_a_number_that_json_lacks_is_null(tmp_path):
    content = {
        "a": [1.5, math.nan, (math.inf, np.float64("nan"))],
        "b": {"c": -math.inf},
        "d": "NaN",
    }
    write_json(tmp_path / "record.json", content)
    found = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read {}: No such file or directory; measure again"),
        (b"", r"{} is not JSON \(.*\); measure again"),
        (b'{"step": 1', r"{} is not JSON \(.*\); measure again"),
        (b"\xff\xfe\x00", r"{} is not a text file; measure again"),
        (b"[" * 100_000, r"{} is not JSON \(.*\); measure again"),
        (b"[1]", r"{} holds no JSON object; measure again"),
        (b'{"stp": 1}', r"{} has not the expected fields \(KeyError: 'step'\); measure again"),
        (b'{"step": "x"}', r"{} has not the expected fields \(ValueError: .*\); measure again"),
        (b'{"step": null}', r"{} has not the expected fields \(TypeError: .*\); measure again"),
    ],
)
def test_a_damaged_json_file_is_named_with_its_remedy(tmp_path, content, message):
    file = tmp_path / "record.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message.format(file)) as caught:
        read_json(file, lambda fields: int(fields["step"]), "measure again")
    assert "\n" not in str(caught.value)


def test_what_may_never_end_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: it is no ordinary file"):
        read_text(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"cannot read .*: it is no ordinary file"):
        read_text(tmp_path)


def test_numbers_are_those_of_yaml_1_2():
    text = "[0, -7, 50_000, 0x1f, 1.5, -.5, 1.0e3, 1.0e+3, 1:30, 010, 1:30.5, 6e-4, 08, .inf]"
    assert parse(text) == [
        *(0, -7, 50_000, 31, 1.5, -0.5, 1000.0, 1000.0),
        *("1:30", "010", "1:30.5", "6e-4", "08", float("inf")),
    ]


def test_a_key_may_override_a_merged_one():
    text = """
    base: &base {a: 1, b: {c: 2}}
    other: {<<: *base, a: 3}
    both: {<<: [*base, {a: 5, d: 4}], b: 6}
    deep: {inner: &inner {<<: *base, a: 7}}
    last: {<<: *inner, b: 8}
    """
    base = {"a": 1, "b": {"c": 2}}
    assert parse(text) == {
        "base": base,
        "other": base | {"a": 3},
        "both": {"a": 1, "b": 6, "d": 4},
        "deep": {"inner": base | {"a": 7}},
        "last": {"a": 7, "b": 8},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 2, c: 3}", ":2: key 'c' is given twice"),
        ("a: 1\n<<: {a: 2, a: 3}", ":2: key 'a' is given twice"),
        ("a: 1\n<<: 3", ":2: << takes a mapping"),
        ("a: 1\nb: &b {<<: *b}", "nested too deeply"),
        ("a: !!int foo", ":1: 'foo' is no int"),
        ("a: !!bool foo", ":1: 'foo' is no bool"),
        ("a: !!timestamp foo", ":1: 'foo' is no timestamp"),
        ("a: !!python/name:os.system", ":1: could not determine a constructor"),
        ("a: 1\x00", "special characters are not allowed"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("a: [", ":1: "),
        ("", "holds no `key: value` lines"),
        ("- 1", "holds no `key: value` lines"),
    ],
)
def test_a_mistake_in_yaml_is_named(tmp_path, text, message):
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "some.yaml", "write it anew")
    found = str(caught.value)
    assert "some.yaml" in found and message in found and found.endswith("; write it anew")
    assert "\n" not in found


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from dape.files import locked\n"
        "with locked(Path(sys.argv[1]), 'busy'): print('locked', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "run")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(UserError, match="busy"), locked(tmp_path / "run", "busy"):
        pass
    process.kill()
    process.communicate()
    with locked(tmp_path / "run", "busy"):
        assert is_free(tmp_path / "run")
        with pytest.raises(UserError, match="busy"), locked(tmp_path / "run", "busy"):
            pass
    assert not list((tmp_path / "run").iterdir())
    with locked(tmp_path / "new" / "run", "busy"):
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moment", ["the folder", "within the folder", "the folder above"])
def test_folders_may_go_with_another_lock_meanwhile(tmp_path, monkeypatch, moment):
    """The last owner removes empty folders while a further process looks, or creates the next."""
    folder = tmp_path / "claims" / "cell"
    folder.mkdir(parents=True)
    times = {"the folder": 1, "within the folder": 1, "the folder above": 2}[moment]
    module, name = {
        "the folder": (Path, "is_dir"),
        "within the folder": (os, "open"),
        "the folder above": (os, "mkdir"),
    }[moment]
    act = getattr(module, name)

    def late(path, *given, **how):
        nonlocal times
        if times and path in (folder, folder / ".lock"):
            times -= 1
            with suppress(FileNotFoundError):
                folder.rmdir()
            if moment == "the folder above":
                folder.parent.rmdir()
        return act(path, *given, **how)

    if moment == "the folder above":
        folder.rmdir()
    monkeypatch.setattr(module, name, late)
    with locked(folder, "busy"):
        assert (folder / ".lock").exists() and not times


def test_a_folder_that_cannot_be_made_is_an_error_of_the_lock(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("file", "file/run", "nowhere/run"):
        with pytest.raises(OSError, match=r"exists|Not a directory"), locked(tmp_path / name, ""):
            pass


def test_a_lock_may_be_for_one_thing_in_a_folder(tmp_path):
    with locked(tmp_path, "busy", "a"), locked(tmp_path, "busy", "b"), locked(tmp_path, "busy"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "a.lock", "b.lock"]
        with pytest.raises(UserError, match="busy"), locked(tmp_path, "busy", "a"):
            pass


def test_leftovers_go_unless_somebody_works_there(tmp_path):
    for name in (".lock", "a.partial", "b"):
        (tmp_path / name).touch()
    with locked(tmp_path, "busy"):
        tidy(tmp_path)
        assert (tmp_path / "a.partial").exists()
    (tmp_path / ".lock").touch()  # of a process that was killed
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    longest = os.statvfs(tmp_path).f_namemax - len(".partial")
    for name, fault in {
        "folder": "it is a folder",
        "file/a/b.png": "file is no folder",
        "nowhere/b.png": "nowhere is no folder",
        f"new/{'x' * (longest + 1)}": f"a name has more than {longest} bytes",
        f"new/{'é' * (longest // 2 + 1)}/b.png": f"a name has more than {longest} bytes",
    }.items():
        with pytest.raises(UserError, match=rf"cannot be written: .*{fault}; give another --out"):
            check_writable(tmp_path / "fine.png", tmp_path / name)
    check_writable(tmp_path / "file", tmp_path / "new" / ("x" * longest), Path("fine.png"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write all
    with pytest.raises(UserError, match=rf"new/a.png cannot be written: {tmp_path} is not writ"):
        check_writable(tmp_path / "new" / "a.png")
    check_writable(tmp_path / "folder" / "a.png")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "nowhere"]
