"""Small sources, and what a corpus of them must hold, worked out without the code under test."""

import json
import random
from pathlib import Path

import zstandard

from dape.data.prepare import Options, Preparation
from dape.data.shards import Corpus

ALPHABET = 'abcdefghij    \n\té漢🙂\u00a0\\"<|endoftext|>'


def texts(count, seed=0, longest=400):
    rng = random.Random(seed)
    return ["".join(rng.choices(ALPHABET, k=rng.randint(1, longest))) for _ in range(count)]


def json_lines(documents):
    return "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in documents).encode()


def write_zst(path: Path, documents):
    path.write_bytes(zstandard.compress(json_lines(documents)))


def prepare(*sources, out, **options):
    preparation = Preparation(Options(sources=tuple(map(str, sources)), out=out, **options))
    problems = [problem for status in preparation.run() for problem in status.problems]
    return Corpus(out), problems


def byte_tokens(text):
    return [*text.encode(), 256]


def documents(corpus, name):
    """The token lists of a split, empty if it has none."""
    if not corpus.manifest["splits"][name]["documents"]:
        return []
    split = corpus.split(name)
    return [split.document(n).tolist() for n in range(split.num_documents)]


def files(folder: Path):
    """Every file below `folder` with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
