"""Pages name what they speak of: few pointing words, few colons and semicolons.

Measured are sentences outside code, tables, pictures and addresses. An item of a list and a heading
without a full stop are sentences too.
"""

import re

import pytest
from pages import ROOT, markdown

WORDS = """
    it its itself this that these those what whatever which whichever who whom whose such so one
    ones each other others another both latter former same there here thing things they them their
"""
POINTING = frozenset(re.findall(r"\w+", WORDS))
# Shares of all words, and colons and semicolons a sentence.
MOST_POINTING, MOST_COLONS = 0.05, 0.35
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(
        str(file.relative_to(ROOT))
        for pattern in (
            "docs/*.md",
            "docs/*.ipynb",
            "results/**/README.md",
            "results/**/published.md",
        )
        for file in ROOT.glob(pattern)
    ),
]
# Pages over the limits, which are being rewritten.
UNFINISHED = {"docs/kernels.md"}
NO_PROSE = (
    r"^```.*?^```$",  # code
    r"^\|.*?$",  # tables
    r"<!--.*?-->",
    r"!\[[^]]*\]\([^)]*\)",  # pictures
    r"(?<=\])\([^)]*\)",  # where links lead
    r"https?://\S+",
)


def prose(page):
    """Return the sentences of a page, without code, tables, pictures and addresses."""
    left = markdown(page)
    for pattern in NO_PROSE:
        left = re.sub(pattern, "", left, flags=re.MULTILINE | re.DOTALL)
    left = re.sub(r"`[^`]+`", "CODE", left)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*#]|\d+\.) )", left)
    return [
        sentence
        for paragraph in paragraphs
        for sentence in re.split(r"(?<=[.?!])[*_)]*\s+", " ".join(paragraph.split()))
        if re.search(r"[a-z]", sentence)
    ]


def words_of(sentences):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", " ".join(sentences).lower())


def measure(page):
    """Return the number of words, the share of pointing ones, and colons a sentence."""
    sentences = prose(page)
    words = words_of(sentences)
    pointing = sum(word in POINTING for word in words) / len(words)
    colons = sum(len(re.findall(r"[:;](?=\s|$)", each)) for each in sentences) / len(sentences)
    return len(words), pointing, colons


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.xfail] if page in UNFINISHED else []) for page in PAGES],
)
def test_a_page_names_what_it_speaks_of(page):
    _, pointing, colons = measure(page)
    assert pointing <= MOST_POINTING
    assert colons <= MOST_COLONS


def test_the_table_of_pages_is_printed(capsys):
    lines = (
        f"{page:30} {words:6,} words {pointing:6.1%} pointing {colons:5.2f} : and ; a sentence"
        for page, (words, pointing, colons) in ((page, measure(page)) for page in PAGES)
    )
    with capsys.disabled():
        print("", *lines, sep="\n")
