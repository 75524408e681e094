"""Peak memory of `dape.attention` on a CPU, forward and backward: `reference` against `chunked`.

    python benchmarks/attention_memory.py

The peak is what a call needs beyond its query, key and value, found in two ways:

- counted: the bytes of all tensors alive at once, at the worst moment. The tensors hold no data
  (`FakeTensorMode`), so cases of any size can be counted, and both backends are counted alike.
- measured: the growth of the resident set, each case in a process of its own. Only cases that fit
  the limit are measured; they check the count.

Writes `results/attention_memory.json`, and a table beside it.
"""

import argparse
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dape
from dape.files import check_writable, write_json
from dape.provenance import provenance

HEADS, HEAD_DIM = 12, 64
LENGTHS = (1024, 2048, 4096, 8192)
SCHEMES = ("none", "dape-kerple")
BACKENDS = ("reference", "chunked")
LIMIT = 3 * 2**30  # bytes a measured case may need


class LiveStorages(TorchDispatchMode):
    """Adds up the bytes of the storages that operations return, until those are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, id(storage), storage.nbytes())

    def free(self, name: int, size: int) -> None:
        self.known.remove(name)
        self.live -= size


def prepare(scheme: str, backend: str, length: int) -> Callable[[], None]:
    """Return a call of forward and backward, with its inputs in place."""
    parts = (dape.Kerple(HEADS), dape.DAPE(HEADS)) if scheme == "dape-kerple" else ()
    qkv = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    cotangent = torch.randn(1, HEADS, length, HEAD_DIM)
    return lambda: dape.attention(*qkv, *parts, backend=backend).backward(cotangent)


def count(scheme: str, backend: str, length: int) -> int:
    """Return the peak of one call in bytes, by the tensors alive."""
    with FakeTensorMode(), LiveStorages() as storages:
        call = prepare(scheme, backend, length)
        before = storages.live
        call()
    return storages.peak - before


def resident(peak: bool = False) -> int:
    """Return the resident set of this process in bytes, now or its peak since the last reset."""
    status = Path("/proc/self/status").read_text()
    name = "VmHWM" if peak else "VmRSS"
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])  # type: ignore[index]


def measure(scheme: str, backend: str, length: int) -> int:
    """Return the peak of one call in bytes, by the resident set of this process."""
    prepare(scheme, backend, 64)()  # libraries load and keep buffers at their first use
    call = prepare(scheme, backend, length)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    call()
    return resident(peak=True) - before


def measure_apart(*case: object) -> int:
    """Return what `measure` does, in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, case)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def shown(result: dict[str, Any]) -> str:
    """Return the peak in MiB: measured, or counted where it was not."""
    size = f"{(result['measured'] or result['counted']) / 2**20:,.0f}"
    return size if result["measured"] else f"({size})"


def table(record: dict[str, Any]) -> str:
    """Return the results in Markdown."""
    cells = {(r["scheme"], r["length"], r["backend"]): r for r in record["results"]}
    lines = [
        f"Peak memory of attention, forward and backward, beyond query, key and value: {HEADS}",
        f"heads of {HEAD_DIM}, batch 1, float32, causal. MiB of resident set; in parentheses, of",
        "live tensors, where that would not fit.",
        "",
        "| scheme | tokens | reference | chunked | reference / chunked |",
        "|---|---|---|---|---|",
    ]
    for scheme in SCHEMES:
        for length in LENGTHS:
            row = [cells[scheme, length, backend] for backend in BACKENDS]
            whole, chunked = (r["measured"] or r["counted"] for r in row)
            sizes = " | ".join(map(shown, row))
            lines.append(f"| {scheme} | {length:,} | {sizes} | {whole / chunked:.1f} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    about = f"`{record['command']}` at {record['commit']}; {versions}; {record['device']}"
    return "\n".join([*lines, "", about, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of attention on a CPU.")
    parser.add_argument("--out", type=Path, default=Path("results/attention_memory.json"))
    parser.add_argument("--measure", nargs=3, metavar=("SCHEME", "BACKEND", "LENGTH"))
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.measure:
        scheme, backend, length = options.measure
        print(measure(scheme, backend, int(length)))
        return
    check_writable(options.out, options.out.with_suffix(".md"))
    results = []
    for scheme, length, backend in product(SCHEMES, LENGTHS, BACKENDS):
        case = {"scheme": scheme, "backend": backend, "length": length}
        counted = count(**case)
        measured = measure_apart(*case.values()) if counted < LIMIT else None
        results.append({**case, "counted": counted, "measured": measured})
        print(results[-1], flush=True)
    command = f"python benchmarks/attention_memory.py --out {options.out}"
    record = {**provenance("cpu"), "command": command, "unit": "bytes", "results": results}
    write_json(options.out, record)
    options.out.with_suffix(".md").write_text(table(record))


if __name__ == "__main__":
    main()
