"""Corpora and run folders small enough to make in a test, and the command line called in it."""

import random

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dape import cli
from dape.data.prepare import Options, Preparation
from dape.data.shards import Corpus
from dape.model.configuration import DapeConfig
from dape.model.modeling import DapeForCausalLM

SIZES = [3, 70, 65, 200, 64]  # characters of the test documents


def text(size, chosen):
    return "".join(chosen.choice("abcd é") for _ in range(size - 1)) + "."


def prepare(folder, seed=0, tokenizer="byte", sizes=SIZES):
    chosen = random.Random(seed)
    for split, sizes_of in {"train": [50], "validation": [50], "test": sizes}.items():
        (folder / "text" / split).mkdir(parents=True)
        for number, size in enumerate(sizes_of):
            (folder / "text" / split / f"{number}.txt").write_text(text(size, chosen))
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
    recipe = {"data": str(data), "seed": seed, "model": {"scheme": scheme}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def learned_tokenizer(vocab_size=300):
    """Return a byte-level BPE tokenizer as GPT-2 has one, learned from the letters of `text`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text(5000, random.Random(1))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def dape(*words):
    return cli.main([str(word) for word in words])


def refused(capsys, *words):
    assert dape(*words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line
