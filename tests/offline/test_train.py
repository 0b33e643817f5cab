"""Block reconstruction of integer weights, from `compress` to the reader."""

import pytest
import torch

from ria_vllm.checkpoint import Reader
from ria_vllm.offline import train, train_experts
from ria_vllm.offline.compress import Settings, compress
from ria_vllm.offline.pruned import Pruned, packed, stored_weight
from ria_vllm.offline.pruning.block import train_block
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.train import after_training, grids_of
from ria_vllm.progress import Monitor


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_training_moves_integers_and_leaves_their_scales_or_changes_nothing(family, tiny, text, tmp_path):
    found = {}
    for reconstruct in ("admm", "block"):
        recipe = Recipe(
            calibration=str(text), samples=32, seq_len=32, weights="int8", reconstruct=reconstruct, ignore=("layers.1",)
        )
        report = compress(str(tiny(family)), tmp_path / reconstruct, recipe, Settings(), Monitor(shown=False))
        reader = found[reconstruct] = Reader(tmp_path / reconstruct)
        assert list(reader.problems()) == []
    started, trained = found["admm"], found["block"]
    losses = {name: record["block_loss"] for name, record in report["linears"].items()}
    in_order = sorted(started.sparse_names, key=lambda name: ".mlp." in name)
    assert set(in_order) == set(losses) and min(map(min, losses.values())) > 0
    first = next(number for number, name in enumerate(in_order) if losses[name][1] < losses[name][0])
    for name in in_order[: first + 1]:  # nothing before these was trained
        parts, before = trained.linear(name).parts, started.linear(name).parts
        assert torch.equal(parts["weight_scale"], before["weight_scale"])
        assert torch.equal(parts["bitmask"], before["bitmask"])
        moved = (parts["compressed"].int() - before["compressed"].int()).abs()
        assert moved.max() < 128 and (moved.double().mean() > 0.1 if name == in_order[first] else moved.sum() == 0)


@pytest.mark.parametrize("permuted", [True, False])
@pytest.mark.parametrize("group_size", [32, "row"])
def test_grids_have_the_scales_of_the_stored_columns(group_size, permuted):
    recipe = Recipe(weights="int4", group_size=group_size)
    draw = torch.Generator().manual_seed(0)
    stored = torch.randn(24, 192, generator=draw) * torch.logspace(-2, 2, 192)  # by groups, very different scales
    p = torch.randperm(192, generator=draw) if permuted else torch.arange(192)
    back = p.argsort()
    weight, scale = stored_weight(stored[:, back], p if permuted else None, torch.float32, recipe)
    linear = Pruned(weight, packed(stored[:, back] != 0), p if permuted else None, {}, scale)
    grid = grids_of({"a": linear}, recipe, torch.device("cpu"))["a"]
    scales = grid.scales_at(torch.arange(stored.numel())).view(24, 192).float()
    other = 2 * stored[:, back]
    on_grid = (other / scales).round().clamp(grid.low, grid.high) * scales
    assert torch.equal(on_grid[:, p], recipe.weight_format.quantize(other[:, p], torch.float32, scale)[0])
    assert on_grid[:, p].ne(other[:, p]).any()


@pytest.mark.parametrize(("losses", "is_trained"), [([2.0, 3.0, 1.0], True), ([2.0, 1.0, 2.0], False), ([], False)])
def test_a_weight_whose_loss_did_not_fall_stays_as_it_was(losses, is_trained):
    start = Pruned(torch.zeros(2, 4, dtype=torch.bfloat16), packed(torch.ones(2, 4, dtype=torch.bool)), None, {"a": 1})
    found = after_training(start, torch.ones(2, 4), losses, Recipe())
    assert torch.equal(found.weight, torch.full((2, 4), float(is_trained), dtype=torch.bfloat16))
    loss = [losses[0], losses[-1]] if losses else None
    assert found.record == {"a": 1, "block_loss": loss, "trained": is_trained} and start.record == {"a": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "reconstruct"), [("llama", "short"), ("llama", "block"), ("qwen3-moe", "block")])
def test_what_training_did_not_better_is_what_admm_wrote(
    family, reconstruct, dtype, make_model, text, tmp_path, monkeypatch
):
    """In a checkpoint of the dtype that is computed in, whose weights need no copy to be trained."""

    def worse(*arguments, **options):
        train_block(*arguments, **options)
        return [1.0, 2.0]

    for module in (train, train_experts):
        monkeypatch.setattr(module, "train_block", worse)
    source = make_model(tmp_path / "dense", family, dtype=getattr(torch, dtype))
    found = {}
    for name in ("admm", reconstruct):
        recipe = Recipe(calibration=str(text), samples=8, seq_len=32, reconstruct=name, compute_dtype=dtype)
        compress(str(source), tmp_path / name, recipe, Settings(), Monitor(shown=False))
        found[name] = Reader(tmp_path / name)
    assert found["admm"].sparse_names == found[reconstruct].sparse_names
    for name in found["admm"].sparse_names:
        assert torch.equal(found["admm"].dense(name), found[reconstruct].dense(name)), name
