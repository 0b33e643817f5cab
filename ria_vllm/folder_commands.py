"""`ria-vllm inspect`, `verify` and `export`: the commands that need nothing but a compressed folder."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

import click

from ria_vllm.checkpoint.inventory import take_inventory
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError, printable
from ria_vllm.export import export_dense
from ria_vllm.files.sizes import human_size, parse_size
from ria_vllm.progress import Monitor
from ria_vllm.terminal import print_table

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("out", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(out: Path, as_json: bool) -> None:
    """Show what the compressed checkpoint OUT holds: each pruned linear, and the totals.

    The experts of a layer are one row of the table; --json lists each of their linears.
    """
    monitor = Monitor()
    with monitor.live():
        inventory = take_inventory(Reader(out), monitor)
    if as_json:
        click.echo(json.dumps(inventory, indent=2))
        return
    together: dict[str, list[dict[str, Any]]] = {}
    for entry in inventory["linears"]:
        together.setdefault(entry["experts"] or entry["name"], []).append(entry)
    titles = ("linear", "out x in", "size", "sparsity", "permutation", "retained score")
    print_table(titles, [(name, *_row(entries)) for name, entries in together.items()], inventory["folder"])
    totals, values = inventory["totals"], inventory["values"]
    sizes = {key: human_size(value) for key, value in totals.items() if key.endswith("bytes")}
    kinds = Counter(entry["permutation"] for entry in inventory["linears"])
    permuted = ", ".join(f"{kinds[kind]} {kind}" for kind in ("folded", "gathered", "none"))
    click.echo(f"\npruned linears: {totals['linears']}, {totals['sparsity']:.1%} zeros, permutations: {permuted}")
    scales = f", a scale for {values['group_size']} columns of a row" if values["group_size"] else ""
    inputs = f"; inputs are rounded to {values['inputs']}, token by token" if values["inputs"] else ""
    bits = f"{values['format']}, {values['bits_per_weight']:.2f} bits per weight"
    click.echo(f"their values:   {values['scheme']}, {values['pattern']}: {bits}{scales}{inputs}")
    of_dense = f"{sizes['linear_bytes']} of {sizes['linear_dense_bytes']} dense ({totals['linear_ratio']:.3f})"
    click.echo(f"their bytes:    {of_dense}\nother tensors:  {sizes['other_bytes']}")
    click.echo(f"all weights:    {sizes['bytes']} of {sizes['dense_bytes']} dense ({totals['ratio']:.3f})")
    if inventory["dense_linears"]:
        click.echo(f"left dense:     {printable(', '.join(inventory['dense_linears']))}")
    # What experiments found is too long, and digests are for programs.
    recipe = {k: v for k, v in inventory["recipe"].items() if not isinstance(v, dict | list) and v is not None}
    words = [f"{key} {value}" for key, value in recipe.items() if not key.endswith(("_digest", "_sha256"))]
    if words:
        click.echo(printable(f"recipe:         {', '.join(words)}"))


def _row(entries: Sequence[dict[str, Any]]) -> tuple[str, str, str, str, str]:
    """What the table says of one linear, or of all experts of a layer: sums and averages."""
    scores = [[e[key] for e in entries if e[key] is not None] for key in ("retained_before", "retained_after")]
    sizes = [prod(e["shape"]) for e in entries]
    sparsity = sum(e["sparsity"] * size for e, size in zip(entries, sizes, strict=True)) / sum(sizes)
    shape = " x ".join(map(str, entries[0]["shape"])) if len(entries) == 1 else f"{len(entries)} linears"
    kinds = ", ".join(dict.fromkeys(e["permutation"] for e in entries))
    retained = " -> ".join(f"{fmean(those):.4f}" for those in scores if those)
    return shape, human_size(sum(e["bytes"] for e in entries)), f"{sparsity:.1%}", kinds, retained


@click.command()
@click.argument("out", type=FOLDER)
def verify(out: Path) -> None:
    """Check every invariant of the compressed checkpoint OUT.

    Prints each problem with its layer, and exits with status 1 if there is any.
    """
    monitor = Monitor()
    try:
        reader = Reader(out)
        problems = 0
        with monitor.live():
            for problem in reader.problems(monitor):
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
@click.option("-o", "--out", "written", type=FOLDER, required=True, help="The folder to write.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file, such as 500MB or 5GB.")
@click.option("--overwrite", is_flag=True, help="Replace the folder if it exists.")
def export(out: Path, written: Path, max_shard_size: str, overwrite: bool) -> None:
    """Write the compressed checkpoint OUT as a plain dense folder that transformers loads without ria-vllm."""
    reader = Reader(out)
    size = parse_size(max_shard_size)
    monitor = Monitor()
    with monitor.live():
        export_dense(reader, written, size, overwrite, monitor)
    unrounded = "" if reader.schema.input_dtype is None else " It rounds no inputs."
    click.echo(f"{written}: dense, {len(reader.sparse_names)} linears with zeros where they were pruned.{unrounded}")
