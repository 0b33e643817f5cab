"""Which tile computes a product, and how K is divided: a measured table first, a rule for every other shape."""

import re
from functools import lru_cache

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.bindings import CudaLibrary

# How K is divided among thread blocks, as csrc/interface.h has it; 2 and more ask for that many parts.
SPLIT_FORCED, SPLIT_HEURISTIC, SPLIT_NONE = -1, 0, 1
_SPLIT_BALANCED = -2  # of a rule here alone: as many parts as `balanced_parts` says

MOST_PARTS = 16

# Allocated once per device. The largest need of any tile is one fp32 tile for each multiprocessor.
WORKSPACE_BYTES = 32 * 2**20
COUNTER_BYTES = 64 * 2**10  # at its start, as in csrc/interface.h

# (family, multiprocessors, bits a value, out_features, in_features): (up to this many tokens, tile, split), ascending.
# The multiprocessors tell GPUs of a family apart. `gpu_check` prints rows for it. Empty because no GPU has measured it
# yet: the rules below are reasoned, not tuned.
MEASURED: dict[tuple[int, int, int, int, int], tuple[tuple[int, str, int], ...]] = {}

# (family, bits a value): (up to this many tokens, tiles in order of preference).
#
# Few tokens: the weight's bytes decide, so every multiprocessor must be pulling on its share of them, and K is divided
# until they do. Many tokens: wide token tiles, because on Hopper the sparse wgmma reads its B operand from shared
# memory twice as fast as a dense one does, and a cluster shares it.
_RULES: dict[tuple[int, int], tuple[tuple[float, tuple[tuple[str, int], ...]], ...]] = {
    (90, 16): (
        (16, (("128x16_streamk", _SPLIT_BALANCED),)),
        (64, (("128x64_streamk", _SPLIT_BALANCED),)),
        (512, (("128x128_cluster_streamk", SPLIT_HEURISTIC),)),
        (float("inf"), (("128x256_cluster", SPLIT_NONE), ("128x128_cluster_streamk", SPLIT_HEURISTIC))),
    ),
    (90, 8): (
        (16, (("fp8_128x16_streamk", _SPLIT_BALANCED),)),
        (float("inf"), (("fp8_128x128_cluster_streamk", SPLIT_HEURISTIC),)),
    ),
    (100, 16): (
        (64, (("128x64_streamk", _SPLIT_BALANCED),)),
        (512, (("128x128_streamk", SPLIT_HEURISTIC),)),
        (float("inf"), (("128x256", SPLIT_NONE),)),
    ),
    (80, 16): (
        (32, (("128x32", SPLIT_HEURISTIC),)),
        (64, (("128x64", SPLIT_HEURISTIC),)),
        (float("inf"), (("128x128", SPLIT_HEURISTIC),)),
    ),
}


def preferences(
    family: int, sms: int, value_bits: int, out_features: int, in_features: int, tokens: int
) -> tuple[tuple[str, int], ...]:
    """Tiles by name, each with its split, best first; empty where the family has none for values of so many bits."""
    for most, name, split in MEASURED.get((family, sms, value_bits, out_features, in_features), ()):
        if tokens <= most:
            return ((name, split),)
    tiles = next((tiles for most, tiles in _RULES.get((family, value_bits), ()) if tokens <= most), ())
    return tuple(
        (name, balanced_parts(name, out_features, in_features, tokens, sms) if split == _SPLIT_BALANCED else split)
        for name, split in tiles
    )


def balanced_parts(tile: str, out_features: int, in_features: int, tokens: int, sms: int) -> int:
    """Into how many parts to divide K, so that the busiest multiprocessor is done soonest.

    CUTLASS's own heuristic leaves K whole once the tiles fill half of the last wave: 86 of 132 multiprocessors for
    11008 rows. Stream-K, forced, sets all of them to work, but one with a whole tile is still the last. Counted in
    steps of K a tile: each wave of blocks takes its steps and about one to start; the parts of a tile add their sums
    one after the other, about half a step each. The two are estimates, to be replaced by measurements.
    """
    fp8, rows, columns = re.match(r"(fp8_)?(\d+)x(\d+)", tile).groups()
    tiles = -(-out_features // int(rows)) * -(-tokens // int(columns))
    steps = -(-in_features // (256 if fp8 else 128))

    def duration(parts: int) -> float:
        return -(-tiles * parts // sms) * (-(-steps // parts) + 1) + (parts - 1) / 2

    return min(range(1, min(steps, MOST_PARTS) + 1), key=duration)


def can_run(
    library: CudaLibrary, tile: int, dtype: torch.dtype, sizes: tuple[int, int], tokens: int, split: int, sms: int
) -> bool:
    """Whether the tile computes such a product within the workspace."""
    product = (tile, dtype, sizes, tokens, split, sms)
    return library.accepts(*product) and library.workspace_bytes(*product) <= WORKSPACE_BYTES


@lru_cache(maxsize=None)
def choose_tile(
    library: CudaLibrary, dtype: torch.dtype, out_features: int, in_features: int, tokens: int, sms: int
) -> tuple[int, int]:
    """(tile, split) for a product: the first choice that the library holds and that fits the workspace, else any.

    Raises:
        RiaError: no tile of the library can compute it.
    """
    sizes = (out_features, in_features)
    indices = {name: index for index, name in enumerate(library.tile_names)}
    wanted = [
        (indices[name], split)
        for name, split in preferences(library.family, sms, dtype.itemsize * 8, *sizes, tokens)
        if name in indices
    ]
    for tile, split in [*wanted, *((tile, SPLIT_NONE) for tile in indices.values())]:
        if can_run(library, tile, dtype, sizes, tokens, split, sms):
            return tile, split
    raise RiaError(
        f"{library.path.name}: no tile for a {out_features} x {in_features} layer of {dtype} and {tokens} tokens"
    )
