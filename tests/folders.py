"""Corpora and run folders small enough to make in a test, and the command line called in it."""

import random

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dape import cli
from dape.data.prepare import Options, Preparation
from dape.data.shards import Corpus
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM
from dape.train.recipe import Recipe, write
from dape.train.sections import Model, Training

SIZES = [3, 70, 65, 200, 64]  # characters of the test documents


def text(size, chosen, letters="abcd é"):
    return "".join(chosen.choice(letters) for _ in range(size - 1)) + "."


def prepare(folder, seed=0, tokenizer="byte", sizes=SIZES, letters="abcd é"):
    chosen = random.Random(seed)
    for split, sizes_of in {"train": [50], "validation": [50], "test": sizes}.items():
        (folder / "text" / split).mkdir(parents=True)
        for number, size in enumerate(sizes_of):
            (folder / "text" / split / f"{number}.txt").write_text(text(size, chosen, letters))
    options = Options(
        sources=(str(folder / "text"),), out=folder / "data", tokenizer=str(tokenizer), workers=1
    )
    for _ in Preparation(options).run():
        pass
    return folder / "data"


def make_run(folder, data, scheme, seed=0):
    torch.manual_seed(seed)
    config = DapeConfig(
        scheme=scheme,
        vocab_size=257,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        train_length=16,
    )
    DapeForCausalLM(config).save_pretrained(folder / "model")
    Corpus(data).tokenizer().save_pretrained(folder / "model")
    size = Model(scheme, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    recipe = Recipe(data=str(data), seed=seed, model=size, training=Training(length=16))
    (folder / "config.yaml").write_text(write(recipe))
    return folder


def learned_tokenizer():
    """Return a byte-level BPE tokenizer as GPT-2 has one, learned from the letters of `text`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text(5000, random.Random(1))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def spaced_tokenizer(space=None, **added):
    """Return a tokenizer of bytes and spaces that puts a space first, as Llama 2's does.

    `space` names another way to do so. `added` are options of an added token, `<tool>`.
    """
    vocabulary = {f"<0x{value:02X}>": value for value in range(256)}
    vocabulary |= {"\u2581": 256, "a": 257, "\u2581a": 258, "</s>": 259}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    if space is not None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    if added:
        backend.add_tokens([AddedToken("<tool>", **added)])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def dape(*words):
    return cli.main([str(word) for word in words])


def refused(capsys, *words):
    assert dape(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line
