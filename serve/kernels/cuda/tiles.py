"""Chooses the tile for a product and how K is divided: from measurements, or by rule where there are none."""

import re
from functools import cache

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.bindings import CudaLibrary

# Values of `split_k`, which says how K is divided among thread blocks; 2 and more are a number of parts. The same as in
# csrc/interface.h and, by meaning, CUTLASS's decomposition modes.
STREAM_K, HEURISTIC, DATA_PARALLEL = -1, 0, 1
_BALANCED = -2  # in _RULES only: the number of parts that `balanced_split_k` returns

MAX_SPLIT_K = 16

# Allocated once per device. No tile needs more than one fp32 tile of sums per SM.
WORKSPACE_BYTES = 32 * 2**20
COUNTER_BYTES = 64 * 2**10  # at its start; as in csrc/interface.h

# (family, number of SMs, value bits, out_features, in_features): ((most tokens, tile, split_k), ...), by most tokens.
# The number of SMs tells the GPUs of a family apart. `gpu_check` prints rows for this table. It is empty because
# nothing has been measured on a GPU yet: the rules below are reasoned, not tuned.
MEASURED: dict[tuple[int, int, int, int, int], tuple[tuple[int, str, int], ...]] = {}

# (family, value bits): ((most tokens, ((tile, split_k), ...) in order of preference), ...), by most tokens.
#
# With few tokens, reading the weight takes most of the time, so every SM must read a share of it, and K is divided
# until each does. With many tokens, tiles are wide in tokens, because on Hopper a sparse wgmma reads its B operand from
# shared memory twice as fast as a dense one, and a cluster shares that operand.
_RULES: dict[tuple[int, int], tuple[tuple[float, tuple[tuple[str, int], ...]], ...]] = {
    (90, 16): (
        (16, (("128x16_streamk", _BALANCED),)),
        (64, (("128x64_streamk", _BALANCED),)),
        (512, (("128x128_cluster_streamk", HEURISTIC),)),
        (float("inf"), (("128x256_cluster", DATA_PARALLEL), ("128x128_cluster_streamk", HEURISTIC))),
    ),
    (90, 8): (
        (16, (("fp8_128x16_streamk", _BALANCED),)),
        (float("inf"), (("fp8_128x128_cluster_streamk", HEURISTIC),)),
    ),
    (100, 16): (
        (64, (("128x64_streamk", _BALANCED),)),
        (512, (("128x128_streamk", HEURISTIC),)),
        (float("inf"), (("128x256", DATA_PARALLEL),)),
    ),
    (80, 8): (
        (32, (("int8_128x32", HEURISTIC),)),
        (float("inf"), (("int8_128x128", HEURISTIC),)),
    ),
    (80, 16): (
        (32, (("128x32", HEURISTIC),)),
        (64, (("128x64", HEURISTIC),)),
        (float("inf"), (("128x128", HEURISTIC),)),
    ),
}


def preferred_tiles(
    family: int, num_sms: int, value_bits: int, out_features: int, in_features: int, tokens: int
) -> tuple[tuple[str, int], ...]:
    """(tile name, split_k), best first; empty if the family has no tile for values of `value_bits` bits."""
    for max_tokens, name, split_k in MEASURED.get((family, num_sms, value_bits, out_features, in_features), ()):
        if tokens <= max_tokens:
            return ((name, split_k),)
    rules = _RULES.get((family, value_bits), ())
    tiles = next((tiles for max_tokens, tiles in rules if tokens <= max_tokens), ())
    return tuple(
        (name, balanced_split_k(name, out_features, in_features, tokens, num_sms) if split_k == _BALANCED else split_k)
        for name, split_k in tiles
    )


def balanced_split_k(tile: str, out_features: int, in_features: int, tokens: int, num_sms: int) -> int:
    """The number of parts of K with which the busiest SM finishes first.

    CUTLASS's own heuristic does not divide K once the tiles fill half of the last wave: 86 of 132 SMs for 11008 rows.
    Stream-K keeps all SMs busy, but one that gets a whole tile still finishes last. The estimate counts steps of K:
    each wave of thread blocks takes its steps and about one more to start, and the parts of a tile add their sums one
    after another, at about half a step each. Both numbers are guesses until they are measured.
    """
    named = re.match(r"(fp8_|int8_)?(\d+)x(\d+)", tile)
    assert named is not None
    fp8, rows, columns = named.groups()
    tiles = -(-out_features // int(rows)) * -(-tokens // int(columns))
    steps = -(-in_features // (256 if fp8 else 128))

    def duration(parts: int) -> float:
        return -(-tiles * parts // num_sms) * (-(-steps // parts) + 1) + (parts - 1) / 2

    return min(range(1, min(steps, MAX_SPLIT_K) + 1), key=duration)


def can_run(
    library: CudaLibrary, tile: int, dtype: torch.dtype, sizes: tuple[int, int], tokens: int, split_k: int, num_sms: int
) -> bool:
    """Whether the tile can compute such a product, and in the workspace that there is."""
    product = (tile, dtype, sizes, tokens, split_k, num_sms)
    return library.can_implement(*product) and library.workspace_bytes(*product) <= WORKSPACE_BYTES


@cache
def choose_tile(
    library: CudaLibrary, dtype: torch.dtype, out_features: int, in_features: int, tokens: int, num_sms: int
) -> tuple[int, int]:
    """(tile, split_k) for a product: the best choice that the library has and that fits the workspace, else any tile.

    Raises:
        RiaError: no tile of the library can compute it.
    """
    sizes = (out_features, in_features)
    indices = {name: index for index, name in enumerate(library.tile_names)}
    wanted = [
        (indices[name], split_k)
        for name, split_k in preferred_tiles(library.family, num_sms, dtype.itemsize * 8, *sizes, tokens)
        if name in indices
    ]
    for tile, split_k in [*wanted, *((tile, DATA_PARALLEL) for tile in indices.values())]:
        if can_run(library, tile, dtype, sizes, tokens, split_k, num_sms):
            return tile, split_k
    raise RiaError(
        f"{library.path.name}: no tile for a {out_features} x {in_features} layer of {dtype} and {tokens} tokens"
    )
