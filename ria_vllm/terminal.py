"""What commands print: tables, and help in groups.

First comes what most people need; what only experts need is behind `--help-all`.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from ria_vllm.errors import printable

MOST = "What most people need"
EXPERTS = "For experts"


class GroupedOption(click.Option):
    """An option of one of the groups of a `GroupedCommand`."""

    def __init__(self, *args: Any, group: str = MOST, **attributes: Any):
        super().__init__(*args, **attributes)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has its options in groups, in the order of their first options. Other options are in the
    first group. If there is one for experts, `--help-all` shows it."""

    def __init__(self, *args: Any, **attributes: Any):
        super().__init__(*args, **attributes)
        if EXPERTS in map(_group, self.params):
            help_all = "Show options for experts, too."
            self.params.append(
                click.Option(
                    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help=help_all
                )
            )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them, as click does in one list."""
        groups: dict[str, list[tuple[str, str]]] = {MOST: []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(_group(parameter), []).append(record)
        experts = groups.pop(EXPERTS, [])
        if ctx.meta.get(EXPERTS):
            groups[EXPERTS] = experts
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _group(parameter: click.Parameter) -> str:
    return getattr(parameter, "group", MOST)


def _show_all(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:  # not while a shell completes the line
        context.meta[EXPERTS] = True
        click.echo(context.get_help())
        context.exit()


grouped = partial(click.option, cls=GroupedOption)
quality = partial(grouped, group="Quality")
expert = partial(grouped, group=EXPERTS, show_default=True)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], heading: str = "") -> None:
    """Print a table whose first column is folded where it is too wide. Columns without an entry are left out."""
    from rich.console import Console  # which takes half as long as all else that `--help` needs
    from rich.table import Table
    from rich.text import Text

    # A file or a pager has no width to fit, so be wide enough that no name is cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=Text(printable(heading)), title_justify="left", box=None, header_style="bold")
    shown = [number for number in range(len(titles)) if any(row[number] for row in rows)]
    for number in shown:
        table.add_column(titles[number], justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(row[number])) for number in shown))
    console.print(table, highlight=False)
