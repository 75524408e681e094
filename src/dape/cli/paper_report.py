"""`dape paper report`: a page on all experiments of the paper."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dape.cli.arguments import parse
from dape.cli.paper import REMEDY, Folders
from dape.strict import default


@dataclass(frozen=True, slots=True)
class Arguments:
    """Write a page on all experiments of the paper, from finished cells.

    The page is results/paper/report.html, and needs no network. The file published.md in the same
    folder has every published number with ours.
    """

    scale: Literal["full", "smoke"] = "full"
    """full, or smoke for the miniatures, into runs/smoke/report.html"""
    data: Annotated[Folders, default("data/NAME")] = ()
    """folders of prepared corpora, as arxiv=FOLDER"""


def main(argv: list[str]) -> None:
    """Write the page and print its path."""
    arguments = parse(Arguments, argv, prog="dape paper report")
    from dape.data.shards import Corpus
    from dape.files import check_writable, write_text
    from dape.paper.beside import beside
    from dape.paper.experiment import check_data, smoke
    from dape.paper.experiments import PAPER
    from dape.paper.page import page
    from dape.paper.results import results

    experiments = [smoke(each) if arguments.scale == "smoke" else each for each in PAPER]
    home = experiments[0].home
    check_data(experiments, dict(arguments.data))
    for _, folder in arguments.data:
        Corpus(folder)  # or an error that names the folder
    check_writable(home / "report.html", home / "published.md", remedy=REMEDY)
    found = [results(each, dict(arguments.data)) for each in experiments]
    table = beside(cell for each in found for cell in each.cells)
    write_text(home / "report.html", page(found, table))
    write_text(home / "published.md", table.markdown() + "\n")
    print(f"wrote {home / 'report.html'} and {home / 'published.md'}")
