"""The estimated speed, against what servers of both models were measured to do: docs/lab/rivals.md."""

import re

import pytest
import torch

from ria_vllm import speed
from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.speed import Sizes, expected, steps

SMOLLM2 = Sizes(layers=30, pruned=106.2e6, head=28.3e6, dense=0)
LARGER = Sizes(layers=22, pruned=969e6, head=65.5e6, dense=0)


@pytest.mark.parametrize(
    ("sizes", "scheme", "measured"),
    [
        (SMOLLM2, "BF16", [62.9 / 52.3, 62.9 / 61.0, 243 / 210, 243 / 270]),
        (SMOLLM2, "W8A8", [74.6 / 52.3, 74.6 / 61.0, 321 / 210, 321 / 270]),
        (LARGER, "W8A8", [16.3 / 5.66, 16.3 / 10.0, 57.9 / 24.1, 57.9 / 39.7]),
        (LARGER, "W4A8", [21.2 / 5.66, 21.2 / 10.0, 55.6 / 24.1, 55.6 / 39.7]),
    ],
)
def test_it_is_near_what_was_measured(sizes, scheme, measured):
    found = [float(number) for number in re.findall(r"([0-9.]+) times", expected(sizes, scheme, "avx512_bf16"))]
    assert found == pytest.approx(measured, rel=0.3)


def test_nothing_is_said_of_what_was_not_measured():
    assert expected(SMOLLM2, "BF16", "portable") == expected(SMOLLM2, "BF16", None) == ""


@pytest.mark.parametrize("scheme, dtype, instructions, row", [
    ("W8A8", torch.bfloat16, "avx512_bf16", "avx512_bf16"),
    ("W8A8", torch.float16, "amx", "amx"),
    ("BF16", torch.float16, "amx", "avx512_vnni"),
    ("W4A16", torch.float32, "avx512_bf16", "avx512_vnni"),
    ("W4A8", torch.bfloat16, "avx_vnni", "avx2"),
    ("W8A8", torch.bfloat16, "portable", None),
    ("BF16", torch.float16, None, None),
])  # fmt: skip
def test_the_row_of_a_machine(scheme, dtype, instructions, row, monkeypatch):
    """Inputs that are not bfloat16 are not for its instructions."""
    monkeypatch.setattr(speed, "served_by", lambda *_: ("cpu", instructions))
    assert speed.measured_here(scheme, TWO_OF_FOUR, dtype, torch.device("cpu")) == row
    assert bool(steps(SMOLLM2, row, 1)) == (row is not None)
