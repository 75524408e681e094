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

TEXTS = [
    "", "[]", "a", "- 1", "\0", "a: \0", ":", "{", "a: 1: 2", "&a", "*a", "!!int foo", "%", "\t",
    "name: a\nname: b", "training: {steps: 1, steps: 2}", "<<: 1", "a: &a {<<: *a}", "\xff",
    "training:\n  stps: 10", "training: 3", "model: [1]", "seed: 1e3", "seed: 1:30", "seed: 010",
    "seed: !!int foo", "seed: !!float foo", "seed: !!timestamp foo", "seed: !!binary foo",
    "seed: !!set {a}", "seed: 2001-01-01", "? [a]\n: 1", "1: 2", "null: 3", "{a: 1}: 2",
    "optimizer: {betas: [0.9]}", "optimizer: {betas: [a, b]}", "optimizer: {betas: [0.9, 1.0]}",
    "name: ../x", "name: /", "name: ''", "name: .", "name: \"a\\x1b\"", "name: '{nothing}'",
    "model: {scheme: foo}", "model: {scheme_options: 3}", "model: {scheme_options: {adapter: 3}}",
    "model: {scheme_options: {adapter: {hidden: 1.5}}}",
    "model: {scheme_options: {adapter: {hidden: true}}}",
    "model: {scheme_options: {adapter: {hidden: .nan}}}",
    "model: {scheme_options: {adapter: {hidden: [1]}}}",
    "model: {scheme_options: {adapter: {hiden: 1}}}",
    "model: {scheme_options: {adapter: {residual: 'no'}}}",
    "model: {scheme_options: {adapter: {inputs: 3}}}",
    "model: {scheme_options: {nothing: {a: 1}}}",
    "model: {scheme_options: {bias: {num_heads: 3}}}",
    "model: {num_attention_heads: 5}", "model: {num_key_value_heads: 5}", "[" * 100_000,
]  # fmt: skip

# Command lines that nobody means, by the kind of the mistake.
_READ = "eval ref --lengths 16 --out new"
_ASK = "eval retrieval ref --lengths 64 --trials 1 --out new"
LINES = {
    "no command": [
        "foo", "--foo", "evl ref", "eval", "bench", "plot", "export", "help foo", "chomsky", "''",
        "eval ref --retrieval", "train", "retrofit", "prepare", "plot encoding", "paper nothing",
    ],
    "no such place": [
        "train nope.yaml", "train .", "eval nope", "eval text", "eval data --data data", "plot ref",
        "eval ref/model", "eval ref --data nope", "eval ref --data text", "export nope --out new",
        "export text --out new", "export ref --out text", "export ref --out r.yaml",
        "plot nope --out a.png", "plot text --out a.png", "plot retrieval ref --out a.png",
        "plot learned ref --out", "prepare nope --out new", "prepare r.yaml --out new",
        "prepare text --out text/new", "prepare text --out r.yaml", "prepare text --out ref",
        "prepare tasks --out new", "prepare text --out new --tokenizer nope",
        f"{_READ}/a/../../r.yaml",
        "train r.yaml --out r.yaml", "train r.yaml --out text",
        "train r.yaml --data text --out new",
        "eval harness ref --tasks nope", "eval harness ref --tasks letters --include-path nope",
        f"train r.yaml --out {'x' * 300}", f"export ref --out {'x' * 300}",
        "train r.yaml --out /proc/a",
        f"eval ref --lengths 16 --out {'x' * 300}", "eval ref --lengths 16 --out r.yaml",
        f"plot ref --out {'x' * 300}.png", "plot ref --out r.yaml/a.png", "plot ref --out a.jpg",
        f"prepare text --out {'x' * 300}", "retrofit nope --data data",
        "retrofit base/model --data nope",
    ],
    "given twice": [
        "prepare text text --out new", "prepare text ./text --out new",
        "prepare text text/train --out new", "train r.yaml --seed 0,0",
        "train r.yaml --seed 1 --seed",
    ],
    "newer commands": [
        "chomsky", "chomsky nope", "chomsky sample nope", "chomsky sample parity-check --count 0",
        "chomsky sample parity-check --length 0", "chomsky train", "chomsky train nope.yaml",
        "chomsky train r.yaml", "chomsky train /dev/zero", "chomsky train c.yaml --tasks nope",
        "chomsky train c.yaml --schemes foo", "chomsky train c.yaml --seeds 0 0",
        "chomsky train c.yaml --tasks parity-check parity-check", "chomsky train c.yaml --seeds -1",
        "chomsky train c.yaml --training.steps 0", "chomsky train c.yaml --training.clip inf",
        "chomsky train c.yaml --training.learning-rate nan", "chomsky train c.yaml --together 0",
        "chomsky train c.yaml --device cuda", "chomsky train c.yaml --out text",
        "chomsky train c.yaml --out r.yaml", "chomsky train c.yaml --device cpu --out ref",
        "chomsky table nope.yaml",
        "chomsky map nope --task parity-check --scheme rope --out a.md",
        "chomsky map ref --task nope --scheme rope --out a.md",
        "chomsky map ref --task parity-check --scheme rope --out a.jpg",
        "explore nope", "explore text", "explore ref --out a.png", "explore ref --heads 0",
        "explore ref --heads 1000000000", "explore ref --length 1", "explore ref --device cuda",
        "explore ref --length 1000000000", "explore ref --layers 7", "explore ref --document 99",
        "explore ref --out r.yaml/a.html", "explore ref --train-length 99999999999",
        "paper", "paper nope", "paper list nope", "paper report --out a", "paper demo --only nope",
        "paper demo --scale nope", "paper demo --data data",
        "plot context ref --out a.md", "plot context", "plot learned nope --out a.md",
        "plot learned ref --out a.md", "plot learned ref --length 16 --query 99 --out a.md",
        "plot learned ref --length 16 --layers 7 --out a.md",
        "plot learned ref --length 16 --document -1 --out a.md",
        "plot encoding foo", "plot encoding kerple --length 1000000000",
        "eval context nope", "eval context ref --lengths 16,99999999",
        "eval context ref --lengths 16,32 --out r.yaml", "bench attention --shape 0x0",
        "bench attention --methods nope", "bench model --sizes nope", "bench model --forms nope",
        "train r.yaml --hardware.micro-batch-size 100000000 --out new",
        "train r.yaml --hardware.micro-batch-size 3 --out new",
        "train r.yaml --hardware.micro-batch-size 100000000 --training.batch-size 100000000",
        "train r.yaml --hardware.context-parallel 2 --out new",
        "train r.yaml --hardware.activation-checkpointing foo --out new",
        "train r.yaml --measure --hardware.micro-batch-size 3 --out new",
        "chomsky sample parity-check --length 99999999", "chomsky train c.yaml --device meta",
        "chomsky train c.yaml --evaluation.longest 100000000 --out new",
        "chomsky train c.yaml --model.num-hidden-layers 1000000000 --out new",
        "chomsky train c.yaml --training.batch-size 1000000000 --out new",
        "chomsky map encoders --task parity-check --scheme dape-kerple --length 99999 --out a.md",
        "plot learned ref --length 16 --layers ,", "explore ref --text a", "explore ref --text ''",
        "paper demo --minutes nan", "paper demo --minutes -1", "paper demo --only ,",
        "paper demo --data nope=data", "paper demo --data python-stdlib=nope",
        "paper demo --data python-stdlib=data,python-stdlib=data", "bench attention --methods ,",
        "paper report --data python-stdlib=nope", "paper list --scale smoke",
        "retrofit base/model --data data --blocks 0", "--completion --nope", "--version --nope",
    ],
    "no such value": [
        "eval ref --protocol foo", "eval ref --protocol sliding", "eval ref --stride 3",
        "eval ref --lengths 0", "eval ref --lengths 16,", "eval ref --lengths ...",
        "eval ref --lengths 1e3", "eval ref --lengths 99999999", "eval ref --metric foo",
        "eval ref --split foo", "eval ref --device foo", "eval ref --device cuda",
        "eval ref --precision fp8", "eval ref --bos --lengths 16",
        "eval ref --protocol sliding --stride 99",
        "eval retrieval ref --tasks foo", "eval retrieval ref --depths 2",
        "eval retrieval ref --depths nan",
        "eval retrieval ref --depths a", "eval retrieval ref --tasks ,",
        "plot encoding foo --out a.png",
        "eval context ref --lengths 16", "train r.yaml --model.scheme foo",
        "train r.yaml --model.backend foo", "train r.yaml --model.backend cuda",
        "train r.yaml --hardware.device cuda", "train r.yaml --tracking.service foo",
        "train r.yaml --optimizer.learning-rate nan", "train r.yaml --optimizer.learning-rate inf",
        "train r.yaml --training.batch-size 1000000000 --out new",
        "train r.yaml --training.length 1000000000 --out new",
        "train r.yaml --model.hidden-size 1000000000 --out new",
        "train r.yaml --model.num-hidden-layers 1000000000 --out new",
        "train r.yaml --model.vocab-size 1000000000000 --out new",
        "train r.yaml --model.scheme-options {", "train r.yaml --model.scheme-options 3",
        "train r.yaml --name ../../x", "train r.yaml --name .", "train r.yaml --name ''",
        "retrofit base/model --data data --model.adapter foo",
        "retrofit base/model --data data --model.bias foo",
        "retrofit base/model --data data --model.train nothing --out new --hardware.device cpu",
        "retrofit ref/model --data data --out new --lengths 16 --hardware.device cpu",
    ],
}  # fmt: skip
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
        _READ: evaluation.Arguments,
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
