"""Where the command writes: results to stdout, progress to stderr. It obeys no text from a file."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Step = Callable[[int, int], None]


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Step]]:
    """Gives a function that starts a bar of the given name and returns its `(done, total)`."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:

        def start(description: str) -> Step:
            task = progress.add_task(description, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield start


def line(text: str = "") -> None:
    """One line of the result, however long."""
    print(printable(text))


def note(text: str) -> None:
    """One line that is no result."""
    print(printable(text), file=sys.stderr)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A plain table of the result: words to the left, numbers to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numbers = all(isinstance(row[index], int | float) for row in rows)
        made.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(printable(_cell(value)) for value in row))
    show(made)


def show(made: RenderableType) -> None:
    """Something of rich's as the result; its text is nothing that a terminal would obey."""
    # A pipe is as wide as it needs to be.
    width = None if sys.stdout.isatty() else 1000
    Console(markup=False, highlight=False, emoji=False, width=width).print(made)


def printable(text: str) -> str:
    """`text` without control characters: what a terminal would obey instead of show."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
