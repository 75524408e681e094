"""The page of encodings has every scheme, says of it what the code does, and draws it."""

import re
from pathlib import Path

import pytest

from dape.errors import UserError
from dape.figures.encodings import draw
from dape.figures.view import View
from dape.positions.scheme import BASES

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "encodings.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("base", BASES.values(), ids=lambda base: base.name)
def test_every_base_has_its_paper_its_reach_and_its_command(base):
    section = " ".join(SECTIONS[base.name].split())
    assert f"{base.paper}, {base.year}" in section
    assert re.search(rf"\*\*Extrapolates\.\*\* {base.extrapolates.capitalize()}[.,]", section)
    drawn = re.findall(rf"dape plot encoding {base.name}\b", section)
    try:
        draw(base.name, View(heads=2, length=4))
        assert drawn
    except UserError:
        assert not drawn


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert pictures
    for picture in pictures:
        assert (DOCS / picture).stat().st_size < 60_000
