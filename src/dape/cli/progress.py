"""The progress bar on stderr, and a line per measurement."""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from dape.evaluate.compare import Record
from dape.evaluate.watch import Watch, repeated
from dape.text import one_line


class Speed(ProgressColumn):
    """Tokens a second."""

    def render(self, task: Task) -> Text:
        """Return the recent speed."""
        return Text(f"{task.speed or 0:,.0f} tokens/s")


class Lines(Watch):
    """Prints a line per measurement."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def announce(self, name: str, length: int, outcome: str) -> None:
        """Print a line."""
        self.note(f"{name}  length {length:,}  {outcome}")

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(one_line(text), highlight=False, soft_wrap=True, markup=False)


class Bar(Lines):
    """Draws a bar below the lines in a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (BarColumn(), Speed(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        super().__init__(console)

    def begin(self, tokens: int) -> None:
        """Draw the bar for a number of tokens."""
        self._progress.add_task("", total=tokens)
        self._progress.start()

    def advance(self, tokens: int) -> None:
        """Move the bar."""
        self._progress.advance(self._progress.task_ids[0], tokens)

    def end(self) -> None:
        """Finish the bar, if drawn."""
        if self._progress.live.is_started:
            self._progress.stop()


@contextmanager
def progress() -> Iterator[Bar]:
    """Yield a receiver of progress that draws a bar on stderr."""
    bar = Bar()
    try:
        yield bar
    finally:
        bar.end()


def note_repeats(records: Sequence[Record]) -> None:
    """Name runs given more than once on stderr; comparisons count a run once."""
    for run, times in Counter(each.subject.run for each in records).items():
        if times > 1:
            print(one_line(repeated(run)), file=sys.stderr)
