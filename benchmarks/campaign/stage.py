"""The files that trials begin with, and what two folders have in common."""

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from trial import Outcome, dape, run

RECIPE = {
    "data": "data",
    "model": {
        "scheme": "dape-kerple",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "training": {"length": 16, "batch_size": 4, "steps": 6, "precision": "fp32"},
    "hardware": {"device": "cpu"},
    "tracking": {
        "log_every": 1,
        "validate_every": 3,
        "validation_batches": 1,
        "checkpoint_every": 2,
    },
}
BENCHMARK = {
    "tasks": ["parity-check"],
    "schemes": ["dape-kerple"],
    "seeds": [0, 1],
    "model": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "training": {"steps": 4, "batch_size": 2, "length": 4, "precision": "fp32"},
    "evaluation": {"longest": 6, "samples": 2},
}
TASK = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "letters.jsonl"}},
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_TUNE = (
    "retrofit base/model --data data --out tuned --training.length 16 --training.batch-size 4"
    " --training.steps 1 --training.precision fp32 --hardware.device cpu --lengths 16,32"
)
# What differs between two runs of the same command; `models` counts those that ran side by side.
_TIMES = ("started", "ended", "time", "seconds", "tokens_per_second", "weights", "models")


def build(folder: Path) -> Path:
    """Return a folder with a text, a corpus, recipes and runs.

    `ref` is measured, `tuned` the retrofit of `base`, `part` interrupted, `encoders` a benchmark.
    """
    folder.mkdir()
    chosen = random.Random(0)
    for split in ("train", "validation", "test"):
        (folder / "text" / split).mkdir(parents=True)
        for number in range(24):
            text = "".join(chosen.choice("abcd efg\n") for _ in range(300))
            (folder / "text" / split / f"{number}.txt").write_text(text)
    (folder / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "c.yaml").write_text(yaml.safe_dump(BENCHMARK))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "letters.yaml").write_text(yaml.safe_dump(TASK))
    rows = [json.dumps({"question": "a b", "answer": letter}) for letter in "abcd"]
    (folder / "letters.jsonl").write_text("\n".join(rows) + "\n")
    for words in (
        ("prepare", "text", "--out", "data", "--workers", 1),
        ("train", "r.yaml", "--out", "ref"),
        ("train", "r.yaml", "--out", "base", "--model.scheme", "rope"),
        ("eval", "ref", "--lengths", "16,32"),
        _TUNE.split(),
        ("chomsky", "train", "c.yaml", "--device", "cpu", "--out", "encoders"),
    ):
        must(run(dape(*words), folder))
    _interrupt(folder)
    return folder


def _interrupt(folder: Path) -> None:
    """Leave the run `part` as it was killed between its second checkpoint and its last."""
    action = dape("train", "r.yaml", "--out", "part")
    events = must(run(action, folder)).events
    for number in range(events, 0, -5):
        shutil.rmtree(folder / "part")
        run(action, folder, at=number)
        names = [path.name for path in (folder / "part" / "checkpoints").glob("step-*")]
        if sorted(names) == ["step-00000002", "step-00000004"]:
            return
    raise SystemExit("the campaign cannot begin: no kill leaves two checkpoints")


def must(outcome: Outcome) -> Outcome:
    """Return an outcome that the campaign rests on."""
    if outcome.kind != "accepted":
        raise SystemExit(f"the campaign cannot begin: {outcome.text}")
    return outcome


@cache
def undisturbed(stage: Path, room: Path, words: str, target: str) -> tuple[int, dict[str, Any]]:
    """Return the file events of a command without any fault, and what it leaves in its target."""
    with copied(stage, room / "whole") as whole:
        events = must(run(dape(*words.split()), whole)).events
        return events, state(whole / target)


@contextmanager
def copied(folder: Path, to: Path) -> Iterator[Path]:
    """Yield a copy of a folder, which is gone afterwards."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, symlinks=True)
    try:
        yield to
    finally:
        shutil.rmtree(to, ignore_errors=True)


def state(folder: Path) -> dict[str, Any]:
    """Return what a folder holds but for times: bytes, and of checkpoints the names."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "tensorboard" in name:
            continue
        if path.suffix in (".distcp", ".metadata") or path.name == ".metadata":
            found[name] = "a part of a checkpoint"
        else:
            found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    text = path.read_bytes()
    with suppress(ValueError, RecursionError):
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in text.splitlines()]
        if path.suffix == ".json":
            return _timeless(json.loads(text))
    if path.suffix == ".html":
        text = re.sub(rb"\d{4}-\d\d-\d\dT[\d:]+", b"", text)
    return hashlib.sha256(text).hexdigest()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _timeless(value) for key, value in content.items() if key not in _TIMES}
    return [_timeless(each) for each in content] if isinstance(content, list) else content


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the files in which two states differ."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
