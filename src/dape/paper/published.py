"""Published perplexities, with their source and reliability."""

from dataclasses import dataclass

# Reliability of a number.
STATED = "stated in the text"
INFERRED = "stated in the text without the corpus, which its level tells"
SECOND_HAND = "read from a note on the paper, not from the paper"

DAPE, DAPE_V2 = "DAPE (NeurIPS 2024)", "DAPE V2 (ACL 2025)"
CABLE = "CABLE (arXiv 2503.08067)"


@dataclass(frozen=True, slots=True)
class Published:
    """A perplexity of `scheme`: trained at `trained` tokens, read at `length`."""

    scheme: str
    size: str
    corpus: str
    trained: int
    length: int
    perplexity: float
    place: str
    sure: str


def _stated(
    place: str,
    sure: str,
    trained: int,
    values: dict[str, dict[int, float]],
    size: str = "125m",
    corpus: str = "arxiv",
) -> list[Published]:
    """Return the perplexities stated by a source, by scheme and length."""
    return [
        Published(scheme, size, corpus, trained, length, perplexity, place, sure)
        for scheme, row in values.items()
        for length, perplexity in row.items()
    ]


PUBLISHED = (
    *_stated(
        f"{DAPE}, section 4.1", STATED, 128, {"kerple": {8192: 31.93}, "dape-kerple": {8192: 5.00}}
    ),
    *_stated(
        f"{DAPE}, section 4.1",
        STATED,
        512,
        {"kerple": {8192: 39.31}, "dape-kerple": {8192: 17.88}},
        corpus="books",
    ),
    *_stated(
        f"{DAPE}, section 4.1",
        INFERRED,
        1024,
        {
            "alibi": {8192: 4.28},
            "dape-kerple": {2048: 3.91},
            "dape-fire": {2048: 3.93, 8192: 3.91},
        },
    ),
    *_stated(
        f"{DAPE}, section 4.2",
        STATED,
        512,
        {"alibi": {8192: 4.54}, "dape-alibi": {8192: 3.82}, "dape-fire": {8192: 5.71}},
    ),
    *_stated(
        f"{DAPE}, section 4.2",
        STATED,
        512,
        {"alibi": {8192: 4.21}, "dape-alibi": {8192: 3.57}},
        size="350m",
    ),
    *_stated(
        f"{DAPE}, section 4.2",
        "stated in the text; read as 350M, which its sentence does not say",
        512,
        {"kerple": {8192: 22.76}, "dape-kerple": {8192: 3.43}},
        size="350m",
    ),
    *_stated(
        f"{DAPE}, section 4.3",
        INFERRED,
        128,
        {"dape-concat-kerple": {8192: 5.03}, "dape-add-kerple": {8192: 5.17}},
    ),
    *_stated(
        f"{DAPE}, section 4.3",
        INFERRED,
        512,
        {
            "dape-kerple": {8192: 3.70},
            "dape-concat-kerple": {8192: 3.69},
            "dape-add-kerple": {8192: 3.75},
        },
    ),
    *_stated(
        f"{DAPE}, section 4.4",
        STATED,
        128,
        {"alibi": {128: 8.31, 8192: 5.85}, "dape-alibi-d4": {128: 8.25, 8192: 5.67}},
    ),
    *_stated(
        DAPE_V2,
        f"{SECOND_HAND}; its Kerple has 12.59 at 8,192, where DAPE states 31.93",
        128,
        {
            "kerple": {128: 8.30},
            "dape-kerple": {128: 8.21},
            "dape3-kerple": {128: 8.15, 8192: 4.60},
        },
    ),
    *_stated(
        DAPE_V2,
        SECOND_HAND,
        512,
        {
            "nope": {512: 5.10, 1024: 42.27},
            "rope": {512: 4.57, 1024: 86.20, 2048: 237.67, 4096: 256.12},
            "kerple": {512: 4.57, 1024: 4.37, 2048: 5.09, 4096: 6.80, 8192: 9.08},
            "dape-kerple": {512: 4.49, 1024: 4.20, 2048: 4.17, 4096: 3.95},
            "dape3-kerple": {512: 4.44, 1024: 4.14, 2048: 4.09, 4096: 3.87, 8192: 3.58},
        },
    ),
    *_stated(
        f"{CABLE}, Table 2",
        STATED,
        512,
        {
            "kerple": {512: 21.41, 1024: 21.12, 2048: 22.58, 4096: 28.04, 8192: 39.38},
            "dape3-kerple": {512: 20.56, 1024: 20.07, 2048: 19.51, 4096: 18.79, 8192: 18.92},
        },
        corpus="fineweb-edu",
    ),
)


def published(scheme: str, corpus: str, trained: int, size: str) -> list[Published]:
    """Return the published perplexities of a scheme, at 350M or otherwise at 125M."""
    size = size if size == "350m" else "125m"
    return [
        each
        for each in PUBLISHED
        if (each.scheme, each.corpus, each.trained, each.size) == (scheme, corpus, trained, size)
    ]
