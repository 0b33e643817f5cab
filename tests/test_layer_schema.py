"""Folds: which linears their patterns name, and the permutation of rows that they ask of producers."""

import pytest
import torch

from ria_vllm.format.layer_schema import Fold, Producer


def test_fold_patterns_match_one_layer_number():
    fold = Fold(consumer="h.{i}.fc2", producers=[Producer(name="h.{i}.fc1", rows=(2, 4))], coupling="elementwise")
    assert fold.numbers("h.12.fc2") == {"i": "12"}
    for other in ("h..fc2", "h.².fc2", "h.1.fc1.h.1.fc2", "h.x.fc2", "hx12.fc2", "a.h.1.fc2", "h.1.fc2\n"):
        assert fold.numbers(other) is None
    assert fold.producers_of("h.12.fc2") == [Producer(name="h.12.fc1", rows=(2, 4))]
    single = Fold(consumer="head.out", producers=[Producer(name="head.in")], coupling="elementwise")
    assert single.numbers("head.out") == {} and single.producers_of("head.out") == [Producer(name="head.in")]


def test_row_permutations_of_a_fold():
    """A gate takes the permutation itself, values what all query heads of a key-value head have in common."""
    producers = [Producer(name="v"), Producer(name="q", rows=(2, 4), blocks=4), Producer(name="qkv", rows=(12, 16))]
    fold = Fold(consumer="o", producers=producers, coupling="heads", num_heads=4, num_kv_heads=2)
    p = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7], dtype=torch.int32)
    assert [rows.tolist() for rows in fold.row_permutations(p)] == [[1, 0, 2, 3], p.tolist(), [1, 0, 2, 3]]
    with pytest.raises(ValueError, match="another head"):
        fold.row_permutations(torch.arange(8).flip(0))
    up = Fold(consumer="down", producers=[Producer(name="up")], coupling="elementwise")
    assert [rows.tolist() for rows in up.row_permutations(p)] == [p.tolist()]


def test_fold_patterns_match_an_experts_number():
    up = Producer(name="h.{i}.experts.{e}.w1")
    fold = Fold(consumer="h.{i}.experts.{e}.w2", producers=[up], coupling="elementwise")
    assert fold.numbers("h.2.experts.31.w2") == {"i": "2", "e": "31"}
    assert fold.numbers("h.2.experts.w2") is None and fold.numbers("h.2.experts.3.w1") is None
    assert fold.producers_of("h.2.experts.31.w2") == [Producer(name="h.2.experts.31.w1")]
    for consumer in ("h.{i}.w2", "h.{i}.{e}.{e}.w2", "h.{i}{e}.w2"):
        with pytest.raises(ValueError):
            Fold(consumer=consumer, producers=[up], coupling="elementwise")
