"""Times of every tile and split of K of our library, for the table MEASURED. Part of gpu_check."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from benchmarks.gpu_timing import DEVICE, FORMATS, Row, config_of, microseconds, random_weights, sizes_of
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.serve.kernels.cuda import backend
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.bindings import CudaLibrary, library_of, num_sms_of
from ria_vllm.serve.kernels.cuda.tiles import DATA_PARALLEL, HEURISTIC, STREAM_K, can_run, preferred_tiles

# Linears of common models, q, k, v and gate, up fused, and all shapes that the targets are judged on.
TUNED_SHAPES = (
    *((4096, 4096), (6144, 4096), (22016, 4096), (4096, 11008), (11008, 4096)),
    *((57344, 8192), (8192, 28672), (28672, 8192)),
)
TUNED_TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SPLITS_K = (DATA_PARALLEL, HEURISTIC, STREAM_K, 2, 3, 4)


def part_name(sizes: tuple[int, int], dtype: torch.dtype, tile: str) -> str:
    return f"tiles {sizes} {dtype} {tile}"


def names_for(dtype: torch.dtype) -> list[str]:
    """The library's tiles for values of `dtype`."""
    return [name for name in library_of(DEVICE.index).tile_names if dtype_of(name) == dtype]


def dtype_of(tile: str) -> torch.dtype:
    """The dtype of the values that a tile of this name multiplies; bfloat16 stands for all 16-bit ones."""
    return {"fp8": FP8_DTYPE, "int8": torch.int8}.get(tile.split("_")[0], torch.bfloat16)


def timed_splits(name: str) -> list[int]:
    """All splits of K with which a tile is timed: SPLITS_K, and what the rules choose for the tile."""
    chosen = (_rule(dtype_of(name), sizes, tokens).get(name) for sizes, tokens in product(TUNED_SHAPES, TUNED_TOKENS))
    return sorted({*SPLITS_K, *(split for split in chosen if split is not None)})


def _rule(dtype: torch.dtype, sizes: tuple[int, int], tokens: int) -> dict[str, int]:
    num_sms = num_sms_of(DEVICE.index)
    return dict(preferred_tiles(library_of(DEVICE.index).family, num_sms, dtype.itemsize * 8, *sizes, tokens))


def time_tile(name: str, sizes: tuple[int, int], dtype: torch.dtype) -> Iterator[Row]:
    """Times of a tile with every split of K. The rows of a number of tokens come once all of them are timed, because
    the fastest is not known before."""
    config = config_of(*sizes, FORMATS[dtype])
    yield {"at": "packing"}
    packed = [CutlassKernel.pack(config, parts) for parts in random_weights(*sizes, dtype)]
    for tokens in TUNED_TOKENS:
        timed = []
        for row in _time_tile(name, dtype, sizes, packed, tokens):
            if "at" in row:
                yield row
            else:
                timed.append(row)
        yield from timed


def _time_tile(
    name: str, dtype: torch.dtype, sizes: tuple[int, int], packed: Sequence[tuple[torch.Tensor, ...]], tokens: int
) -> Iterator[Row]:
    library, num_sms = library_of(DEVICE.index), num_sms_of(DEVICE.index)
    tile, rule = library.tile_names.index(name), _rule(dtype, sizes, tokens)
    x = torch.randn(tokens, sizes[1], dtype=torch.bfloat16, device=DEVICE)
    operand, *x_scales = (x,) if dtype == torch.bfloat16 else backend.round_tokens(x, packed[0][0])
    y = torch.empty(tokens, sizes[0], dtype=torch.bfloat16, device=DEVICE)
    for split_k in sorted({*SPLITS_K, rule.get(name, DATA_PARALLEL)}):
        if split_k != DATA_PARALLEL and (tokens > 1024 or (library.family == 90 and "streamk" not in name)):
            continue
        if not can_run(library, tile, dtype, sizes, tokens, split_k, num_sms):
            continue
        yield {"at": f"{name} split_k {split_k}, {tokens} tokens"}
        calls = [_tile_call(library, tile, split_k, operand, x_scales, parts, y) for parts in packed]
        row = {"family": library.family, "multiprocessors": num_sms, "value_bits": dtype.itemsize * 8}
        row |= sizes_of(sizes, tokens)
        yield {**row, "tile": name, "split": split_k, "us": microseconds(calls)}


def _tile_call(
    library: CudaLibrary,
    tile: int,
    split_k: int,
    x: torch.Tensor,
    x_scales: Sequence[torch.Tensor],
    packed: tuple[torch.Tensor, ...],
    y: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    values, metadata, *scales = packed

    def call() -> torch.Tensor:
        both = (*scales, *x_scales) or None
        library.linear(tile, split_k, x, values, metadata, None, y, backend.workspace(x.device.index), both)
        return y

    return call


SHAPE = ("family", "multiprocessors", "value_bits", "out_features", "in_features")  # keys of MEASURED


def shape_of(row: Row) -> tuple[int, ...]:
    """Its key in MEASURED."""
    return tuple(row[key] for key in SHAPE)


def crashed_tiles(checks: Sequence[Row]) -> set[str]:
    """The tiles that crashed, hung or were refused, in a check or when they were timed."""
    parts = [row["part"].split() for row in checks if row.get("ok") is False and "error" in row and "part" in row]
    return {words[1] for words in parts if words[0] == "tile"} | {words[-1] for words in parts if words[0] == "tiles"}


def checked_tiles(checks: Sequence[Row]) -> set[str]:
    return {row["check"].split()[1] for row in checks if row.get("check", "").startswith("tile ")}


def wrong_splits(checks: Sequence[Row]) -> set[str]:
    """`tile NAME split_k SPLIT` for all that gave a wrong product."""
    return {row["check"] for row in checks if row.get("ok") is False and row.get("check", "").startswith("tile ")}


def right(tiles: Sequence[Row], checks: Sequence[Row]) -> list[Row]:
    """The times of tiles that were checked and did not fail.

    Args:
        checks: gpu_check's rows of that section, and all rows of parts that crashed.
    """
    usable, wrong = checked_tiles(checks) - crashed_tiles(checks), wrong_splits(checks)
    return [row for row in tiles if row["tile"] in usable and f"tile {row['tile']} split_k {row['split']}" not in wrong]


def table_rows(tiles: Sequence[Row]) -> str:
    """The fastest tile of each shape and number of tokens, as lines for MEASURED in serve/kernels/cuda/tiles.py."""
    best: dict[tuple[int, ...], dict[int, Row]] = {}
    for row in tiles:
        shape = best.setdefault(shape_of(row), {})
        if row["tokens"] not in shape or row["us"] < shape[row["tokens"]]["us"]:
            shape[row["tokens"]] = row
    lines = []
    for sizes, by_tokens in best.items():
        entries = ", ".join(f'({tokens}, "{row["tile"]}", {row["split"]})' for tokens, row in sorted(by_tokens.items()))
        lines.append(f"    {sizes}: ({entries},),")
    return "\n".join(lines)
