"""Evaluations made of chosen numbers, for tests of what is drawn and said of them."""

import math

import numpy as np

from dape.evaluate.perplexity import Measurement
from dape.evaluate.record import Evaluation, Targets
from dape.evaluate.subject import Subject

LENGTHS = (128, 256, 512, 1024, 2048)
DOCUMENTS = 20
PROVENANCE = {
    "command": "dape eval runs/*",
    "commit": "abc",
    "versions": {"python": "3.11", "torch": "2.13"},
    "device": "cpu",
    "time": "2026-01-01T00:00:00+00:00",
}


def make(scheme, losses, seed=0, train_length=128, lengths=LENGTHS, documents=DOCUMENTS, **changes):
    """Return an evaluation with these losses at these lengths.

    A length whose loss is None was refused.
    """
    shares = np.linspace(0.9, 1.1, documents).tolist()
    measurements = [
        Measurement(
            length=length,
            windows=3,
            loss=loss,
            loss_error=0.01 if documents > 1 else None,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=loss / math.log(2) / 2,
            document_losses=[share * loss for share in shares],
            contexts=[(length // 2 + 1, length, loss)],
        )
        for length, loss in zip(lengths, losses, strict=True)
        if loss is not None
    ]
    pairs = zip(lengths, losses, strict=True)
    refused = {length: f"{length} is too long" for length, loss in pairs if loss is None}
    targets = Targets(
        data="c0ffee",
        split="test",
        protocol="last",
        block=128,
        longest=max(lengths),
        documents=[*range(2, 2 + documents)],
        tokens=[128] * documents,
        bytes=[256] * documents,
    )
    about = {
        "run": f"runs/{scheme}-{seed}",
        "scheme": scheme,
        "train_length": train_length,
        "seed": seed,
        "settings": f"settings of {scheme}",
        "parameters": 1234,
        "trained_on": None,
    }
    subject = Subject(**{name: changes.pop(name, value) for name, value in about.items()})
    values = {
        "subject": subject,
        "targets": targets,
        "measurements": measurements,
        "refused": refused,
        "provenance": PROVENANCE | {"seed": 0},
    }
    return Evaluation(**{**values, **changes})
