"""The CUDA kernels on a CPU: compiled as C++, with `emulated.h` in place of `ptx.cuh`."""

import ctypes
import subprocess
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from dape.attention.fused.cuda.launch import word

HEADER = Path(__file__).with_name("emulated.h")
PTX = files("dape.attention.fused.cuda").joinpath("ptx.cuh").read_text()
ENTRY = """
extern "C" void entry(const uint64_t* words, const int* grid, int width) {{
  launch({name}, words, grid, width, {cluster});
}}
"""


def _translate(source, target, *flags):
    words = ["c++", "-std=c++17", "-O1", "-fPIC", "-w", *flags, source, "-o", target]
    subprocess.run(words, check=True)


def _header(folder):
    """Return a folder with the header, compiled ahead: it takes most of a kernel's time."""
    copy = folder / HEADER.name
    if not copy.exists():
        copy.write_bytes(HEADER.read_bytes())
        _translate(copy, folder / f"{HEADER.name}.gch", "-x", "c++-header")
    return folder


class Kernel(NamedTuple):
    """A kernel of the form of `launch.Kernel`."""

    entry: Callable[..., None]
    arg_names: tuple[str, ...] = ()

    def __getitem__(self, grid):
        return partial(self.start, grid)

    def start(self, grid, *args):
        words = (ctypes.c_uint64 * len(args))(*map(word, args))
        self.entry(words, (ctypes.c_int * 3)(*grid[:3]), grid[3])


def compiled(source, name, folder):
    """Return the kernel of a source as `launch.kernel` does, for tensors on a CPU."""
    assert PTX in source
    cluster = "CLUSTER" if "__cluster_dims__" in source else "1"
    entry = ENTRY.format(name=name, cluster=cluster)
    text = source.replace(PTX, '#include "emulated.h"') + entry
    path = folder / f"{name}-{sha256(text.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        given = folder / f"{path.stem}.cpp"
        given.write_text(text)
        _translate(given, path, "-shared", f"-I{_header(folder)}", "-include", HEADER.name)
    return Kernel(ctypes.CDLL(str(path)).entry)
