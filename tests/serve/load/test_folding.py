"""Fold algebra in float64, on Hugging Face's modules: permuted columns and reordered rows against the plain export."""

import numpy as np
import pytest
import tiny
import torch
from tiny import logits

from ria_vllm.checkpoint.folding import RowPermutation, fold
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.format.schema import RiaSchema, SparsityConfig


def folded(folder, model: torch.nn.Module) -> torch.nn.Module:
    """The checkpoint as serving computes it: consumers keep their stored columns, producers take permuted rows."""
    reader = Reader(folder)
    permutations = {name: p.numpy() for name, p in reader.permutations.items()}
    folding = fold(reader.schema, permutations, set(reader.sparse_names).__contains__, str(folder))
    assert folding.folded
    modules = dict(model.named_modules())
    for name in reader.sparse_names:
        linear = reader.linear(name)
        weight = linear.stored() if name in folding.folded else linear.dense()
        for permuted in folding.row_permutations.get(name, []):
            weight = permuted.take(weight)
            if modules[name].bias is not None:
                modules[name].bias.data = permuted.take(modules[name].bias.data)
        modules[name].weight.data = weight.to(modules[name].weight.dtype)
    return model


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_folded_model_gives_the_logits_of_the_export(name, tmp_path):
    family = tiny.FAMILIES[name]
    pruned = tiny.write(family, tmp_path / "out")
    want = logits(tiny.export(tmp_path / "out", tiny.model_of(family)).double())
    assert torch.equal(want, logits(pruned))
    got = logits(folded(tmp_path / "out", tiny.model_of(family).double()))
    assert want.std() > 0.5  # otherwise no error would show
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_wrong_row_order_shows(tmp_path, monkeypatch):
    family = tiny.FAMILIES["llama-gqa"]
    tiny.write(family, tmp_path / "out")
    want = logits(tiny.export(tmp_path / "out", tiny.model_of(family)))
    take = RowPermutation.take
    monkeypatch.setattr(
        RowPermutation, "take", lambda self, t: take(RowPermutation(np.argsort(self.p), self.start, self.for_all), t)
    )
    got = logits(folded(tmp_path / "out", tiny.model_of(family)))
    assert (got - want).abs().max() > 0.1


def schema(folds, ignore=()):
    return RiaSchema(sparsity_config=SparsityConfig(ignore=list(ignore)), folds=folds)


def elementwise(consumer="l.{i}.down", producers=("l.{i}.gate", "l.{i}.up"), rows=None):
    return Fold(consumer=consumer, producers=[Producer(name=p, rows=rows) for p in producers], coupling="elementwise")


def permutation(size, seed=0):
    return np.random.default_rng(seed).permutation(size).astype(np.int32)


def test_dense_producer_leaves_the_gather_to_its_consumer():
    p = {"l.0.down": permutation(64), "l.1.down": permutation(64, 1)}
    folding = fold(schema([elementwise()]), p, lambda name: name != "l.1.up", "here")
    assert folding.folded == {"l.0.down"}
    assert set(folding.row_permutations) == {"l.0.gate", "l.0.up"}


def test_rows_of_a_fused_producer():
    p = permutation(8)
    folding = fold(
        schema([elementwise(producers=("l.{i}.fused",), rows=(4, 12))]), {"l.7.down": p}, lambda _: True, "here"
    )
    tensor = torch.arange(16)[:, None] * torch.ones(1, 3)
    taken = folding.row_permutations["l.7.fused"][0].take(tensor)
    assert taken[:, 0].tolist() == [0, 1, 2, 3, *(4 + p).tolist(), 12, 13, 14, 15]


def test_rows_of_each_block_of_a_producer():
    """Three heads of four channels, stored as q, k, v head by head; and a gate behind the queries of each head."""
    values = Producer(name="l.{i}.qkv", rows=(8, 12), blocks=3)
    gate = Producer(name="l.{i}.gate", rows=(4, 8), blocks=3)
    rule = Fold(consumer="l.{i}.o", producers=[values, gate], coupling="heads", num_heads=3, num_kv_heads=3)
    p = np.concatenate([4 * head + permutation(4, head) for head in range(3)]).astype(np.int32)
    folding = fold(schema([rule]), {"l.0.o": p}, lambda _: True, "here")
    for name, size, start in (("l.0.qkv", 12, 8), ("l.0.gate", 8, 4)):
        (one,) = folding.row_permutations[name]
        expected = list(range(3 * size))
        for head in range(3):
            first = head * size + start
            expected[first : first + 4] = [first + int(row) for row in p[4 * head : 4 * head + 4] - 4 * head]
        assert one.take(torch.arange(3 * size)).tolist() == expected != list(range(3 * size))


def test_a_gate_has_a_row_for_each_query_head():
    """Values have rows for two heads, the gate for the four that read them."""
    gate = Producer(name="l.{i}.q", rows=(2, 4), blocks=4)
    producers = [Producer(name="l.{i}.v"), gate]
    rule = Fold(consumer="l.{i}.o", producers=producers, coupling="heads", num_heads=4, num_kv_heads=2)
    p = np.array([1, 0, 3, 2, 4, 5, 6, 7], dtype=np.int32)  # only the two query heads of the first key-value head
    folding = fold(schema([rule]), {"l.0.o": p}, lambda _: True, "here")
    assert folding.row_permutations["l.0.v"][0].take(torch.arange(4)).tolist() == [1, 0, 2, 3]
    taken = folding.row_permutations["l.0.q"][0].take(torch.arange(16)).tolist()
    assert taken == [0, 1, 3, 2, 4, 5, 7, 6, *range(8, 16)]
