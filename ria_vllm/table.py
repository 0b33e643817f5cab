"""Tables for readers, on standard output."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ria_vllm.errors import printable


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], heading: str = "") -> None:
    """Print a table whose first column is folded where it is too wide. Columns without an entry are left out."""
    # A file or a pager has no width to fit, so be wide enough that no name is cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=Text(printable(heading)), title_justify="left", box=None, header_style="bold")
    shown = [number for number in range(len(titles)) if any(row[number] for row in rows)]
    for number in shown:
        table.add_column(titles[number], justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[number])) for number in shown))
    console.print(table, highlight=False)
