"""Files of commands, in the format of the suffix."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = (".png", ".pdf", ".svg")


@runtime_checkable
class Record(Protocol):
    """A result that writes JSON."""

    def save(self, path: Path) -> None:
        """Write the file."""


def write(
    file: Path,
    figure: Callable[[], "Figure"],
    record: Record | None = None,
    **texts: Callable[[], str],
) -> None:
    """Write a file and print the path: the record as JSON, a text by suffix, or the figure.

    `texts` are functions by suffix, such as `md`.
    """
    from dape.figures.style import save
    from dape.files import write_text

    suffix = file.suffix.removeprefix(".")
    if record is not None and suffix == "json":
        record.save(file)
    elif suffix in texts:
        write_text(file, texts[suffix]())
    else:
        save(figure(), file)
    print(f"wrote {file}")
