"""Writes measured tiles into the table MEASURED of serve/kernels/cuda/tiles.py. Part of gpu_session."""

import ast
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import gpu_timing
from benchmarks.gpu_timing import Row
from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES

Table = Mapping[tuple[int, ...], tuple[tuple[int, str, int], ...]]


def table_of(tiles: Sequence[Row]) -> Table:
    """MEASURED, from gpu_check's rows of the section `tiles`. Where neighbouring numbers of tokens have the same tile,
    the largest stands for all.
    """
    fastest: Table = ast.literal_eval("{" + gpu_timing.table_rows(tiles) + "}")
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
