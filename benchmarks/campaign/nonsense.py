"""Values that mean nothing: in recipes, on the command line, in Python."""

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from mistakes import LINES, READ, TEXTS
from result import Result, judged
from stage import RECIPE, copied
from trial import dape, run

import dape as package
from dape.cli.arguments import options_of
from dape.errors import UserError
from dape.evaluate import evaluate, evaluate_retrieval
from dape.positions import bias, rotary
from dape.train.recipe import Recipe

# By the type of a field: what is none of its values.
_NO_INT = [math.nan, math.inf, -1, 1.5, "abc", "1:30", "010", [1], {"a": 1}, True, 2**70]
_NO_FLOAT = [math.nan, math.inf, -1.0, "abc", [1], {"a": 1}, True]
_NO_TEXT = [1, 1.5, True, [1], {"a": 1}]
_NO_CHOICE = ["foo", 1, 1.5, [1], {"a": 1}]
_NO_SWITCH = ["yes", 1, math.nan, [1]]

_ASK = "eval retrieval ref --lengths 64 --trials 1 --out new"
_NUMBERS = ["abc", "", "-1", "nan", "inf", "1.5", "99999999999999999999", "\x1b[31m", "0x"]


def nonsense(stage: Path, room: Path, every: int) -> Iterator[Result]:
    """Yield what comes of each value: a line that says what is wrong."""
    with copied(stage, room / "nonsense") as folder:
        trials = [*_recipes(), *_lines(), *_options_of_commands(), *_python(folder)]
        for kind, name, action in trials[::every]:
            yield judged("nonsense", kind, name, run(action, folder), "refused")


Trials = Iterator[tuple[str, str, Callable[[], object]]]


def _recipes() -> Trials:
    for key, values in _bad_values(Recipe):
        for value in values:
            text = yaml.safe_dump(_with(RECIPE, key, value))
            yield "a value in a recipe", f"{key}: {value!r}", partial(_train, text)
    for text in TEXTS:
        yield "the text of a recipe", repr(text[:60]), partial(_train, text)


def _train(text: str) -> object:
    Path("bad.yaml").write_text(text, encoding="latin-1")
    return dape("train", "bad.yaml", "--dry-run")()


def _with(recipe: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    if not section:
        return recipe | {name: value}
    return recipe | {section: {**recipe.get(section, {}), name: value}}


def _bad_values(cls: type, prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yield the keys of a recipe, with values that are none of theirs."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            yield from _bad_values(hint, f"{key}.")
            continue
        kinds = [hint, *get_args(hint)]
        kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
        if bool in kinds:
            yield key, _NO_SWITCH
        elif int in kinds:
            yield key, _NO_INT
        elif float in kinds:
            yield key, _NO_FLOAT
        elif str in kinds:
            yield key, _NO_TEXT
        else:
            yield key, _NO_CHOICE


def _lines() -> Trials:
    for kind, lines in LINES.items():
        for line in lines:
            yield kind, line, dape(*shlex.split(line))


def _options_of_commands() -> Trials:
    """Yield each option that takes a number with words that are none."""
    from dape.cli import (
        bench_attention,
        bench_model,
        chomsky_map,
        chomsky_sample,
        eval_context,
        eval_harness,
        eval_retrieval,
        explore,
        plot_learned,
    )
    from dape.cli import eval as evaluation
    from dape.data.prepare import Options

    commands = {
        READ: evaluation.Arguments,
        _ASK: eval_retrieval.Arguments,
        "eval harness ref --tasks letters --include-path tasks --out new": eval_harness.Arguments,
        "prepare text --out new": Options,
        "eval context ref --lengths 16,32 --out new": eval_context.Arguments,
        "plot learned ref --length 16 --out new/a.md": plot_learned.Arguments,
        "explore ref --length 16 --out new/a.html": explore.Arguments,
        "chomsky sample parity-check": chomsky_sample.Arguments,
        "chomsky map new --task parity-check --scheme rope --out a.md": chomsky_map.Arguments,
        "bench attention --lengths 16 --shape 2x8 --methods textbook": bench_attention.Arguments,
        "bench model --sizes small --lengths 16 --schemes nope": bench_model.Arguments,
    }
    for words, cls in commands.items():
        hints = get_type_hints(cls)
        for option in options_of(cls):
            hint = hints[option.removeprefix("--").replace("-", "_")]
            if {int, float} & {hint, *get_args(hint)}:
                for value in _NUMBERS:
                    given = f"{option}={value}"
                    yield "an option", f"{words} {given!r}", dape(*words.split(), given)


def _python(folder: Path) -> Trials:
    q = torch.zeros(1, 2, 4, 8)
    call = partial(package.attention, q, q, q)
    for scale in (math.nan, math.inf, "x", True, [1.0]):
        yield "Python", f"scale={scale!r}", partial(call, scale=scale)
    for offset in (math.nan, math.inf, 1.5, 2**70, True, "1", None, torch.tensor(1.5)):
        yield "Python", f"query_offset={offset!r}", partial(call, query_offset=offset)
    for causal in ("no", 1, None):
        yield "Python", f"causal={causal!r}", partial(call, causal=causal)
    for wrong in ({"backend": "foo"}, {"query": q.long()}, {"query": q[0]}, {"mask": q[0, 0]}):
        given = {"query": q, "key": q, "value": q} | wrong
        yield "Python", f"attention of {next(iter(wrong))}", partial(package.attention, **given)
    bad = (0, -1, 1.5, True, "2", 2**70, math.nan, None)
    for name in ("ALiBi", "DAPE", "FIRE", "Kerple", "KerplePower", "NoBias", "Sandwich", "T5"):
        for heads in bad:
            yield "Python", f"{name}({heads!r})", partial(getattr(package, name), heads)
    for cls, option, *more in (
        (package.DAPE, "hidden", 2), (package.DAPE, "kernel_size", 2), (bias.T5, "num_buckets", 2),
        (bias.T5, "max_distance", 2), (bias.Sandwich, "d_bar", 2), (bias.FIRE, "hidden", 2),
        (bias.FIRE, "train_length", 2), (package.CoPE, "npos_max", 8),
        (rotary.RandomizedRoPE, "train_length", 8), (rotary.YaRN, "train_length", 8),
    ):  # fmt: skip
        for value in bad:
            yield (
                "Python",
                f"{cls.__name__} {option}={value!r}",
                partial(cls, *more, **{option: value}),
            )
    for cls, option in ((rotary.RoPE, "base"), (rotary.RoPE, "fraction"), (rotary.NTK, "factor")):
        for value in (math.nan, math.inf, -1, "1", True, None):
            yield "Python", f"{cls.__name__} {option}={value!r}", partial(cls, 8, **{option: value})
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "train_length"):
        for value in bad:
            yield "Python", f"DapeConfig {name}={value!r}", partial(_config, **{name: value})
    for wrong in ({"backend": "foo"}, {"scheme": "foo"}, {"causal": "no"}, {"foo": 1}):
        yield "Python", f"DapeConfig {wrong}", partial(_config, **wrong)
    for name in ("seed", "documents", "blocks", "batch_tokens"):
        for value in (1.5, -1, math.nan, 2**70, True, "1"):
            measure = partial(evaluate, "ref", lengths=[16], out="new", **{name: value})
            yield "Python", f"evaluate {name}={value!r}", measure
    for wrong in ({"lengths": [1.5]}, {"lengths": [0]}, {"depths": [2]}, {"depths": [math.nan]},
                  {"trials": 0}, {"trials": 1.5}, {"seed": -1}, {"tasks": ["foo"]}):  # fmt: skip
        measure = partial(evaluate_retrieval, "ref", **{"lengths": [64], "out": "new"} | wrong)
        yield "Python", f"evaluate_retrieval {wrong}", measure
    for wrong in ({"seed": 1.5}, {"seed": 2**70}, {"training": 3}, {"training": {"steps": 0}}):
        train = partial(_train_by, folder, **wrong)
        yield "Python", f"train {wrong}", train


def _train_by(folder: Path, **wrong: Any) -> None:
    from dape.train import train

    train("r.yaml", out="new", **wrong)


def _config(**wrong: Any) -> None:
    try:
        package.DapeConfig(**wrong)
    except StrictDataclassError as error:  # what every configuration of transformers raises
        raise UserError(" ".join(str(error).split())) from None
