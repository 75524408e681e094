"""`dape prepare`: text to tokens."""

import time
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from dape.cli.arguments import parse
from dape.data.prepare import Options as Arguments
from dape.data.prepare import Preparation, Status
from dape.data.shards import Corpus
from dape.data.writer import SKIPPED
from dape.errors import UserError
from dape.text import counted, one_line

LOG_SECONDS = 30.0  # between lines of progress outside a terminal
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TaskProgressColumn(),
    TextColumn("{task.fields[rate]}"),
    TimeRemainingColumn(),
)


def main(argv: list[str]) -> None:
    """Prepare a corpus, unless the corpus is finished."""
    options = parse(Arguments, argv, "dape prepare")
    preparation = Preparation(options)
    if preparation.finished:
        print(
            f"{options.out} is prepared already, from the same arguments, and files of the same"
            " names and sizes; nothing to do (--overwrite prepares anew)."
        )
    else:
        try:
            _run(preparation, options.out)
        except OSError as error:
            raise UserError(
                f"{options.out} cannot be written: {error}; mend the cause and run the command "
                "again to resume"
            ) from error
    _summarize(options.out)


def _run(preparation: Preparation, out: Path) -> None:
    """Write the corpus under a progress bar, and print problems."""
    statuses = preparation.run()
    start = next(statuses)
    if preparation.resumed:
        print(f"Resuming the interrupted preparation of {out}.")
    with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task(
            "preparing", total=preparation.source_bytes, completed=start.source_bytes, rate=""
        )
        begun = logged = time.monotonic()
        for status in statuses:
            now = time.monotonic()
            progress.update(
                task, completed=status.source_bytes, rate=_rate(start, status, now - begun)
            )
            for problem in status.problems:
                line = one_line(f"skipped {problem}")
                progress.console.print(line, markup=False, soft_wrap=True)
            if not progress.console.is_terminal and now - logged >= LOG_SECONDS:
                logged = now
                progress.console.print(progress.get_renderable())


def _rate(start: Status, status: Status, seconds: float) -> str:
    megabytes = (status.text_bytes - start.text_bytes) / 1e6
    tokens = status.tokens - start.tokens
    return f"{megabytes / seconds:.1f} MB/s, {tokens / seconds:,.0f} tokens/s"


def _summarize(folder: Path) -> None:
    """Print the contents of the corpus, missing splits, and skipped records."""
    manifest = Corpus(folder).manifest
    table = Table("split", "documents", "tokens", "bytes of text", "shards", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest["splits"].items():
        numbers = split["documents"], split["tokens"], split["bytes"], len(split["shards"])
        table.add_row(name, *(f"{number:,}" for number in numbers))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    skipped = manifest["skipped"]
    ignored = sum(source["ignored_files"] for source in manifest["sources"])
    where = f" (listed in {folder / SKIPPED})" if skipped["broken"] else ""
    console.print(
        f"skipped: {skipped['broken']:,} broken{where}, "
        f"{counted(skipped['empty'], 'empty document')}, "
        f"{counted(ignored, 'file')} of other kinds or linked twice\n"
        f"checksum: {manifest['checksum']}",
        markup=False,
    )
