"""Memory and speed of a recipe on the devices of this machine: a few updates on random tokens."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from dape.errors import RankError, out_of_memory
from dape.train import parallelize
from dape.train.estimate import GIB, peak_flops
from dape.train.loop import Session, updates
from dape.train.plan import check_memory, entries_of
from dape.train.recipe import Recipe, override
from dape.train.run import lay_out
from dape.train.task import Batch, LanguageModelling, draw

# Usable fraction of a GPU's memory, because allocations leave gaps.
USABLE = 0.95


@dataclass(frozen=True, slots=True)
class Reading:
    """Memory and time of updates with a size of micro-batch.

    `seconds` is the median of the updates, whose times are in `updates`. `gib` is the highest peak
    of memory over the devices, and `mfu` the model FLOPs utilisation. Both are None on a CPU.
    `tokens_per_second` counts all devices together.
    """

    micro_batch_size: int
    seconds: float
    tokens_per_second: float
    gib: float | None
    mfu: float | None
    updates: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Return the measurement as a line of text."""
        words = [f"micro_batch_size {self.micro_batch_size}"]
        words += [] if self.gib is None else [f"{self.gib:.1f} GiB"]
        words += [f"{self.tokens_per_second:,.0f} tokens/s", f"{self.seconds:.2f} s a step"]
        return "  ".join(words + ([] if self.mfu is None else [f"MFU {self.mfu:.0%}"]))


class RandomTokens(LanguageModelling):
    """The model of a recipe, on random tokens in place of data."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self._entries = recipe, entries_of(recipe)
        self.tokens = recipe.training.batch_size * recipe.training.length

    def build(self, device: torch.device) -> torch.nn.Module:
        """Draw the model."""
        with device:
            return draw(self.recipe, self._entries)

    def batch(self, split: str, step: int, rank: int, ranks: int) -> Batch:
        """Return random tokens."""
        rows = self.recipe.training.batch_size // ranks
        generator = torch.Generator().manual_seed(step * ranks + rank)
        shape = (rows, self.recipe.training.length + 1)
        return (torch.randint(self._entries, shape, generator=generator),)


def measure(
    recipe: Recipe, sizes: list[int] | None = None, steps: int = 3, warm_up: int = 1
) -> Iterator[Reading]:
    """Yield memory and time of `steps` updates, for growing sizes of the micro-batch.

    By default the sizes are the divisors of the number of sequences that a device has of a batch,
    in ascending order. Measuring stops before a size that will not fit, by an extrapolation from
    the memory of smaller sizes.

    Args:
        recipe: the recipe; `micro_batch_size` is ignored.
        sizes: the sizes, in ascending order.
        steps: updates to measure.
        warm_up: earlier updates, to compile, tune and allocate.

    Raises:
        RankError: if a device of several runs out of memory nevertheless.
    """
    recipe = override(recipe, {"training.steps": warm_up + steps, "hardware.micro_batch_size": 1})
    check_memory(recipe)
    session = lay_out(RandomTokens(recipe), parallelize.launch(recipe))
    share = recipe.micro_batches(recipe.groups(session.fabric.world_size))
    found: list[Reading] = []
    for size in sizes or [n for n in range(1, share + 1) if share % n == 0]:
        if not _fits(found, size, session.fabric.device):
            return
        task = RandomTokens(override(recipe, {"hardware.micro_batch_size": size}))
        task.context_parallel = session.task.context_parallel
        try:
            found.append(_reading(replace(session, task=task), size, warm_up))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if found and session.fabric.world_size == 1:
                return
            raise RankError(
                f"hardware.micro_batch_size={size} does not fit on {session.fabric.device}; take a"
                " shorter training.length or hardware.activation_checkpointing=blocks"
            ) from None
        yield found[-1]


def _fits(found: list[Reading], size: int, device: torch.device) -> bool:
    """Return whether a size fits, by linear extrapolation from the memory of two smaller sizes."""
    if len(found) < 2 or device.type != "cuda":
        return True
    before, last = ((each.micro_batch_size, each.gib or 0.0) for each in found[-2:])
    growth = (last[1] - before[1]) / (last[0] - before[0])
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    return last[1] + growth * (size - last[0]) < USABLE * total


def _reading(session: Session, size: int, warm_up: int) -> Reading:
    fabric, task = session.fabric, session.task
    gpu = fabric.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = [float(metrics["update_seconds"]) for metrics in updates(session)][warm_up:]
    middle = torch.tensor(median(times), device=fabric.device)
    seconds = float(fabric.all_reduce(middle, reduce_op="max"))
    speed = (task.tokens or 0) / seconds
    gib = mfu = None
    if gpu:
        peak = torch.tensor(torch.cuda.max_memory_allocated() / GIB, device=fabric.device)
        gib = float(fabric.all_reduce(peak, reduce_op="max"))
        ceiling, flops = peak_flops(fabric.device), task.flops(session.model)
        mfu = speed * flops / (ceiling * fabric.world_size) if ceiling and flops else None
    return Reading(size, seconds, speed, gib, mfu, tuple(times))
