"""Writes measured tiles into the table MEASURED of serve/kernels/cuda/tiles.py. Part of gpu_session."""

import ast
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import gpu_tiles
from benchmarks.gpu_record import Record
from benchmarks.gpu_timing import Row
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES

Table = Mapping[tuple[int, ...], tuple[tuple[int, str, int], ...]]


def trusted(record: Record) -> tuple[list[Row], list[str]]:
    """The times that may enter MEASURED, and what was left out and why.

    Left out are tiles that crashed, hung or were not checked; a tile's split of K that gave a wrong product; and shapes
    that are not timed with every other tile at every number of tokens, because their fastest tile is unknown.

    Args:
        record: of gpu_check.
    """
    rows = [row for row in record.rows("tiles") if "us" in row]
    checks = record.rows("checks") + [row for row in record.rows("tiles") if "us" not in row]
    crashed, checked = gpu_tiles.crashed_tiles(checks), gpu_tiles.checked_tiles(checks)
    timed = {row["tile"] for row in rows}
    left_out = [f"{name}: it crashed, hung or was refused" for name in sorted(crashed)]
    left_out += [f"{name}: not checked" for name in sorted(timed - checked - crashed)]
    left_out += [f"{check}: wrong products" for check in sorted(gpu_tiles.wrong_splits(checks))]

    found = []
    for shape in dict.fromkeys(map(gpu_tiles.shape_of, rows)):
        here = [row for row in rows if gpu_tiles.shape_of(row) == shape]
        if unfinished := _unfinished(record.passed, shape, here, checked - crashed):
            left_out.append(f"{shape}: not all times of {', '.join(unfinished)}")
        else:
            found += gpu_tiles.right(here, checks)
    return found, left_out


def _unfinished(
    passed: Collection[str], shape: tuple[int, ...], rows: Sequence[Row], tiles: Collection[str]
) -> list[str]:
    """The tiles that were not timed to the end, out of those for the shape's values. A tile whose part has passed was,
    even if it cannot run at every number of tokens."""
    *_, value_bits, out_features, in_features = shape
    reached = {row["tile"] for row in rows if row["tokens"] == max(gpu_tiles.TUNED_TOKENS)}
    names = (name for name in tiles if 8 * gpu_tiles.dtype_of(name).itemsize == value_bits)
    parts = {name: gpu_tiles.part_name((out_features, in_features), gpu_tiles.dtype_of(name), name) for name in names}
    return sorted(name for name, part in parts.items() if name not in reached and part not in passed)


def table_of(tiles: Sequence[Row]) -> Table:
    """MEASURED, from gpu_check's rows of the section `tiles`. Where neighbouring numbers of tokens have the same tile,
    the largest stands for all.
    """
    fastest: Table = ast.literal_eval("{" + gpu_tiles.table_rows(tiles) + "}")
    return {
        shape: tuple(here for here, after in pairwise((*entries, (0, "", 0))) if here[1:] != after[1:])
        for shape, entries in fastest.items()
    }


def fill(source: Path, table: Table) -> list[str]:
    """Replace the rows of MEASURED that have the shapes of `table`, and keep the others.

    Returns:
        The candidate tiles among the table's, whose mark must go.

    Raises:
        RiaError: `source` has no MEASURED.
    """
    text = source.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == "MEASURED" and node.value:
            break
    else:
        raise RiaError(f"{source} does not assign MEASURED")
    merged = {**ast.literal_eval(node.value), **table}
    lines = text.splitlines()
    value = ["{"]
    for shape, entries in sorted(merged.items()):
        value.append(f"    {shape}: (")
        value += [f'        ({tokens}, "{tile}", {split}),' for tokens, tile, split in entries]
        value.append("    ),")
    start, end = node.value.lineno - 1, node.value.end_lineno
    value[0] = lines[start][: node.value.col_offset] + value[0]
    source.write_text("\n".join([*lines[:start], *value, "}", *lines[end:]]) + "\n")
    candidates = {tile.name for target in ARCHITECTURES.values() for tile in target.tiles if tile.candidate}
    return sorted(candidates & {tile for entries in table.values() for _, tile, _ in entries})
