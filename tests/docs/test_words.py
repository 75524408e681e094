"""Pages and code name what they speak of: few pointing words, few colons and semicolons.

Measured in pages are sentences outside code, tables, pictures and addresses. An item of a list and
a heading without a full stop are sentences too. Measured in code are docstrings with the help of
options, comments, and strings of four words or more, mostly messages.
"""

import ast
import functools
import io
import re
import tokenize

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
    "SECURITY.md",
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


@pytest.mark.parametrize("page", PAGES)
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


SOURCE = ROOT / "src" / "dape"
ROOMS = sorted({str(file.parent.relative_to(SOURCE)) for file in SOURCE.rglob("*.py")})
KINDS = ("docstrings", "messages", "comments")
# Words of a string that is a sentence rather than a name, a key or a shape.
SENTENCE = 4


def written(file):
    """Return docstrings, other strings of some words, and comments of a file of Python or CUDA."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return [], [], re.findall(r"//(.*)", text)
    tree = ast.parse(text)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return (
        [node.value for node in strings if id(node) in alone],
        [
            node.value
            for node in strings
            if id(node) not in alone and len(node.value.split()) >= SENTENCE
        ],
        [token.string for token in tokens if token.type == tokenize.COMMENT],
    )


@functools.cache
def measure_room(room):
    """Return the number of words and the share of pointing ones, for each kind of text."""
    found = []
    files = [file for file in (SOURCE / room).iterdir() if file.suffix in (".py", ".cu", ".cuh")]
    for texts in zip(*map(written, files), strict=True):
        words = words_of(re.sub(r"`[^`]+`", "CODE", each) for part in texts for each in part)
        found.append((len(words), sum(word in POINTING for word in words) / max(1, len(words))))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_code_names_what_it_speaks_of(room):
    shares = dict(zip(KINDS, (share for _, share in measure_room(room)), strict=True))
    assert not {kind: share for kind, share in shares.items() if share > MOST_POINTING}


def test_the_table_of_rooms_is_printed(capsys):
    lines = (
        f"{room:24}"
        + "".join(
            f" {words:6,} words in {kind} {share:6.1%} pointing "
            for kind, (words, share) in zip(KINDS, measure_room(room), strict=True)
        )
        for room in ROOMS
    )
    with capsys.disabled():
        print("", *lines, sep="\n")


def test_a_pointing_word_is_counted_in_every_kind_of_text(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""Such a one."""\nraise ValueError(f"{x} is what it is")  # which\n')
    docstrings, messages, comments = written(file)
    assert docstrings == ["Such a one."] and messages == [" is what it is"]
    assert comments == ["# which"]
    kernel = tmp_path / "a.cu"
    kernel.write_text("x += 1;  // what it is\n")
    assert written(kernel) == ([], [], [" what it is"])
