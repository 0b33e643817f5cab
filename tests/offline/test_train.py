"""Block reconstruction of integer weights, from `compress` to the reader."""

import pytest
import torch

from ria_vllm.checkpoint import Reader
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.recipe import Recipe
from ria_vllm.progress import Monitor


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_training_moves_integers_and_leaves_their_scales(family, tiny, text, tmp_path):
    found = {}
    for reconstruct in ("admm", "block"):
        recipe = Recipe(
            calibration=str(text), samples=4, seq_len=32, weights="int8", reconstruct=reconstruct, ignore=("layers.1",)
        )
        report = compress(str(tiny(family)), tmp_path / reconstruct, recipe, Settings(), Monitor(shown=False))
        reader = found[reconstruct] = Reader(tmp_path / reconstruct)
        assert list(reader.problems()) == []
    started, trained = found["admm"], found["block"]
    losses = [record["block_loss"] for record in report["linears"].values()]
    assert losses and all(first > 0 for first, _ in losses)
    first = next(name for name in started.sparse_names if name.endswith("q_proj"))  # nothing before it was trained
    parts, before = trained.linear(first).parts, started.linear(first).parts
    assert torch.equal(parts["weight_scale"], before["weight_scale"])
    assert torch.equal(parts["bitmask"], before["bitmask"])
    moved = (parts["compressed"].int() - before["compressed"].int()).abs()
    assert moved.double().mean() > 0.5 and moved.max() < 128
