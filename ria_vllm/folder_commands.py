"""`ria-vllm inspect`, `verify` and `export`: the commands that need nothing but a compressed folder."""

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError, printable
from ria_vllm.export import export_dense
from ria_vllm.inventory import Inventory, take_inventory
from ria_vllm.progress import Monitor
from ria_vllm.sizes import human_size, parse_size

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(out: Path, as_json: bool) -> None:
    """Show what the compressed checkpoint OUT holds: each pruned linear, and the totals."""
    inventory = take_inventory(Reader(out))
    if as_json:
        click.echo(json.dumps(inventory.as_json(), indent=2, allow_nan=False))
    else:
        print_inventory(inventory)


def print_inventory(inventory: Inventory) -> None:
    # A file or a pager has no width to fit, so be wide enough that no name is cut.
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title=Text(printable(inventory.folder)), title_justify="left", box=None, header_style="bold")
    table.add_column("linear", overflow="fold")
    for title in ("out x in", "size", "sparsity", "permutation", "retained score"):
        table.add_column(title, justify="right", no_wrap=True)
    for e in inventory.linears:
        retained = "-" if e.retained_after is None else f"{e.retained_after:.4f}"
        if e.retained_before is not None and e.retained_after is not None:
            retained = f"{e.retained_before:.4f} -> {retained}"
        shape = f"{e.shape[0]} x {e.shape[1]}"
        table.add_row(Text(e.name), shape, human_size(e.bytes), f"{e.sparsity:.1%}", e.permutation, retained)
    console.print(table, highlight=False)
    t = inventory.totals
    kinds = {kind: sum(e.permutation == kind for e in inventory.linears) for kind in ("folded", "gathered", "none")}
    permuted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    click.echo(f"\npruned linears: {t.linears}, {t.sparsity:.1%} zeros, permutations: {permuted}")
    click.echo(
        f"their bytes:    {human_size(t.linear_bytes)} of {human_size(t.linear_dense_bytes)} dense "
        f"({t.linear_ratio:.3f})"
    )
    click.echo(f"other tensors:  {human_size(t.other_bytes)}")
    click.echo(f"all weights:    {human_size(t.bytes)} of {human_size(t.dense_bytes)} dense ({t.ratio:.3f})")
    if inventory.dense_linears:
        click.echo(f"left dense:     {printable(', '.join(inventory.dense_linears))}")
    recipe = inventory.recipe
    shown = (
        "source",
        "model",
        "method",
        "exponent",
        "permute",
        "reconstruct",
        "calibration",
        "samples",
        "seq_len",
        "seed",
    )
    words = [printable(f"{key} {recipe[key]}") for key in shown if key in recipe]
    if words:
        click.echo(f"recipe:         {', '.join(words)}")


@click.command()
@click.argument("out", type=FOLDER)
def verify(out: Path) -> None:
    """Check every invariant of the compressed checkpoint OUT.

    Prints each problem with its layer, and exits with status 1 if there is any.
    """
    try:
        reader = Reader(out)
        problems = 0
        for problem in reader.problems():
            problems += 1
            click.echo(printable(problem, lines=True))
    except RiaError as error:
        click.echo(str(error))
        sys.exit(1)
    if problems:
        click.echo(f"{out}: {problems} problem{'s' if problems > 1 else ''}")
        sys.exit(1)
    click.echo(
        f"{out}: no problems. {len(reader.sparse_names)} pruned linears, {len(reader.permuted_names)} of them "
        f"permuted, {len(reader.dense_names)} other tensors."
    )


@click.command()
@click.argument("out", type=FOLDER)
@click.option("-o", "--output", "dense", type=FOLDER, required=True, help="The folder to write.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file, such as 500MB or 5GB.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
def export(out: Path, dense: Path, max_shard_size: str, overwrite: bool) -> None:
    """Write the compressed checkpoint OUT as a plain dense folder that transformers loads without ria-vllm."""
    reader = Reader(out)
    size = parse_size(max_shard_size)
    monitor = Monitor()
    with monitor.live():
        export_dense(reader, dense, size, overwrite, monitor)
    click.echo(f"{dense}: dense, {len(reader.sparse_names)} linears with zeros where they were pruned.")
