"""Evaluation protocols: the scored tokens of a window, and their context.

A *block* is a sequence of consecutive target tokens of a document. The blocks depend only on the
longest length. Therefore every length, and every model on a corpus, scores equal tokens, and
lengths differ only in context. A *window* of length L that ends before token e feeds the L tokens
[e - 1 - L, e - 1) in a forward pass and predicts the L tokens [e - L, e). The last `min(block, L)`
count.

| protocol | block | between blocks | windows a block |
|---|---|---|---|
| `last` | the last 256 tokens (DAPE, sections 4, 5) | the longest length | 1 |
| `sliding` | `stride` tokens | `stride` | 1 |
| `non_overlapping` | as many tokens as the longest length | the longest length | longest / L |

Scored tokens have between L - block + 1 and L tokens of context under `last` and `sliding`, and
between 1 and L under `non_overlapping`. If the shortest length is below 256, a block of `last` is
as long as the shortest length. The first token of a document is never a target. The end-of-text
token stands for no text and is never a target either.

The released DAPE code rebuilds the data loader for each length, and columns have different texts.
As configured, the code averages over all tokens of a window in place of the last 256.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int

from dape.errors import UserError, unknown

Name = Literal["last", "sliding", "non_overlapping"]
LAST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Protocol:
    """Blocks of `block` tokens, `step` apart, with up to `longest` tokens of context."""

    name: str
    longest: int
    block: int
    step: int

    def scored(self, length: int) -> int:
        """Return the number of scored predictions of a window of `length` tokens."""
        return min(self.block, length)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Targets: block b is tokens [stops[b] - block, stops[b]) of document documents[b]."""

    protocol: Protocol
    documents: Int[np.ndarray, " blocks"]
    stops: Int[np.ndarray, " blocks"]

    def windows(self, length: int) -> "Windows":
        """Return windows of `length` tokens that score every block exactly once."""
        scored = self.protocol.scored(length)
        offsets = np.arange(scored - self.protocol.block, 1, scored)
        ends = (self.stops[:, None] + offsets).ravel()
        return Windows(length, scored, np.repeat(self.documents, len(offsets)), ends)


@dataclass(frozen=True, slots=True)
class Windows:
    """Window w feeds tokens [ends[w] - 1 - length, ends[w] - 1) and scores `scored` predictions."""

    length: int
    scored: int
    documents: Int[np.ndarray, " windows"]
    ends: Int[np.ndarray, " windows"]

    @property
    def tokens(self) -> int:
        """Return the number of tokens to feed."""
        return self.length * len(self.ends)


def protocol(name: str, lengths: Sequence[int], stride: int | None = None) -> Protocol:
    """Return the protocol called `name` for windows of `lengths` tokens.

    `sliding` needs `stride`, in tokens and at most the shortest length.

    Raises:
        UserError: for an unknown name, or lengths or a stride unfit for the protocol.
    """
    if name not in get_args(Name):
        raise unknown("protocol", name, get_args(Name))
    if not lengths or min(lengths) < 1:
        raise UserError(f"lengths {list(lengths)}: give at least a length, of 1 token or more")
    check_stride(name, stride)
    shortest, longest = min(lengths), max(lengths)
    if stride is not None:
        if not 1 <= stride <= shortest:
            raise UserError(f"stride {stride}: must be from 1 to the shortest length, {shortest}")
        return Protocol(name, longest, block=stride, step=stride)
    if name == "last":
        return Protocol(name, longest, block=min(LAST_TOKENS, shortest), step=longest)
    ragged = [length for length in lengths if longest % length]
    if ragged:
        raise UserError(
            f"lengths {ragged}: `non_overlapping` needs divisors of the longest, {longest}, "
            "because every length scores the same tokens"
        )
    return Protocol(name, longest, block=longest, step=longest)


def check_stride(name: str, stride: int | None) -> None:
    """Raise a `UserError` for `sliding` without a stride, or another protocol with a stride."""
    if (stride is None) == (name == "sliding"):
        verb = "needs a" if name == "sliding" else "has no"
        raise UserError(f"protocol {name} {verb} stride; only sliding takes --stride TOKENS")


def choose_blocks(
    protocol: Protocol,
    text_lengths: Int[np.ndarray, " all_documents"],
    *,
    documents: int,
    blocks: int,
    seed: int,
) -> Blocks:
    """Return at most `blocks` evenly spread blocks per document, in at most `documents` documents.

    `seed` draws documents longer than the longest window. `text_lengths` counts the tokens of
    documents, without end-of-text.

    Raises:
        UserError: if no document is long enough.
    """
    needed = protocol.longest + 1
    eligible = np.flatnonzero(text_lengths >= needed)
    if not len(eligible):
        raise UserError(
            f"length {protocol.longest}: no document has the required {needed} tokens, the longest "
            f"of {len(text_lengths)} has {max(text_lengths, default=0)}; ask for shorter lengths"
        )
    number = min(documents, len(eligible))
    chosen = np.sort(np.random.default_rng(seed).choice(eligible, number, replace=False))
    counts = (text_lengths[chosen] - needed) // protocol.step + 1
    steps = [np.linspace(0, count - 1, min(blocks, count)).round().astype(int) for count in counts]
    return Blocks(
        protocol,
        documents=np.repeat(chosen, [len(each) for each in steps]),
        stops=needed + protocol.step * np.concatenate(steps),
    )
