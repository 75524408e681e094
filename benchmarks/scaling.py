"""Training on 1, 2 and 4 GPUs: memory, tokens a second and MFU, as one table.

    python benchmarks/scaling.py [models attention lengths] [--plan] [--gpus 4,1,2] [--sizes 2.7b]
        [--schemes nope,dape-kerple] [--out results/scaling/scaling.json]

Each case is a `torchrun` of its own with a limit of time. A result is appended to the file as soon
as it is there, and a case whose results are there is not run again (`--again` does). `--plan` lists
the cases and needs no GPU; `--table` prints the page of the file. Results are compared with those
of the same commit and device alone.

- models: the recipes of the paper's sizes, 64 sequences of 512 tokens a GPU and step, random
  tokens; micro-batches in ascending order until memory ends.
- attention: one sequence over the GPUs, forward and backward, 12 heads of 64; `difference` in the
  file is how far float32 outputs and gradients are from those of one GPU, over the largest.
- lengths: a step of the 125M model on one sequence over the GPUs. MFU counts the masked pairs too,
  which kernels skip: nearly half of the counted arithmetic.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import launch
import torch
import torch.distributed as dist

from dape.errors import UserError, unknown

ROOT = Path(__file__).parents[1]
PARTS = ("models", "attention", "lengths")
SEQUENCES = 64  # a GPU and step
# Of a size, by the number of GPUs: micro-batches, and what differs from the recipe.
LAYOUTS: dict[str, dict[int, tuple[tuple[int, ...], dict[str, str]]]] = {
    "125m": dict.fromkeys((1, 2, 4), ((32, 64), {})),
    "350m": dict.fromkeys((1, 2, 4), ((16, 32, 64), {})),
    "2.7b": {
        1: ((8, 16), {"activation_checkpointing": "selective"}),
        2: ((16, 32), {"activation_checkpointing": "selective"}),
        4: ((16, 32), {"activation_checkpointing": "none"}),
    },
    "6.7b": {
        1: ((4, 8), {"activation_checkpointing": "blocks"}),
        2: ((8, 16), {"activation_checkpointing": "selective"}),
        4: ((16, 32), {"activation_checkpointing": "none"}),
    },
}
ATTENTION_LENGTHS = (32_768, 131_072)
STEP_LENGTHS = (131_072, 262_144, 1_048_576)
TITLE = """# Training on several GPUs

`python benchmarks/scaling.py`: seconds of an update, or of both passes of attention, and GiB of a
GPU. Percentages compare results of the same commit and device.
"""
LONG = 500_000  # tokens of a sequence, from which four GPUs are needed


@dataclass(frozen=True)
class Case:
    """Something to measure on a number of GPUs: a recipe with changes, or attention alone."""

    part: str
    size: str
    scheme: str
    gpus: int
    length: int = 512
    micro_batches: tuple[int, ...] = (1,)
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.part, self.size, self.scheme, f"{self.gpus} GPUs", f"length {self.length}"]
        words += [f"micro-batches {','.join(map(str, self.micro_batches))}"]
        return "  ".join(words + [f"{key}={value}" for key, value in self.changes.items()])

    @property
    def key(self) -> list[Any]:
        """Return what tells its results from another's."""
        return [self.part, self.size, self.scheme, self.gpus, self.length, self.changes]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for gpus in arguments.gpus:
        for scheme in arguments.schemes:
            if "models" in arguments.parts:
                for size in arguments.sizes:
                    micro, hardware = LAYOUTS[size][gpus]
                    changes = {f"hardware.{key}": value for key, value in hardware.items()}
                    changes["training.batch_size"] = SEQUENCES * gpus
                    yield Case("models", size, scheme, gpus, 512, micro, changes)
            if "attention" in arguments.parts:
                for length in ATTENTION_LENGTHS:
                    yield Case("attention", "125m", scheme, gpus, length)
            if "lengths" in arguments.parts:
                for length in arguments.lengths:
                    if length < LONG or gpus >= 4:
                        changes = _spread(gpus, length)
                        yield Case("lengths", "125m", scheme, gpus, length, (1,), changes)


def _spread(gpus: int, length: int) -> dict[str, Any]:
    return {
        "training.length": length,
        "training.batch_size": 1,
        "hardware.context_parallel": gpus,
        "hardware.compile": "none",
        "hardware.activation_checkpointing": "blocks",
    }


def run(case: Case, out: Path, seconds: float) -> str | None:
    """Run a case in processes of its own; return what went wrong, if anything."""
    worker = (__file__, "--worker", json.dumps(asdict(case)), "--out", out)
    with TemporaryDirectory() as folder:
        try:
            launch.run(launch.torchrun(case.gpus, *worker), Path(folder) / "log", seconds)
        except UserError as reason:
            return str(reason)
    return None


def work(case: Case, out: Path) -> None:
    """Measure a case in this process, one of several; the first keeps the results."""
    from dape.provenance import provenance

    begun = time.time()
    for entry in attention(case) if case.part == "attention" else training(case):
        if int(os.environ["RANK"]) == 0:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            origin = {"command": f"python benchmarks/scaling.py {case.part}"}
            origin = provenance(device) | origin | {"case_seconds": time.time() - begun}
            keep(out, case, entry | {"provenance": origin})


def training(case: Case) -> Iterator[dict[str, Any]]:
    from dape.train.measure import measure
    from dape.train.recipe import Recipe, override, read

    recipe = read(ROOT / f"recipes/{case.size}.yaml", Recipe)
    chosen = {"model.scheme": case.scheme, "hardware.micro_batch_size": None}
    recipe = override(recipe, chosen | case.changes)
    # The time of a step grows with the square of the length.
    steps = 3 if case.length <= STEP_LENGTHS[0] else 1
    warm_up = 1 if case.length < LONG else 0
    for reading in measure(recipe, list(case.micro_batches), steps, warm_up):
        yield asdict(reading)


def attention(case: Case) -> Iterator[dict[str, Any]]:
    """Yield the time of forward and backward pass of one sequence over all ranks."""
    from dape import attention as alone
    from dape.attention.context_parallel import ContextParallel
    from dape.positions.scheme import resolve

    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    spread = ContextParallel(dist.group.WORLD.group_name, dist.get_rank(), ranks)
    torch.manual_seed(0)  # all ranks have one bias and one adapter
    scheme = resolve(case.scheme)
    sizes = {"num_heads": 12, "head_dim": 64, "train_length": 512}
    bias, adapter = (
        module and module.to(device)
        for module in (scheme.build(place, sizes, {}) for place in ("bias", "adapter"))
    )
    exact = difference(spread, alone, bias, adapter, device) if ranks > 1 else 0.0
    parts = [
        torch.randn(1, 12, case.length // ranks, 64, device=device).bfloat16().requires_grad_()
        for _ in range(3)
    ]
    attend = spread.attention if ranks > 1 else alone
    times = []
    for _ in range(3):
        dist.barrier()
        _synchronize(device)
        begun = time.perf_counter()
        attend(*parts, bias, adapter).sum().backward()
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    seconds = torch.tensor(min(times[1:]), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    yield {"seconds": float(seconds), "gib": peak, "difference": exact}
    dist.destroy_process_group()


def difference(spread: Any, alone: Any, bias: Any, adapter: Any, device: torch.device) -> float:
    """Return how far output and gradients are from one GPU's, in float32, over the largest."""
    whole = [torch.randn(1, 12, 2048, 64, device=device).requires_grad_() for _ in range(3)]
    parts = [spread.part(x.detach(), dim=2).requires_grad_() for x in whole]
    found = []
    for attend, tensors in ((alone, whole), (spread.attention, parts)):
        out = attend(*tensors, bias, adapter)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    pairs = [(spread.part(right, dim=2), ours) for right, ours in zip(*found, strict=True)]
    return max(float((right - ours).abs().max() / right.abs().max()) for right, ours in pairs)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text()) if out.exists() else []


def keep(out: Path, case: Case, entry: dict[str, Any]) -> None:
    """Put an entry of a case into the file, in place of the same micro-batch or another commit.

    A failure stands beside no result.
    """
    from dape.files import write_json

    made = {"case": asdict(case), "key": case.key, **entry}
    key = json.loads(json.dumps(case.key))

    def same(other: dict[str, Any]) -> bool:
        micro = other.get("micro_batch_size") == made.get("micro_batch_size")
        replaced = micro or "failed" in other or _origin(other) != _origin(made)
        return other["key"] == key and replaced

    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, [each for each in results(out) if not same(each)] + [made])


def ended(found: list[dict[str, Any]], case: Case) -> bool:
    """Return whether a case has results and was not interrupted between its micro-batches."""
    own = [each for each in found if each["key"] == case.key and "failed" not in each]
    last = None, case.micro_batches[-1]
    return any("ended" in each or each.get("micro_batch_size") in last for each in own)


def end(out: Path, case: Case, fault: str | None) -> None:
    """Mark the results of a case as all that there are; without any, keep what went wrong."""
    from dape.files import write_json

    found = results(out)
    own = [each for each in found if each["key"] == case.key and "failed" not in each]
    if own:
        write_json(out, [each | {"ended": True} if each in own else each for each in found])
    elif fault:
        keep(out, case, {"failed": fault})


def best(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of each case the fastest entry, or that it failed."""
    fastest: dict[str, dict[str, Any]] = {}
    for entry in found:
        key = json.dumps(entry["key"])
        if key not in fastest or _speed(entry) > _speed(fastest[key]):
            fastest[key] = entry
    return list(fastest.values())


def _speed(entry: dict[str, Any]) -> float:
    return -1.0 if "failed" in entry else 1 / entry["seconds"]


def page(found: list[dict[str, Any]]) -> str:
    """Return the table under a title, with devices, commits and versions of the results."""
    made = [each["provenance"] for each in found if "provenance" in each]
    versions = [", ".join(" ".join(each) for each in one["versions"].items()) for one in made]
    origin = {name: [one[name] for one in made] for name in ("device", "commit")}
    lines = (
        f"- {name}: {'; '.join(dict.fromkeys(map(str, values)))}"
        for name, values in {**origin, "versions": versions}.items()
        if values
    )
    return "\n".join([TITLE, table(found), "", *lines]).rstrip()


def table(found: list[dict[str, Any]]) -> str:
    """Return the table: each case beside one GPU, and beside nope on as many."""
    lines = [
        "| part | size | scheme | GPUs | length | micro-batch | GiB | s | tokens/s | MFU |"
        " of N x one GPU | of nope |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    entries = best(found)
    for entry in sorted(entries, key=lambda each: [str(each["case"]["part"]), *_order(each)]):
        case = entry["case"]
        cells = [case[name] for name in ("part", "size", "scheme", "gpus", "length")]
        if "failed" in entry:
            lines.append(f"| {' | '.join(map(str, cells))} | {entry['failed']} | | | | | | |")
            continue
        one = beside(entries, entry, gpus=1)
        nope = beside(entries, entry, scheme="nope")
        gain = one and work_of(entry) / (work_of(one) * case["gpus"])
        cost = nope and work_of(entry) / work_of(nope)
        cells += [entry.get("micro_batch_size"), _text(entry.get("gib"), ".1f")]
        cells += [_text(entry["seconds"], ".3f"), _text(entry.get("tokens_per_second"), ",.0f")]
        cells += [_text(each, ".0%") for each in (entry.get("mfu"), gain, cost)]
        lines.append(f"| {' | '.join('' if each is None else str(each) for each in cells)} |")
    return "\n".join(lines)


def _order(entry: dict[str, Any]) -> list[Any]:
    return [entry["case"][name] for name in ("size", "length", "scheme", "gpus")]


def beside(entries: list[dict[str, Any]], entry: dict[str, Any], **other: Any) -> Any:
    """Return the entry of another number of GPUs or scheme, None without one of the same origin."""
    names = ("part", "size", "length", "scheme", "gpus")
    asked = [{**entry["case"], **other}[name] for name in names]
    fits = (each for each in entries if [each["case"][name] for name in names] == asked)
    same = (each for each in fits if "failed" not in each and _origin(each) == _origin(entry))
    return next(same, None)


def _origin(entry: dict[str, Any]) -> list[Any]:
    """Return commit and device of an entry; numbers of different ones cannot be compared."""
    made = entry.get("provenance", {})
    return [made.get("commit"), made.get("device")]


def work_of(entry: dict[str, Any]) -> float:
    """Return tokens a second; of attention, sequences."""
    return entry.get("tokens_per_second") or 1 / entry["seconds"]


def _text(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def listed(kind: type) -> Any:
    return lambda text: [kind(each) for each in text.split(",")]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--gpus", type=listed(int), default=[4, 1, 2])
    parser.add_argument("--sizes", type=listed(str), default=["2.7b", "6.7b", "125m", "350m"])
    parser.add_argument("--schemes", type=listed(str), default=["nope", "dape-kerple"])
    parser.add_argument("--lengths", type=listed(int), default=list(STEP_LENGTHS))
    parser.add_argument("--seconds", type=float, default=480, help="limit of a case")
    parser.add_argument("--out", type=Path, default=ROOT / "results/scaling/scaling.json")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Refuse parts, sizes and numbers of GPUs without a layout.

    Raises:
        UserError: naming the value and the values that there are.
    """
    gpus = next(iter(LAYOUTS.values()))
    given = {"part": (arguments.parts, PARTS), "size": (arguments.sizes, LAYOUTS)}
    given["number of GPUs"] = (map(str, arguments.gpus), map(str, gpus))
    for what, (names, known) in given.items():
        allowed = [*known]
        for name in names:
            if name not in allowed:
                raise unknown(what, name, allowed)


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.worker:
        work(Case(**arguments.worker), arguments.out)
        return
    from dape.files import check_writable

    try:
        check(arguments)
        check_writable(arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    for case in [] if arguments.table else cases(arguments):
        if arguments.plan or (ended(results(arguments.out), case) and not arguments.again):
            print("planned" if arguments.plan else "there", case)
            continue
        begun = time.perf_counter()
        fault = run(case, arguments.out, arguments.seconds)
        end(arguments.out, case, fault)
        print(f"{time.perf_counter() - begun:.0f} s", case, fault or "", flush=True)
    if not arguments.plan:
        print(page(results(arguments.out)))


if __name__ == "__main__":
    main()
