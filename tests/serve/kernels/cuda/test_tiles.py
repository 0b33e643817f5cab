"""Which tile of a CUDA library multiplies a layer, and into how many parts it divides K."""

from types import SimpleNamespace

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import build as cuda_compile
from ria_vllm.serve.kernels.cuda import tiles as cutlass_tiles


class PretendLibrary(SimpleNamespace):
    """Tiles by name; `refused` accept nothing, `hungry` want more than the workspace."""

    def __hash__(self) -> int:
        return id(self)

    def accepts(self, tile, *_):
        return self.tile_names[tile] not in self.refused

    def workspace_bytes(self, tile, *_):
        return cutlass_tiles.WORKSPACE_BYTES + (self.tile_names[tile] in self.hungry)


def pretend(names, refused=(), hungry=()):
    from pathlib import Path

    return PretendLibrary(tile_names=list(names), refused=refused, hungry=hungry, family=90, path=Path("pretend.so"))


ALL_HOPPER = [tile.name for tile in cuda_compile.ARCHITECTURES["90a"].tiles]


def chosen(library, tokens):
    tile, split = cutlass_tiles.choose_tile(library, torch.bfloat16, 4096, 4096, tokens, 132)
    return library.tile_names[tile], split


def test_more_tokens_take_wider_tiles():
    widths = [int(chosen(pretend(ALL_HOPPER), tokens)[0].split("_")[0].split("x")[1]) for tokens in (1, 16, 64, 256, 4096)]
    assert widths == sorted(widths) and widths[0] == 16 and widths[-1] == 256


def test_the_next_best_tile_serves_when_the_first_cannot():
    assert chosen(pretend(ALL_HOPPER, refused=("128x256_cluster",)), 4096)[0] == "128x128_cluster_streamk"
    assert chosen(pretend(ALL_HOPPER, hungry=("128x256_cluster",)), 4096)[0] == "128x128_cluster_streamk"
    assert chosen(pretend(ALL_HOPPER[:1]), 4096) == (ALL_HOPPER[0], cutlass_tiles.SPLIT_NONE)


@pytest.mark.parametrize("architecture", cuda_compile.ARCHITECTURES.values(), ids=lambda found: found.name)
def test_rules_and_measurements_take_what_is_compiled_by_default_and_nothing_else(architecture):
    taken = set()
    for (family, *_), rows in cutlass_tiles.MEASURED.items():
        taken |= {name for _, name, _ in rows if family == architecture.family}
    for (family, _), rules in cutlass_tiles._RULES.items():
        taken |= {name for _, tiles in rules for name, _ in tiles if family == architecture.family}
    assert taken == {tile.name for tile in architecture.default_tiles}


@pytest.mark.parametrize("sms", [114, 132, 148])
@pytest.mark.parametrize(
    "shape",
    [(4096, 4096), (6144, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 28672), (57344, 8192), (576, 1536)],
)
def test_parts_of_k_keep_the_multiprocessors_alike_busy(shape, sms):
    """Blocks are dealt out one by one to whoever has least; what the busiest gets is near an equal share."""
    parts = cutlass_tiles.balanced_parts("128x16_streamk", *shape, 1, sms)
    tiles, steps = -(-shape[0] // 128), -(-shape[1] // 128)
    loads = [0] * sms
    for part in range(parts):
        for _ in range(tiles):
            loads[loads.index(min(loads))] += (steps + part) // parts
    share = tiles * steps / sms
    assert max(loads) <= max(1.45 * share, steps / cutlass_tiles.MOST_PARTS + 3)


def test_k_stays_whole_where_a_tile_has_but_one_step():
    assert cutlass_tiles.balanced_parts("128x16_streamk", 8, 64, 1, 132) == 1
    assert cutlass_tiles.balanced_parts("fp8_128x16_streamk", 8, 256, 1, 132) == 1
    assert cutlass_tiles.balanced_parts("fp8_128x16_streamk", 8, 512, 1, 132) == 2


def test_no_tile_at_all_is_an_error():
    with pytest.raises(RiaError, match="no tile for a 4096 x 4096 layer"):
        chosen(pretend(ALL_HOPPER, refused=ALL_HOPPER), 1)


def test_a_measured_shape_overrules_the_rule(monkeypatch):
    row = ((16, "128x64_streamk", 2), (64, "128x128_cluster_pingpong", 1))
    monkeypatch.setitem(cutlass_tiles.MEASURED, (90, 132, 16, 4096, 4096), row)
    assert chosen(pretend(ALL_HOPPER), 7) == ("128x64_streamk", 2)
    assert chosen(pretend(ALL_HOPPER), 17) == ("128x128_cluster_pingpong", 1)
    assert chosen(pretend(ALL_HOPPER), 65)[0] == "128x128_cluster_streamk"


def test_every_rule_names_tiles_that_are_compiled():
    for target in cuda_compile.ARCHITECTURES.values():
        names = {tile.name for tile in target.tiles}
        for value_bits in {tile.value_bits for tile in target.tiles}:
            for tokens in (1, 16, 17, 64, 65, 512, 513, 100_000):
                wanted = cutlass_tiles.preferences(target.family, 132, value_bits, 4096, 4096, tokens)
                assert wanted and {name for name, _ in wanted} <= names
