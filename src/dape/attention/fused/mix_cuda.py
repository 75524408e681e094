"""The kernels across heads in CUDA, for two-byte dtypes: compiled when first used, by NVRTC."""

from functools import cache

from torch import Tensor

from dape.attention.fused import backward_cuda, forward_cuda
from dape.attention.fused.geometry import ALIGNMENT, Band, Mixing, Problem, diagonals
from dape.attention.fused.launch import Kernel, kernel, source_of
from dape.attention.fused.slots import Slots, padded, padded_size

tile_rows = 32
tile_keys = 32
# Rows of a tile that a block has, blocks that fill a large GPU a few times over, how many of them a
# multiprocessor holds, and the rows of a segment that are worth its start.
WARPS, BLOCKS, RESIDENT, ROWS = 4, 1024, 2, 256
shares = tile_rows // WARPS
lines = WARPS + tile_keys
# Tiles of a warp that are under way or in work.
STAGES = 3
# Past so many weights of a layer, padded, the accumulators of a warp no longer fit its registers.
MOST_WEIGHTS = 1024


def obstacle(heads: int, units: int) -> str | None:
    """Return why the kernels do not serve so many heads and hidden units, or None if they do."""
    if padded_size(heads) * padded_size(units) <= MOST_WEIGHTS:
        return None
    return f"{heads} heads with hidden={units}: it serves 32 heads with 32 units, or 16 with 64"


def share(batch: int, diagonals: int, rows: int) -> tuple[int, int]:
    """Return how many elements a block takes, and into how many segments to cut a diagonal."""
    blocks = shares * max(1, diagonals)
    elements = max(1, min(batch, batch * blocks // BLOCKS))
    return elements, max(1, min(16, rows // ROWS, BLOCKS // (batch * blocks)))


def whole(problem: Problem, mixing: Mixing, *found: Tensor) -> bool:
    """Fill what `banded.forward` returns by one kernel; return whether there is one."""
    where = forward_cuda.layout_of(problem, mixing)
    if where is not None:
        forward_cuda.forward(problem, mixing, where, *found)
    return where is not None


def walk(problem: Problem, mixing: Mixing) -> backward_cuda.Walk | None:
    """Return the backward pass as one kernel, where there is one for a problem."""
    where = backward_cuda.layout_of(problem, mixing)
    return None if where is None else backward_cuda.Walk.of(problem, mixing, where)


def mix(x: Tensor, band: Band, problem: Problem, mixing: Mixing) -> None:
    """Turn the scores X of a band into logits without C, in place; -inf where unseen."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    batch, rows, keys = band.sizes
    _, segments = share(batch, where.number, rows)
    compiled(x.device.index, "mix", *macros(problem, mixing))(
        grid=(where.number, batch, shares * segments),
        block=(32 * WARPS, 1, 1),
        args=[
            x, mixing.weight_in, mixing.weight_out, mixing.hidden, mask,
            rows, keys, mixing.hidden.shape[0],
            where.first, where.band_tile, where.offset, *x.stride()[:2], mask.stride(0),
        ],
    )  # fmt: skip


def mix_backward(
    x: Tensor,
    y: Tensor,
    band: Band,
    problem: Problem,
    mixing: Mixing,
    lse: Tensor,
    delta: Tensor,
    slots: Slots,
) -> tuple[Tensor, Tensor]:
    """Return P and dA of a band in place of scores X and dP in Y; add to the slots."""
    where = diagonals(problem, band, tile_rows, tile_keys)
    mask = x if problem.mask is None else problem.mask[band.batch, band.keys]
    batch, rows, keys = band.sizes
    groups = len(slots.sums) // slots.segments
    compiled(x.device.index, "mix_backward", *macros(problem, mixing))(
        grid=(where.number, groups, shares * slots.segments),
        block=(32 * WARPS, 1, 1),
        args=[
            x, y, mixing.weight_in, mixing.weight_out, mixing.hidden, mixing.static,
            lse, delta, mask, *problem.gated().values(), slots.sums[:, where.slot * shares :],
            batch, slots.elements, rows, keys,
            mixing.hidden.shape[0], where.first, where.band_tile, where.offset,
            *slots.sums.shape[1:], int(slots.add),
            *x.stride()[:2], *lse.stride(), mask.stride(0),
        ],
    )  # fmt: skip
    return x, y


def macros(problem: Problem, mixing: Mixing) -> tuple[int, ...]:
    """Return what the source is compiled for, in the order of `NAMES`."""
    hidden, heads = mixing.weight_in.shape
    switches = int(problem.causal), int(problem.mask is not None)
    sizes = tile_rows, tile_keys, WARPS, STAGES, ALIGNMENT
    return heads, hidden, *reversed(padded(mixing)), *switches, *sizes


NAMES = ["H", "D", "HEADS", "UNITS", "CAUSAL", "MASKED", "ROWS", "KEYS", "WARPS", "STAGES", "BLOCK"]


def shared_memory(name: str, heads: int, units: int) -> int:
    """Return the bytes of shared memory of a kernel for padded numbers of heads and units."""
    matrix, tile, hidden = 2 * heads * units, 2 * heads * tile_keys, 2 * tile_keys * units
    if name == "mix":
        return 2 * matrix + WARPS * (hidden + STAGES * tile)
    walk = hidden + 4 * tile_keys * heads + STAGES * (2 * tile + 8 * heads)
    sums = 4 * (tile_keys * (units + heads) + 2 * heads * units)
    return 4 * matrix + WARPS * max(walk, sums)


def source(name: str, *values: int) -> str:
    """Return the source of the kernel of that name for these macros."""
    defines = dict(zip(NAMES, values, strict=True))
    defines["SHARED"] = shared_memory(name, defines["HEADS"], defines["UNITS"])
    if name == "mix_backward":
        defines |= {"BACKWARD": 1, "BLOCKS": RESIDENT}
    return source_of("mix.cu", defines)


@cache
def compiled(device: int, name: str, *values: int) -> Kernel:
    """Return the kernel of that name for these macros, on the current device, which is `device`."""
    size = shared_memory(name, *values[2:4])
    return kernel(source(name, *values), name, shared_memory=size)
