import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dape.data.tokenizer import (
    UNCOUNTED,
    byte,
    encoder,
    fingerprint,
    load,
    serialize,
    token_bytes,
    vocab_size,
)
from dape.errors import UserError
from folders import spaced_tokenizer

TEXTS = [
    "",
    " a  b\r\n\tc\u00a0d\u2028e",
    "\ufeffété 漢字 🙂👩‍👩‍👧 \x00\x7f ﬁ e\u0301",
    "<0x41> <|endoftext|> </s> ▁",
]
BYTE = byte()


def bpe(normalizer=None):
    """A byte-level BPE as GPT-2's, of few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(["the cat and the hat in the été of 漢字 "] * 5, trainer)
    return tokenizer


@pytest.fixture
def bpe_folder(tmp_path):
    bpe().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@given(st.text())
def test_byte_tokens_are_the_bytes_of_any_text(text):
    expected = list(text.encode())
    plain = BYTE(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert plain == expected
    assert BYTE.decode(expected) == text


@given(st.text())
def test_the_fast_path_gives_the_ids_of_the_saved_tokenizer(text):
    saved = Tokenizer.from_str(serialize(BYTE))
    saved.encode_special_tokens = True
    assert encoder(serialize(BYTE))(text).tolist() == saved.encode(text).ids


def test_a_saved_byte_tokenizer_is_the_same(tmp_path):
    BYTE.save_pretrained(tmp_path)
    saved = load(str(tmp_path))
    assert fingerprint(saved) == fingerprint(BYTE)
    assert (vocab_size(saved), saved.eos_token, saved.eos_token_id) == (257, "<|endoftext|>", 256)
    assert saved.decode(saved("<0x41> é")["input_ids"]) == "<0x41> é"


@pytest.mark.parametrize("text", TEXTS)
def test_any_tokenizer_reads_special_tokens_as_text_and_loses_nothing(bpe_folder, text):
    tokenizer = load(str(bpe_folder))
    ids = encoder(serialize(tokenizer))(text)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_ids_are_those_of_the_file(bpe_folder):
    text = "the cat in the hat, 漢"
    expected = Tokenizer.from_file(str(bpe_folder / "tokenizer.json")).encode(text).ids
    for path in (bpe_folder, bpe_folder / "tokenizer.json"):
        assert encoder(serialize(load(str(path))))(text).tolist() == expected


def test_token_bytes_sum_to_the_bytes_of_the_text(bpe_folder):
    for tokenizer in (BYTE, load(str(bpe_folder))):
        sizes = token_bytes(tokenizer)
        assert sizes.shape == (vocab_size(tokenizer),)
        assert sizes[tokenizer.eos_token_id] == 0
        for text in [*TEXTS, "the cat and the hat " * 9]:
            ids = encoder(serialize(tokenizer))(text)
            assert sizes[ids].sum() == len(text.encode())


def test_token_bytes_with_byte_fallback_and_visible_spaces():
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)}
    vocabulary |= {"▁": 256, "a": 257, "▁a": 258, "</s>": 259}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    sizes = token_bytes(tokenizer)
    assert sizes[[0x41, 256, 257, 258, 259]].tolist() == [1, 1, 1, 2, 0]


def test_token_bytes_where_a_space_is_put_first():
    tokenizer = spaced_tokenizer()
    sizes = token_bytes(tokenizer)
    text = "a cat, a caf\u00e9"
    first, *rest = encoder(serialize(tokenizer))(text)
    assert first == 258  # the space put first, and "a"
    assert sizes[rest].sum() == len(text[1:].encode())


@pytest.mark.parametrize("strip", [{}, {"lstrip": True}, {"rstrip": True}])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("space", [None, "first", "always", "never"])
def test_an_added_token_has_bytes_where_no_spaces_come_or_go_beside_the_token(
    space, normalized, strip
):
    tokenizer = spaced_tokenizer(space, normalized=normalized, **strip)
    encode, sizes = encoder(serialize(tokenizer)), token_bytes(tokenizer)
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    off = set()
    for text in ("a<tool>a", "a <tool> a", "a  <tool>  a", "<tool>a", "a<tool><tool>a"):
        ids = encode(text)
        length = sizes[ids[ids != tool]].sum() + 6 * (ids == tool).sum()
        off.add(int(length - len(text.encode()) - (ids[0] == 258)))  # the space put first, and "a"
    assert (sizes[tool] == UNCOUNTED) == (off != {0})
    assert sizes[tool] in (UNCOUNTED, 6)
    assert (sizes[tool] == 6) == (space in ("first", "never") and not strip)
    assert sizes[encode("a cafe")].sum() == len("a cafe") + (space != "never")


def test_a_common_token_named_for_padding_has_bytes():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(), eos_token="<|endoftext|>")
    text = "What! 1! <|endoftext|>"
    ids = encoder(serialize(tokenizer))(text)
    tokenizer.pad_token = "!"
    assert tokenizer.pad_token_id in ids
    sizes = token_bytes(tokenizer)
    assert sizes[ids].sum() == len(text.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_token_bytes_of_composed_text():
    backend = bpe(normalizers.NFC())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    text = "cafe\u0301, \ufb01le"
    ids = encoder(serialize(tokenizer))(text)
    assert token_bytes(tokenizer)[ids].sum() == len("caf\u00e9, \ufb01le".encode())


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKD()])
def test_bits_per_byte_are_refused_where_text_is_changed(normalizer):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(normalizer), eos_token="<|endoftext|>")
    with pytest.raises(UserError, match="keeps every byte"):
        token_bytes(tokenizer)


def test_a_tokenizer_is_refused_with_the_remedy(tmp_path, bpe_folder):
    with pytest.raises(UserError, match=r"give byte, gpt2, or a folder with a tokenizer\.json"):
        load(str(tmp_path / "nowhere"))

    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json is not a Hugging Face tokenizer"):
        load(str(tmp_path / "broken.json"))

    nameless = json.loads((bpe_folder / "tokenizer.json").read_text())
    nameless["added_tokens"] = []
    nameless["model"]["vocab"]["<end>"] = nameless["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "nameless.json").write_text(json.dumps(nameless))
    with pytest.raises(UserError, match='add "eos_token" to tokenizer_config'):
        load(str(tmp_path / "nameless.json"))


def test_a_tokenizer_whose_end_of_text_is_ordinary_text_is_refused(tmp_path):
    pieces = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("</s>", -1.0), ("<", -9.0)]
    Tokenizer(models.Unigram(pieces, unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="reads the end of text '</s>' in ordinary text"):
        load(str(tmp_path))


def test_a_tokenizer_with_dropout_is_refused(bpe_folder):
    file = bpe_folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.5
    file.write_text(json.dumps(content))
    encode = encoder(file.read_text())
    assert len({tuple(encode("the cat in the hat")) for _ in range(50)}) > 1
    with pytest.raises(UserError, match=r'by its dropout; set "dropout" to null in tokenizer.json'):
        load(str(bpe_folder))


def test_a_tokenizer_that_reads_unknown_characters_as_the_end_of_text_is_refused(tmp_path):
    letters = {letter: number for number, letter in enumerate(["<unk>", *"abcdefghknu<>/s "])}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    names = {"unk_token": "<unk>", "eos_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads the end of text '<unk>' in ordinary text, where"):
        load(str(tmp_path))


def test_bits_per_byte_are_refused_where_a_character_may_be_unknown():
    known = "A line,\n\tthe \u00e9te\u0301 of  \u6f22\u5b57, a \ufb01le and \U0001f642.\n"
    letters = {letter: number for number, letter in enumerate(["<unk>", *sorted(set(known))])}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode(encoder(serialize(tokenizer))(known)) == known
    with pytest.raises(UserError, match="keeps every byte"):
        token_bytes(tokenizer)


def test_random_bytes_of_characters_round_trip():
    text = "".join(random.Random(0).choices([chr(c) for c in range(0xD800)], k=20_000))
    ids = encoder(serialize(BYTE))(text)
    assert np.array_equal(ids, np.frombuffer(text.encode(), np.uint8))
    assert BYTE.decode(ids) == text
