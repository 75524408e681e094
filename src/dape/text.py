"""Names and messages from foreign files, made safe to print."""

import re


def counted(number: int, noun: str, ending: str = "s") -> str:
    """Return a number with a noun in singular or plural, as `1 cell` and `2,000 cells`."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def one_line(text: str) -> str:
    """Return text on one line, with a sign in place of control characters of a terminal."""
    line = " ".join(filter(None, (each.strip() for each in text.replace("\t", " ").splitlines())))
    return printable(line)


def printable(text: str) -> str:
    """Return text line by line, with a sign in place of control characters of a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def markdown(text: str) -> str:
    r"""Return text escaped for Markdown, also in a cell of a table: `a|b` as `a\|b`."""
    return re.sub(r"([\\`|$\[]|<(?=[\w/!?]))", r"\\\1", one_line(text))


def code(text: str) -> str:
    """Return text as code in Markdown, between more backticks than the text has in a row."""
    shown = one_line(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, pad = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Return lines of code in Markdown, between fences longer than any fence in the lines."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text.strip()}\n{fence}"
