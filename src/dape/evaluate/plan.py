"""The plan of an evaluation: the windows of each length, and their common targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dape.data.shards import Corpus
from dape.data.tokenizer import UNCOUNTED, token_bytes
from dape.errors import UserError
from dape.evaluate.perplexity import window_tokens
from dape.evaluate.protocols import Protocol, Windows, choose_blocks
from dape.evaluate.record import Targets


@dataclass(frozen=True, slots=True)
class Plan:
    """The windows of each length on a split of a corpus, with the same scored tokens."""

    corpus: Corpus
    split: str
    windows: tuple[Windows, ...]
    targets: Targets

    @property
    def tokens(self) -> int:
        """Return the number of input tokens for a model."""
        return sum(each.tokens for each in self.windows)

    @property
    def bytes(self) -> Int[np.ndarray, " documents"] | None:
        """Return the bytes of the scored text by document; None if bytes cannot be counted."""
        return None if self.targets.bytes is None else np.array(self.targets.bytes)


def plan(
    corpus: Corpus,
    split: str,
    protocol: Protocol,
    lengths: Sequence[int],
    *,
    documents: int,
    blocks: int,
    seed: int,
    bos: bool = False,
) -> Plan:
    """Return the plan for a split; see `choose_blocks` for most arguments.

    With `bos` a window begins with the model's token for the beginning of a text.
    """
    part = corpus.split(split)
    chosen = choose_blocks(
        protocol, part.document_lengths - 1, documents=documents, blocks=blocks, seed=seed
    )
    windows = tuple(chosen.windows(length) for length in lengths)
    numbers, owner = np.unique(windows[0].documents, return_inverse=True)
    targets = Targets(
        data=corpus.checksum,
        split=split,
        protocol=protocol.name,
        block=protocol.block,
        longest=protocol.longest,
        documents=numbers.tolist(),
        tokens=(np.bincount(owner) * windows[0].scored).tolist(),
        bytes=_bytes(corpus, split, windows[0]),
        bos=bos,
    )
    return Plan(corpus, split, windows, targets)


def _bytes(corpus: Corpus, split: str, windows: Windows) -> list[int] | None:
    """Return the bytes of the scored tokens by document, None if bytes cannot be counted."""
    try:
        sizes = token_bytes(corpus.tokenizer())
    except UserError:  # a tokenizer that changes the text, to lower case for example
        return None
    _, owner = np.unique(windows.documents, return_inverse=True)
    tokens = window_tokens(corpus.split(split).document, windows, slice(None))
    if (sizes[tokens[:, -windows.scored - 1 :]] == UNCOUNTED).any():
        return None
    scored = sizes[tokens[:, -windows.scored :]].sum(axis=1)
    return np.bincount(owner, weights=scored).astype(int).tolist()
