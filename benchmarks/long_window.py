"""Perplexity of one long window on a single GPU, and spread over several: equal, and how fast.

    dape train recipes/125m.yaml --data data/books --name long --training.steps 300
    python benchmarks/long_window.py runs/long [--gpus 4] [--lengths 262144] [--split train]
        [--stride 32768] [--precision fp32] [--minutes 9] [--out results/scaling/long-window.json]

Both commands are `dape eval` on a document drawn among those longer than the window, with the last
STRIDE tokens scored. The table has the losses and the difference. `--out` holds both records.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import launch

from dape.errors import UserError
from dape.files import check_writable, write_json

EQUAL = {"fp32": 1e-5, "bf16": 1e-3}  # nats; sums in another order, rounded to 16 bits in bf16


def measured(arguments: argparse.Namespace, processes: int, folder: Path) -> dict[str, Any]:
    """Return the record of `dape eval` in a number of processes, with the seconds of the command.

    Raises:
        UserError: if the command fails.
    """
    words = ["-m", "dape", "eval", arguments.run, "--lengths", arguments.lengths]
    words += ["--protocol", "sliding", "--stride", arguments.stride, "--split", arguments.split]
    words += ["--documents", 1, "--blocks", 1, "--precision", arguments.precision]
    words += ["--out", folder / f"{processes}"]
    single = [sys.executable, *map(str, words)]
    command = launch.torchrun(processes, *words) if processes > 1 else single
    begun = time.perf_counter()
    launch.run(command, folder / f"{processes}.log", 60 * arguments.minutes)
    seconds = time.perf_counter() - begun
    (file,) = (folder / f"{processes}").rglob("*.json")
    found = json.loads(file.read_text())
    found["provenance"]["command"] = arguments.command  # in place of one with a passing folder
    return {"processes": processes, "command_seconds": seconds, **found}


def table(records: list[dict[str, Any]]) -> str:
    """Return the Markdown table: a row for each number of processes and length."""
    lines = [
        "| length | GPUs | loss | perplexity | difference of the loss | seconds with the start |"
    ]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    one = {each["length"]: each["loss"] for each in records[0]["measurements"]}
    for record in records:
        for each in record["measurements"]:
            cells = (
                f"{each['length']:,}",
                str(record["processes"]),
                f"{each['loss']:.6f}",
                f"{each['perplexity']:.4f}",
                f"{each['loss'] - one[each['length']]:.1e}",
                f"{record['command_seconds']:.0f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unequal(records: list[dict[str, Any]], most: float) -> list[int]:
    """Return the lengths at which the losses differ by more than `most`, or one lacks."""
    one, several = ({each["length"]: each["loss"] for each in r["measurements"]} for r in records)
    both = one.keys() & several.keys()
    return sorted(
        length
        for length in one.keys() | several.keys()
        if length not in both or not abs(several[length] - one[length]) <= most
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--lengths", default="262144")
    parser.add_argument("--stride", type=int, default=32_768)
    parser.add_argument("--split", default="train", help="the only split with books so long")
    parser.add_argument("--precision", choices=EQUAL, default="fp32")
    parser.add_argument("--minutes", type=float, default=9, help="limit of each command")
    default = Path("results/scaling/long-window.json")
    parser.add_argument("--out", type=Path, default=default)
    return parser


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    arguments = parser().parse_args(words)
    arguments.command = shlex.join(["python", "benchmarks/long_window.py", *words])
    records: list[dict[str, Any]] = []
    try:
        check_writable(arguments.out)
        with TemporaryDirectory() as folder:
            for processes in (1, arguments.gpus):
                records.append(measured(arguments, processes, Path(folder)))
                write_json(arguments.out, records)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table(records))
    most = EQUAL[arguments.precision]
    if different := unequal(records, most):
        sys.exit(f"error: the losses at {different} differ by more than {most}")


if __name__ == "__main__":
    main()
