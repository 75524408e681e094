"""Seconds that `dape eval` takes at 128, 256, ..., 16,384 tokens, and where they go.

    python benchmarks/evaluation_speed.py --schemes dape-kerple,kerple,rope --out speed.json

Models of 125M parameters with random weights read 64 windows of random bytes: the time of a run
does not depend on what either says. Each scheme is measured four times:

- a command in a process of its own, whose kernels may have to be compiled, and the same once more;
- in one process, the same evaluation twice, with the seconds of each length of the second.

The command should take 20 seconds at most.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import dape
from dape import cli
from dape.evaluate.evaluation import evaluate
from dape.evaluate.watch import Watch
from dape.files import check_writable, write_json
from dape.provenance import provenance

LIMIT = 20.0
SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}


class Clock(Watch):
    """Keeps the seconds up to each length's end since the one before; an end waits for the GPU."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def announce(self, name, length, outcome):
        now = time.perf_counter()
        self.seconds[length], self.last = now - self.last, now


def corpus(folder, windows, longest):
    """Prepare texts of random bytes, one for each window of the longest length."""
    drawn = random.Random(0)
    for split, count in (("train", 1), ("validation", 1), ("test", windows)):
        (folder / "texts" / split).mkdir(parents=True)
        for number in range(count):
            text = bytes(drawn.choices(range(97, 123), k=longest + 2)).decode()
            (folder / "texts" / split / f"{number}.txt").write_text(text)
    data = folder / "data"
    words = ["prepare", folder / "texts", "--tokenizer", "byte", "--out", data]
    assert cli.main([str(word) for word in words]) == 0
    return data


def model(folder, scheme, sizes):
    """Save a model of a scheme with random weights."""
    torch.manual_seed(0)
    config = dape.DapeConfig(scheme=scheme, vocab_size=50_257, train_length=512, **sizes)
    dape.DapeForCausalLM(config).save_pretrained(folder / scheme)
    return folder / scheme


def measure(run, data, lengths, windows, device, precision):
    """Return the seconds of the two commands, of the two evaluations, and of each length."""
    shown = ",".join(map(str, lengths))
    words = ("eval", run, "--data", data, "--lengths", shown, "--documents", windows)
    more = ("--blocks", 1, "--device", device, "--precision", precision, "--again")
    command = [sys.executable, "-m", "dape", *map(str, words + more)]
    found = {}
    for name in ("first command", "command"):
        begun = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        found[name] = time.perf_counter() - begun
    for name in ("first call", "call"):
        clock = Clock()
        begun = clock.last
        evaluate(
            *(run, data, lengths),
            documents=windows, blocks=1, device=device, precision=precision, again=True,
            watch=clock,
        )  # fmt: skip
        found[name] = time.perf_counter() - begun
    # Before the first length is done, the corpus is planned and the weights are loaded.
    return found | {"lengths": clock.seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schemes", default="dape-kerple,kerple,rope,dape3-kerple,fire,dape-fire")
    parser.add_argument("--lengths", default="128,256,512,1024,2048,4096,8192,16384")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.out:
        check_writable(Path(options.out))
    lengths = [int(length) for length in options.lengths.split(",")]
    origin = provenance(options.device)
    records = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = corpus(folder, options.windows, max(lengths))
        print(f"{origin['device']}, {options.windows} windows at {options.lengths}")
        print(f"{'scheme':<14} {'first':>8} {'command':>8} {'call':>8}  seconds of each length")
        for scheme in options.schemes.split(","):
            run = model(folder, scheme, SIZES | {"num_hidden_layers": options.layers})
            found = measure(run, data, lengths, options.windows, options.device, options.precision)
            records[scheme] = found
            holds = "holds" if found["command"] <= LIMIT else f"more than {LIMIT:g} s"
            each = " ".join(f"{seconds:.2f}" for seconds in found["lengths"].values())
            print(
                f"{scheme:<14} {found['first command']:>8.1f} {found['command']:>8.1f}"
                f" {found['call']:>8.1f}  {each}  {holds}",
                flush=True,
            )
    if options.out:
        write_json(Path(options.out), {"options": vars(options), "schemes": records, **origin})


if __name__ == "__main__":
    main()
