"""Links between documents lead somewhere, and every page is in the index."""

import re

import pytest
from pages import BLOCK, ROOT, markdown, text

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in ROOT.glob("docs/*.*"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def prose(page):
    return BLOCK.sub("", markdown(page))


def anchors(page):
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.relative_to(ROOT)), anchor


def test_every_page_is_in_the_index():
    linked = {target for target, _ in LINK.findall(prose("docs/index.md"))}
    assert linked >= {file.name for file in ROOT.glob("docs/*.*")} - {"index.md"}
