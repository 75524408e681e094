"""Tokenizers: bytes, GPT-2's, or any `tokenizer.json`; number of bytes of a token."""

import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, UInt

from dape.data.hub import fetch, reachable
from dape.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
BYTES = {f"<0x{value:02X}>": value for value in range(256)}
RARE = "\ue000\U00010380\U00012000"  # characters that only a tokenizer of bytes knows
UNCOUNTED = -1  # bytes of an added token beside which spaces come or go
PROBE = f"A line,\n\tthe \u00e9te\u0301 of  \u6f22\u5b57, a \ufb01le and \U0001f642{RARE}.\n"


def load(name_or_path: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer `byte`, `gpt2`, or a tokenizer from a folder or `tokenizer.json`.

    The `eos_token` is the end of text, the last token of every document of a corpus.

    Raises:
        UserError: for an unknown tokenizer, or a tokenizer without an end of text, or a tokenizer
            that reads the end of text in ordinary text, where documents would be cut, or that
            draws the tokens of a text at random.
    """
    if name_or_path == "byte":
        return byte()
    tokenizer = _gpt2() if name_or_path == "gpt2" else _from_path(Path(name_or_path).expanduser())
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _end_of_text(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {name_or_path!r} names no end of text; "
            'add "eos_token" to tokenizer_config.json'
        )
    serialized = serialize(tokenizer)
    if json.loads(serialized)["model"].get("dropout"):
        raise UserError(
            f"tokenizer {name_or_path!r} reads a text differently each time, by its dropout; set "
            '"dropout" to null in tokenizer.json'
        )
    if tokenizer.eos_token_id in encoder(serialized)(f"a{tokenizer.eos_token}b{RARE}"):
        raise UserError(
            f"tokenizer {name_or_path!r} reads the end of text {tokenizer.eos_token!r} in ordinary "
            "text, where documents would be cut; use another tokenizer"
        )
    return tokenizer


def byte() -> "PreTrainedTokenizerFast":
    """Return the tokenizer with the bytes of UTF-8 as ids 0..255 and `<|endoftext|>` as 256."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab=BYTES, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def _gpt2() -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    repository = "openai-community/gpt2"
    try:
        return PreTrainedTokenizerFast.from_pretrained(repository, local_files_only=True)
    except (OSError, ValueError) as error:
        if reachable():
            return PreTrainedTokenizerFast.from_pretrained(repository)
        raise UserError(
            "tokenizer 'gpt2' is not in the Hugging Face cache, and the hub cannot be reached; "
            "give --tokenizer FOLDER, with tokenizer.json in the folder"
        ) from error


def _from_path(path: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no tokenizer {str(path)!r}: give byte, gpt2, or a folder with a tokenizer.json"
        )
    try:
        if file.name == "tokenizer.json":
            return PreTrainedTokenizerFast.from_pretrained(str(file.parent))
        return PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # the Rust parser raises bare exceptions
        raise UserError(
            f"{file} is not a Hugging Face tokenizer: {error}; give byte, gpt2, or a folder with a"
            " tokenizer.json"
        ) from error


def of_model(source: str) -> "PreTrainedTokenizerFast | None":
    """Return the tokenizer of a model in a folder or on the hub, None for a folder without any."""
    if Path(source).is_dir() and not file_of_model(source).is_file():
        return None
    return saved(source)


def saved(source: str) -> "PreTrainedTokenizerFast":
    """Return the tokenizer in a folder, or with a name on the hub.

    Raises:
        UserError: for a missing or damaged tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: PreTrainedTokenizerFast = fetch(PreTrainedTokenizerFast.from_pretrained, source)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length={tokenizer.model_max_length!r}")
        return tokenizer
    except UserError:
        raise
    except Exception as error:  # the Rust parser raises bare exceptions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"the tokenizer in {source} cannot be read ({reason}); save the tokenizer again"
        ) from None


def file_of_model(source: str) -> Path:
    """Return the path of a model's `tokenizer.json`, in the folder or in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).is_dir():
        return Path(source) / "tokenizer.json"
    return Path(str(try_to_load_from_cache(source, "tokenizer.json")))


def serialize(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the `tokenizer.json` of `tokenizer`, sufficient for encoding without transformers."""
    return tokenizer.backend_tokenizer.to_str()


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the SHA-256 of `tokenizer.json` and the end of text of a tokenizer.

    The end of text is the token that `load` takes, also where no configuration names the token.
    """
    end = _end_of_text(tokenizer)
    number = None if end is None else tokenizer.convert_tokens_to_ids(end)
    return hashlib.sha256(f"{serialize(tokenizer)}\n{number}".encode()).hexdigest()


def _end_of_text(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """Return the `eos_token`, or else the first known name in the vocabulary, or None."""
    if tokenizer.eos_token_id is not None:
        return str(tokenizer.eos_token)
    vocabulary = tokenizer.get_vocab()
    return next((token for token in ENDS_OF_TEXT if token in vocabulary), None)


def vocab_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Return the largest id plus 1, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def encoder(serialized: str) -> Callable[[str], UInt[np.ndarray, " tokens"]]:
    """Return the function from text to token ids of a serialized tokenizer.

    The function adds no token, and reads the name of a special token as ordinary text.
    """
    if _is_byte(serialized):
        return lambda text: np.frombuffer(text.encode(), np.uint8)
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(text: str) -> UInt[np.ndarray, " tokens"]:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.uint32)

    return encode


def encode_later(
    encode: Callable[[str], UInt[np.ndarray, " tokens"]], piece: str
) -> UInt[np.ndarray, " tokens"]:
    """Return the tokens of a later piece of a text, by the function of `encoder`.

    The piece is read behind a character, because many tokenizers put a space before a text. The
    tokens of the character are left out.
    """
    before = "a" if piece[0].isspace() else "\n"
    left_out, found = encode(before), encode(before + piece)
    joined = not np.array_equal(found[: len(left_out)], left_out)
    return encode(piece) if joined else found[len(left_out) :]


def _is_byte(serialized: str) -> bool:
    content = json.loads(serialized)
    model = content["model"]
    steps = content["normalizer"], content["pre_tokenizer"], model.get("merges")
    return model.get("vocab") == BYTES and model.get("byte_fallback", False) and not any(steps)


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> Int64[np.ndarray, " vocabulary"]:
    """Return the number of UTF-8 bytes of each token, 0 for a special token unknown to texts.

    An added token has `UNCOUNTED` bytes if the tokenizer puts a space behind the token, as Llama
    2's may, or takes spaces beside the token away.

    The bytes of a text's tokens sum to the bytes of the text. Therefore a loss in nats a token is
    `loss / ln 2 * tokens / bytes` bits a byte. For a tokenizer with composed characters (NFC), the
    sum is the number of bytes of the composed text. A leading space added by the tokenizer, as by
    Llama 2's, counts too. The space is in the first token of a document, which is never scored.

    Raises:
        UserError: for a tokenizer that loses text (lower case, ...), where bytes cannot be counted.
    """
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    counts = np.zeros(vocab_size(tokenizer), np.int64)
    encode, added = encoder(serialize(tokenizer)), set(tokenizer.added_tokens_decoder)
    special = _unknown_to_texts(tokenizer, encode)
    for token, number in tokenizer.get_vocab().items():
        if number in special:
            continue
        if token in BYTES:
            counts[number] = 1
        elif byte_level and number not in added:
            counts[number] = len(token)
        else:
            counts[number] = len(token.replace("\u2581", " ").encode())
    ids = encode(PROBE)
    put_first = _first(tokenizer, ids).startswith("\u2581")
    read = tokenizer.decode(ids)
    kept = read in (PROBE, unicodedata.normalize("NFC", PROBE))
    if not kept or counts[ids].sum() != len(read.encode()) + put_first:
        raise UserError(
            f"bits per byte need a tokenizer that keeps every byte of the text; "
            f"{tokenizer.name_or_path or 'the given tokenizer'} does not"
        )
    wrong = []
    for number in added - special:
        token = str(tokenizer.added_tokens_decoder[number])
        for text in (f"a{token}b {token} a{token}{token} {token}", f"{token}b"):
            ids = encode(text)
            space = put_first and _first(tokenizer, ids).startswith("\u2581")
            if counts[ids].sum() != len(text.encode()) + space:
                wrong.append(number)
    counts[wrong] = UNCOUNTED
    return counts


def _first(tokenizer: "PreTrainedTokenizerFast", ids: UInt[np.ndarray, " tokens"]) -> str:
    token: str = tokenizer.convert_ids_to_tokens(int(ids[0]))
    return token


def _unknown_to_texts(
    tokenizer: "PreTrainedTokenizerFast", encode: Callable[[str], UInt[np.ndarray, " tokens"]]
) -> set[int]:
    """Return the special tokens without a common token such as "!", named for padding."""
    pairs = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return {number for number, token in pairs if number not in encode(f"a{token}b")}
