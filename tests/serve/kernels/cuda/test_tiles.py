"""Which tile is chosen, and how K is divided. Needs no compiled library."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda import tiles
from ria_vllm.serve.kernels.cuda.architectures import ARCHITECTURES
from ria_vllm.serve.kernels.cuda.tiles import (
    MAX_SPLIT_K,
    WORKSPACE_BYTES,
    balanced_split_k,
    choose_tile,
)


class FakeLibrary(SimpleNamespace):
    """A library of named tiles: `refused` ones can compute nothing, `hungry` ones need more than the workspace."""

    def __hash__(self) -> int:
        return id(self)

    def can_implement(self, tile, *_):
        return self.tile_names[tile] not in self.refused

    def workspace_bytes(self, tile, *_):
        return WORKSPACE_BYTES + (self.tile_names[tile] in self.hungry)


def library_of(names, refused=(), hungry=()):
    return FakeLibrary(tile_names=list(names), refused=refused, hungry=hungry, family=90, path=Path("fake.so"))


ALL_HOPPER = [tile.name for tile in ARCHITECTURES["90a"].tiles]


def chosen(library, tokens):
    tile, split_k = choose_tile(library, torch.bfloat16, 4096, 4096, tokens, 132)
    return library.tile_names[tile], split_k


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda found: found.name)
def test_rules_and_measurements_choose_from_all_default_tiles_and_only_from_them(architecture):
    taken = set()
    for (family, *_), rows in tiles.MEASURED.items():
        taken |= {name for _, name, _ in rows if family == architecture.family}
    for (family, _), rules in tiles._RULES.items():
        taken |= {name for _, choices in rules for name, _ in choices if family == architecture.family}
    assert taken == {tile.name for tile in architecture.default_tiles}


@pytest.mark.parametrize("num_sms", [114, 132])
@pytest.mark.parametrize(
    "shape",
    [(4096, 4096), (11008, 4096), (28672, 8192), (576, 1536)],
)
def test_split_k_keeps_all_sms_equally_busy(shape, num_sms):
    """If each block goes to the SM with the least work, the busiest SM gets little more than an equal share."""
    parts = balanced_split_k("128x16_streamk", *shape, 1, num_sms)
    num_tiles, steps = -(-shape[0] // 128), -(-shape[1] // 128)
    loads = [0] * num_sms
    for part in range(parts):
        for _ in range(num_tiles):
            loads[loads.index(min(loads))] += (steps + part) // parts
    share = num_tiles * steps / num_sms
    assert max(loads) <= max(1.45 * share, steps / MAX_SPLIT_K + 3)


def test_it_is_an_error_if_no_tile_can_compute_the_product():
    with pytest.raises(RiaError, match="no tile for a 4096 x 4096 layer"):
        chosen(library_of(ALL_HOPPER, refused=ALL_HOPPER), 1)


def test_a_measurement_overrides_the_rule(monkeypatch):
    row = ((16, "128x64_streamk", 2), (64, "128x128_cluster_pingpong", 1))
    monkeypatch.setitem(tiles.MEASURED, (90, 132, 16, 4096, 4096), row)
    assert chosen(library_of(ALL_HOPPER), 7) == ("128x64_streamk", 2)
    assert chosen(library_of(ALL_HOPPER), 17) == ("128x128_cluster_pingpong", 1)
    assert chosen(library_of(ALL_HOPPER), 65)[0] == "128x128_cluster_streamk"
