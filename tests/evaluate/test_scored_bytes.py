"""The plan of an evaluation counts the bytes of the scored text."""

import json

import pytest

from dape.data.prepare import Options, Preparation
from dape.data.shards import Corpus
from dape.evaluate.plan import plan
from dape.evaluate.protocols import protocol
from folders import spaced_tokenizer

TOKENS, SCORED = 13, 4


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("x" * 12, [SCORED]),
        ("xxx<tool>xxxxxxx", [SCORED]),
        ("xxxxxxx<tool>xxx", None),  # the space put behind is scored
        ("xxxxxxxx<tool>xx", None),
    ],
)
def test_bytes_are_not_counted_beside_an_added_token_that_moves_spaces(tmp_path, text, counted):
    spaced_tokenizer("always", normalized=False).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": text}))
    source, tokenizer = str(tmp_path / "test.jsonl"), str(tmp_path / "tokenizer")
    for _ in Preparation(Options(sources=(source,), out=tmp_path / "a", tokenizer=tokenizer)).run():
        pass
    corpus, lengths = Corpus(tmp_path / "a"), (SCORED, TOKENS - 1)
    assert len(corpus.split("test").document(0)) == TOKENS + 1
    rule = protocol("last", lengths)
    found = plan(corpus, "test", rule, lengths, documents=1, blocks=1, seed=0)
    assert found.targets.bytes == counted
