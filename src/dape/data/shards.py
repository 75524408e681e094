"""A prepared corpus: memory-mapped tokens with document boundaries, and windows for training."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from dape.data import tokenizer as tokenizers
from dape.errors import UserError, check_whole, unknown
from dape.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
SCAN = 2**24  # tokens of a shard read at a time
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_AGAIN = "prepare the corpus again with --overwrite"


class Corpus:
    """A folder written by `dape prepare`.

    Raises:
        UserError: for a folder without a finished corpus, or with files unlike the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)

    @property
    def checksum(self) -> str:
        """SHA-256 over the checksums of all shards and the tokenizer: equal for equal data."""
        return self.manifest["checksum"]

    @property
    def vocab_size(self) -> int:
        """The largest token id plus 1."""
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def end_of_text(self) -> int:
        """The token after each document."""
        return self.manifest["tokenizer"]["end_of_text"]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of the corpus."""
        return tokenizers.saved(str(self.folder / TOKENIZER))

    def check_model(
        self,
        source: str,
        vocab_size: int,
        own: "PreTrainedTokenizerFast | None",
        folder: str | Path,
    ) -> None:
        """Refuse the model `source` with other tokens than the corpus.

        `own` is the tokenizer of the model, if any, and `folder` its folder for the remedy.

        Raises:
            UserError: for a model with a smaller vocabulary, or with another tokenizer.
        """
        if self.vocab_size > vocab_size:
            raise UserError(
                f"{self.folder} has token ids up to {self.vocab_size - 1}, the model {source} only"
                f" {vocab_size}; prepare the corpus with the model's tokenizer"
            )
        if own and not self._same(own):
            raise UserError(
                f"{self.folder} was not prepared with the tokenizer of {source}; prepare the corpus"
                f" with --tokenizer {folder}"
            )

    def _same(self, tokenizer: "PreTrainedTokenizerFast") -> bool:
        """Return whether the corpus was prepared with a tokenizer, and reads its tokens alike."""
        found, own = tokenizers.fingerprint(tokenizer), self.tokenizer()
        if found == tokenizers.fingerprint(own):
            return True
        # Saving with a name for the end of text may change the file without a change of tokens.
        prepared = self.manifest["tokenizer"]["fingerprint"]
        return found == prepared and tokenizer.get_vocab() == own.get_vocab()

    def split(self, name: str) -> "Split":
        """Return a split: train, validation or test.

        The first call reads all tokens of the split, to compare checksums with the manifest.

        Raises:
            UserError: for an empty split, or for tokens changed since the preparation.
        """
        splits = self.manifest["splits"]
        if name not in splits:
            raise unknown("split", name, splits)
        if not splits[name]["documents"]:
            filled = ", ".join(key for key, entry in splits.items() if entry["documents"])
            raise UserError(
                f"split {name!r} of {self.folder} has no documents (only {filled}); "
                f"prepare the corpus with a larger --{name}, or with a source named {name}"
            )
        for shard in splits[name]["shards"]:
            path = self.folder / shard["file"]
            states = tuple(file.stat() for file in (path, index_file(path)))
            changes = tuple((state.st_size, state.st_mtime_ns) for state in states)
            _verify(path, shard["checksum"], self.manifest["dtype"], self.end_of_text, changes)
        return Split(self.folder, splits[name]["shards"], self.manifest["dtype"])


class Split:
    """The documents of a split, in order, as a stream of tokens across shards."""

    def __init__(self, folder: Path, shards: list[dict[str, Any]], dtype: str) -> None:
        self._tokens = [
            np.memmap(folder / shard["file"], dtype, "r", shape=shard["tokens"]) for shard in shards
        ]
        self._bounds = [np.load(index_file(folder / s["file"]), mmap_mode="r") for s in shards]
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self._first_documents = np.cumsum([0, *(shard["documents"] for shard in shards)])

    @property
    def num_tokens(self) -> int:
        """Number of tokens, with the end of text after each document."""
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self._first_documents[-1])

    @property
    def document_lengths(self) -> Int64[np.ndarray, " documents"]:
        """Number of tokens by document, end of text included."""
        return np.concatenate([np.diff(bounds) for bounds in self._bounds])

    def document(self, n: int) -> Int64[np.ndarray, " tokens"]:
        """Return the tokens of document `n`, end of text included."""
        if not 0 <= n < self.num_documents:
            raise IndexError(f"document {n} of {self.num_documents}")
        shard = int(np.searchsorted(self._first_documents, n, "right")) - 1
        start, stop = self._bounds[shard][n - self._first_documents[shard] :][:2]
        return self._tokens[shard][start:stop].astype(np.int64)

    def slice(self, start: int, stop: int) -> Int64[np.ndarray, " tokens"]:
        """Return tokens `start` to `stop` of the stream."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens}")
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, stop, "left"))
        pieces = [
            self._tokens[shard][max(0, start - offset) : stop - offset]
            for shard, offset in enumerate(self._starts[first:last], first)
        ]
        return np.concatenate([np.empty(0, np.int64), *pieces])


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of `length + 1` tokens for training: `length` inputs and the labels, shifted by 1.

    An epoch is a seeded permutation of consecutive windows from a seeded offset, and has every
    window once. Indices past `len(self)` continue with the next epoch. Window `n` depends on `n`
    alone and takes constant memory. A run resumes at any step by the number of the step.

    Raises:
        UserError: for a split without a whole window.
    """

    split: Split
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"window length {self.length} must be at least 1")
        if self.split.num_tokens <= self.length:
            raise UserError(
                f"the split has {self.split.num_tokens} tokens, too few for a window of "
                f"{self.length} + 1; prepare more text or train at a shorter length"
            )

    def __len__(self) -> int:
        """Number of windows in an epoch, equal for every offset."""
        return max(1, (self.split.num_tokens - self.length) // self.length)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Iterate over the first epoch."""
        return (self[n] for n in range(len(self)))

    def __getitem__(self, n: int) -> Int64[np.ndarray, " {self.length}+1"]:
        """Return window `n`."""
        if n < 0:
            raise IndexError(f"window {n}: windows are numbered from 0")
        epoch, position = divmod(n, len(self))
        digest = hashlib.blake2b(f"{self.seed} {epoch}".encode(), digest_size=64).digest()
        offset, *keys = np.frombuffer(digest, "<u8").tolist()
        slack = min(self.length, self.split.num_tokens - len(self) * self.length)
        start = offset % slack + _permuted(position, len(self), keys) * self.length
        return self.split.slice(start, start + self.length + 1)


def _permuted(position: int, count: int, keys: list[int]) -> int:
    """Return the image of `position` under a keyed permutation of `range(count)`.

    A Feistel network permutes the numbers of an even number of bits, and is walked until the number
    is below `count` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Unlike a
    shuffled array, the network takes no memory, even for billions of windows.
    """
    half = ((count - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        position = left << half | right
        if position < count:
            return position


def _mixed(value: int) -> int:
    """Return a 64-bit hash of a 64-bit number (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def scan(
    path: Path, dtype: str | np.dtype[Any], end_of_text: int
) -> tuple[str, Int64[np.ndarray, " bounds"]]:
    """Return the checksum of a shard, and the boundaries of the documents.

    Encoding yields the end of text only at the end of a document. Therefore the tokens determine
    the boundaries, and the checksum of the tokens covers both.
    """
    checksum, bounds, tokens = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while len(block := np.fromfile(file, dtype, SCAN)):
            checksum.update(block.data)
            bounds.append(np.flatnonzero(block == end_of_text) + tokens + 1)
            tokens += len(block)
    return checksum.hexdigest(), np.concatenate(bounds, dtype=np.int64)


@cache
def _verify(
    path: Path, checksum: str, dtype: str, end_of_text: int, changes: tuple[tuple[int, int], ...]
) -> None:
    """Raise a `UserError` for a shard changed since the preparation; cached until a change."""
    found, bounds = scan(path, dtype, end_of_text)
    if found != checksum:
        raise UserError(f"{path} has not the checksum in {MANIFEST}; {_AGAIN}")
    try:
        same = np.array_equal(np.load(index_file(path), mmap_mode="r"), bounds)
    except (EOFError, OSError, ValueError):
        same = False
    if not same:
        raise UserError(f"{index_file(path)} does not belong to the shard; {_AGAIN}")


def checksum_of(manifest: Mapping[str, Any]) -> str:
    """Return the checksum of a manifest: of the tokenizer, the type of tokens and all shards."""
    content = [manifest["tokenizer"]["fingerprint"], manifest["dtype"], manifest["splits"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def index_file(shard: Path) -> Path:
    """Return the file with the document boundaries of a shard, int64 [documents + 1]."""
    return shard.with_suffix(".idx.npy")


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"no finished corpus in {folder}; run `dape prepare SOURCE --out {folder}`, "
            "also to resume an interrupted preparation"
        )
    manifest, expected = read_json(file, lambda found: (found, _sizes(found)), _AGAIN)
    for shard, size in expected.items():
        path = folder / shard
        if not index_file(path).is_file() or not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} is missing, or has not {size:,} bytes; {_AGAIN}")
    if not (folder / TOKENIZER / "tokenizer.json").is_file():
        raise UserError(f"{folder / TOKENIZER} has no tokenizer.json; {_AGAIN}")
    found = tokenizer_checksum(folder)
    if manifest["tokenizer"].get("file", found) != found:  # absent in earlier versions
        raise UserError(
            f"{folder / TOKENIZER} has another tokenizer.json than the preparation; {_AGAIN}"
        )
    return manifest


def tokenizer_checksum(folder: Path) -> str:
    """Return the SHA-256 of the `tokenizer.json` of a corpus."""
    with open(folder / TOKENIZER / "tokenizer.json", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each shard; a `UserError` for a manifest of another format."""
    if manifest["format"] != FORMAT:
        raise UserError(f"the format is {manifest['format']}, not {FORMAT}")
    for value in (manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["end_of_text"]):
        check_whole(0, token=value)
    if manifest["checksum"] != checksum_of(manifest):
        raise UserError("its checksum is not that of what it names")
    width = np.dtype(manifest["dtype"]).itemsize
    return {
        shard["file"]: shard["tokens"] * width
        for split in manifest["splits"].values()
        for shard in split["shards"]
    }
