"""Heads rotated by hand: random matrices in the place of learned ones, and the whole dense model that they make."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ria_vllm.offline.sublayer import rotating

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Attention:
    """Where a tiny model has its values: names within a layer, and the rows of values in `v`, head by head."""

    v: str
    o: str
    rows: Sequence[int]
    share: int  # heads for each key-value head
    prefix: str = "model.layers.{i}."
    layers: tuple[int, ...] = (0, 1)  # whose heads can be rotated
    settings: tuple[tuple[str, Any], ...] = ()  # of the model

    def names(self, index: int) -> tuple[str, str]:
        prefix = self.prefix.format(i=index)
        return prefix + self.v, prefix + self.o

    def rotated(self, dense: Tensors, rotations: Iterable[torch.Tensor]) -> Tensors:
        """What differs in the rotated model, in float64.

        Args:
            rotations: [kv heads, d, d] of each of `layers`.
        """
        found = {}
        for index, one in zip(self.layers, rotations, strict=True):
            v, o = self.names(index)
            for name in (f"{v}.weight", f"{v}.bias"):
                if name in dense:
                    found[name] = dense[name].double()
                    found[name][list(self.rows)] = torch.block_diag(*one) @ found[name][list(self.rows)]
            columns = torch.block_diag(*one.repeat_interleave(self.share, 0))
            found[f"{o}.weight"] = dense[f"{o}.weight"].double() @ columns.T
        return found


def in_blocks(count: int, size: int, start: int) -> list[int]:
    """The rows from `start` on in each of `count` blocks of `size`."""
    return [block * size + row for block in range(count) for row in range(start, size)]


VALUES, OUTPUT = "self_attn.v_proj", "self_attn.o_proj"
# Layers 2 and 3 leave keys and values for the last two, which have none of their own.
GEMMA_3N = {
    "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
    "intermediate_size": [192] * 6, "activation_sparsity_pattern": [0.5] + [0.0] * 5,
}  # fmt: skip
# The tiny models of `families`.
FAMILIES = {
    "llama": Attention(VALUES, OUTPUT, range(64), 2),
    "opt": Attention(VALUES, "self_attn.out_proj", range(128), 1, "model.decoder.layers.{i}."),
    "qwen2": Attention(VALUES, OUTPUT, range(64), 2),
    "phi3": Attention("self_attn.qkv_proj", OUTPUT, range(192, 256), 2),
    "gpt-neox": Attention(
        "attention.query_key_value", "attention.dense", in_blocks(4, 96, 64), 1, "gpt_neox.layers.{i}."
    ),
    "deepseek-v3": Attention("self_attn.kv_b_proj", OUTPUT, in_blocks(4, 48, 16), 1),
    "gemma3n": Attention(VALUES, OUTPUT, range(64), 2, settings=tuple(GEMMA_3N.items())),
}
WITH_BIAS = ("opt", "qwen2", "gpt-neox")


def random_rotations(heads: rotating.Heads, seed: int) -> torch.Tensor:
    kv, d = heads.values.shape[:2]
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(kv, d, d, dtype=torch.float64, generator=draw)).Q


@pytest.fixture
def by_hand(monkeypatch) -> list[torch.Tensor]:
    """Random matrices in the place of learned ones, in the order of the layers."""
    given: list[torch.Tensor] = []

    def random(heads: rotating.Heads, *_: object) -> torch.Tensor:
        given.append(random_rotations(heads, len(given)))
        return given[-1]

    monkeypatch.setattr(rotating, "learned", random)
    return given
