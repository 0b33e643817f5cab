"""What is written into MEASURED after a session on a GPU."""

import itertools

import pytest
import torch

from benchmarks import gpu_measured, gpu_tiles
from benchmarks.gpu_record import Record


def measured(tile, us, tokens, **changed):
    row = {"family": 90, "multiprocessors": 132, "value_bits": 16, "out_features": 64, "in_features": 128, "split": 1}
    return {**row, "tile": tile, "us": us, "tokens": tokens, **changed}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Of three tiles: a right one, a faster one that is wrong with one split of K, and the fastest, which crashed."""
    monkeypatch.setattr(gpu_tiles, "TUNED_TOKENS", (1, 16))
    record = Record(tmp_path / "check.jsonl")
    for name, splits in (("right", {1: True, 2: True}), ("wrong", {1: True, 2: False}), ("crashed", {1: True})):
        part = f"tile {name} torch.bfloat16"
        record.start(part)
        for split, ok in splits.items():
            record.add(part, "checks", {"check": f"tile {name} split_k {split}", "tokens": 1, "ok": ok})
        if name == "crashed":
            record.add(part, "checks", {"part": part, "at": "split_k 2", "error": "no answer for 20 s", "ok": False})
        record.end(part, "passed" if name == "right" else "failed")
    for name, us in (("right", 3.0), ("wrong", 2.0), ("crashed", 1.0)):
        part = gpu_tiles.part_name((64, 128), torch.bfloat16, name)
        record.start(part)
        for count, split in itertools.product((1, 16), (1, 2)):
            record.add(part, "tiles", measured(name, us / split, count, split=split))
        record.end(part, "passed")
    return record


def test_tiles_that_are_wrong_or_crash_do_not_enter_measured(record):
    rows, left_out = gpu_measured.trusted(record)
    assert {(row["tile"], row["split"]) for row in rows} == {("right", 1), ("right", 2), ("wrong", 1)}
    assert gpu_measured.table_of(rows) == {(90, 132, 16, 64, 128): ((16, "right", 2),)}
    assert [line.split(":")[0] for line in left_out] == ["crashed", "tile wrong split_k 2"]
