"""The `dynmerge` command.

Results go to stdout, progress and errors to stderr. Exit code 2: refused, for the reason given.
"""

import sys
from collections.abc import Sequence

from dynmerge.cli.app import app
from dynmerge.cli.commands import (  # noqa: F401 - they register themselves
    bank,
    experiments,
    quality,
    serving,
)
from dynmerge.cli.console import printable
from dynmerge.errors import DynmergeError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: a DynmergeError becomes one line on stderr and exit code 2.

    Ctrl-C exits with 130: Typer sees to that.
    """
    try:
        app(arguments)
    except DynmergeError as error:
        print("error:", printable(str(error)), file=sys.stderr)
        sys.exit(2)
