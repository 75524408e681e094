"""Pages of the site, made of the documents of the repository: python docs/site/pages.py FOLDER.

Documents lie where they are read on their own too: README.md, docs/*.md, results/*/table.md. Here
each gets its place on the site, and its links lead to the places of the others.
"""

import inspect
import os
import re
import sys
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import ModuleType

import dape
from dape.errors import UserError
from dape.figures.encodings import draw
from dape.figures.explore import page as explorer
from dape.figures.style import save
from dape.figures.view import View
from dape.files import whole
from dape.positions.scheme import BASES, PLACES

Content = str | bytes

ROOT = Path(__file__).parents[2]
STYLE = "style.css"
REPORT = "paper/report.html"  # below results
BUTTON = "\n[Open the explorer](explorer.html){ .md-button .md-button--primary target=_blank }\n"
PLACED = {
    "README.md": "index.md",
    "docs/index.md": "overview.md",
    "docs/quickstart.ipynb": "quickstart.md",
    "results": "results/index.md",
}
FENCED = re.compile(r"(^ *```.*?^ *```$)", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(\]\(|(?:src|href)=")(?!https?:|mailto:|#)([^)#\s"]+)')
SECTION = re.compile(r"^### (\S+)\n.*?(?=^#|\Z)", flags=re.MULTILINE | re.DOTALL)
REFERENCE = {
    "attention": "Attention",
    "positions": "Encodings",
    "model": "Models",
    "train": "Training",
    "evaluate": "Evaluation",
    "errors": "Errors",
}


def write(folder: Path, view: View) -> None:
    """Write the pages into a folder, in place of what was there; `view` is that of the pictures."""
    with whole(folder) as partial:
        for place, content in pages(view).items():
            file = partial / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def pages(view: View) -> dict[str, Content]:
    """Return every file of the site by its place: pages, and the files that they link to."""
    found: dict[str, Content] = {}
    linked = {f"results/{REPORT}"}
    for source, place in _sources().items():
        text = _text(source, found)
        if source == "docs/encodings.md":
            text = _with_docstrings(text, view, found)
        found[place] = _relinked(text, source, linked)
    found |= {_place(name): (ROOT / name).read_bytes() for name in sorted(linked)}
    found["explorer.md"] = f"{found['explorer.md']}{BUTTON}"
    found |= {"explorer.html": explorer(view), "results/index.md": _results()}
    found[STYLE] = Path(__file__).with_name(STYLE).read_bytes()
    return found | _reference()


def _sources() -> dict[str, str]:
    """Return every document, and its place on the site."""
    paths = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/*.ipynb"),
        *ROOT.glob("results/**/*.md"),
    ]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return {name: _place(name) for name in names}


def _place(name: str) -> str:
    inner = name.removeprefix("docs/")
    return PLACED.get(name, inner.lower() if inner.endswith(".md") else inner)


def _text(source: str, found: dict[str, Content]) -> str:
    """Return a document as Markdown; the pictures of a notebook become files."""
    if not source.endswith(".ipynb"):
        return (ROOT / source).read_text(encoding="utf-8")
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(ROOT / source))
    found |= resources["outputs"]
    return text


def _relinked(text: str, source: str, linked: set[str]) -> str:
    """Return a document whose links lead to places of the site; collect the files behind them.

    What a link leads to and is not there stays as it is, for MkDocs to complain of.
    """
    sources, here = _sources(), PurePosixPath(_place(source)).parent

    def lead(match: re.Match[str]) -> str:
        target = os.path.normpath(ROOT / PurePosixPath(source).parent / match[2])
        name = Path(target).relative_to(ROOT).as_posix() if target.startswith(f"{ROOT}/") else ""
        if not name or not Path(target).exists():
            return match[0]
        if Path(target).is_file() and name not in sources:
            linked.add(name)
        return match[1] + os.path.relpath(_place(name), here)

    return "".join(
        part if part.lstrip().startswith("```") else LINK.sub(lead, part)
        for part in FENCED.split(text)
    )


def _with_docstrings(text: str, view: View, found: dict[str, Content]) -> str:
    """Return the page of encodings with a picture and the docstring in each section."""

    def complete(match: re.Match[str]) -> str:
        name, section = match[1], match[0].rstrip()
        if name not in BASES:
            return match[0]
        if "](encodings/" not in section and (picture := _picture(name, view)):
            found[f"encodings/{name}.png"] = picture
            section += f"\n\n![{name}](encodings/{name}.png)"
        return f"{section}\n\n{_docstring(name)}\n"

    return SECTION.sub(complete, text)


def _picture(name: str, view: View) -> bytes | None:
    """Return the picture that `dape plot encoding` draws, None if there is nothing to draw."""
    image = BytesIO()
    try:
        save(draw(name, view), image, format="png", dpi=110)
    except UserError:
        return None
    return image.getvalue()


def _docstring(name: str) -> str:
    """Return the docstring of the module of an encoding, folded."""
    parts = filter(None, (getattr(BASES[name], place) for place in PLACES))
    kinds = [part.module for part in parts]
    if not kinds:
        return ""
    (kind,) = kinds
    lines = (inspect.getdoc(kind) or "").splitlines()
    body = "\n".join(f"    {line}".rstrip() for line in lines)
    return f'??? abstract "Docstring of [`dape.{kind.__name__}`][dape.{kind.__name__}]"\n\n{body}\n'


def _results() -> str:
    """Return the page that lists all results by their first lines."""
    lines = [
        "# Results\n",
        "A command of this package measured every table, and every table names the command.\n",
        f"- [{REPORT}]({REPORT}): verdicts on the claims of the paper",
    ]
    for name, place in _sources().items():
        if place.startswith("results/"):
            title = re.split("[:\n]", _read(name), maxsplit=1)[0].strip("#* ")
            inner = place.removeprefix("results/")
            lines.append(f"- [{inner}]({inner}): {title}")
    return "\n".join([*lines, ""])


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _reference() -> dict[str, Content]:
    """Return the pages of the reference: every public name, under the package that has it.

    A name is public if `__all__` of `dape`, `dape.train` or `dape.evaluate` has it.
    """
    names: dict[str, list[str]] = {package: [] for package in REFERENCE}
    for module in (dape, dape.train, dape.evaluate):
        for name in module.__all__:
            names[_package(module, name)].append(f"{module.__name__}.{name}")
    found: dict[str, Content] = {
        f"reference/{package}.md": "\n\n".join(
            [f"# {title}", *(f"::: {name}" for name in sorted(names[package]))]
        )
        for package, title in REFERENCE.items()
    }
    index = [
        "# Reference\n",
        "A name is public if `__all__` of `dape`, `dape.train` or `dape.evaluate` has it. Within",
        "a class, a name is public if it does not start with an underscore. All other names may",
        "change in any version.\n",
    ]
    for package, title in REFERENCE.items():
        listed = ", ".join(f"[`{name}`][{name}]" for name in sorted(names[package]))
        index.append(f"- [{title}]({package}.md): {listed}")
    return {"reference/index.md": "\n".join(index) + "\n", **found}


def _package(module: ModuleType, name: str) -> str:
    """Return the part of the package where a public name is at home."""
    return getattr(module, name).__module__.split(".")[1]


if __name__ == "__main__":
    write(Path(sys.argv[1]), View())
