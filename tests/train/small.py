"""A corpus of a few thousand bytes and a recipe that trains on it in a second."""

import json
import random

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from dape import strict
from dape.data.prepare import Options, Preparation
from dape.data.shards import Windows
from dape.train.recipe import Recipe


def prepare(folder):
    words = ["the", "bias", "of", "a", "head", "grows", "with", "distance", "and", "adapts"]
    chosen = random.Random(0)
    for split, size in {"train": 4000, "validation": 800, "test": 100}.items():
        (folder / "text" / split).mkdir(parents=True)
        text = " ".join(chosen.choice(words) for _ in range(size))
        (folder / "text" / split / "words.txt").write_text(text)
    options = Options(sources=(str(folder / "text"),), out=folder / "data", workers=1)
    for _ in Preparation(options).run():
        pass
    return str(folder / "data")


def recipe(data, out, **changes):
    """Return a recipe with two layers of width 16; `changes` are sections of keys, or values."""
    sections = {
        "data": data,
        "out": str(out),
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "training": {"length": 16, "batch_size": 8, "steps": 6, "precision": "fp32"},
        "optimizer": {"learning_rate": 1e-2, "warmup": 0.5},
        "hardware": {"device": "cpu"},
        "tracking": {"log_every": 1, "validate_every": 4, "checkpoint_every": 20},
    }
    for name, value in changes.items():
        sections[name] = sections[name] | value if isinstance(value, dict) else value
    return strict.build(Recipe, sections)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in metrics(folder)]


def batch(windows, step, size):
    return np.stack([windows[n] for n in range(step * size, (step + 1) * size)])


def validation_loss(model, corpus, batches):
    """Return the mean loss of the first validation batches, all at once and in float64."""
    windows = Windows(corpus.split("validation"), 16, seed=0)
    tokens = torch.from_numpy(np.concatenate([batch(windows, n, 8) for n in range(batches)]))
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits.double()
    return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
