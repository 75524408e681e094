"""Published scores on the fifteen tasks, and their reliability."""

from typing import NamedTuple

STATED, REPRINTED = "stated in the paper's text", "reprinted by a later paper"
MEMORY = "from memory, unverified"


class Published(NamedTuple):
    """A score over lengths 41 to 500, in percent."""

    source: str
    model: str
    task: str
    score: float
    certainty: str


_DELETANG, _BEST = "Deletang et al., 2023", "Transformer, best of 5 encodings and 30 runs"
_CERTAIN = {
    "cycle-navigation": (61.9, STATED),
    "modular-arithmetic-simple": (24.2, REPRINTED),
    "parity-check": (52.0, REPRINTED),
    "stack-manipulation": (57.5, REPRINTED),
    "reverse-string": (62.3, REPRINTED),
    "duplicate-string": (52.8, REPRINTED),
    "odds-first": (52.8, REPRINTED),
    "even-pairs": (96.4, MEMORY),
    "modular-arithmetic": (32.5, MEMORY),
    "solve-equation": (25.7, MEMORY),
    "missing-duplicate": (56.4, MEMORY),
    "binary-addition": (54.3, MEMORY),
    "binary-multiplication": (52.2, MEMORY),
    "compute-sqrt": (52.4, MEMORY),
    "bucket-sort": (91.9, MEMORY),
}
_DAPE = "Zheng et al. (DAPE), 2024"
PUBLISHED = (
    *(Published(_DELETANG, _BEST, task, *found) for task, found in _CERTAIN.items()),
    Published(_DAPE, "dape-alibi", "parity-check", 50.30, STATED),
    Published(_DAPE, "best of all", "parity-check", 50.97, STATED),
    Published(_DAPE, "dape-alibi", "bucket-sort", 99.38, STATED),
    Published(_DAPE, "best of all", "bucket-sort", 99.57, STATED),
)
# Ruoss et al. (2023) state 12.0 points for randomised positions over their base, the mean over the
# tasks. Further cells of both papers' tables were not found in text.
