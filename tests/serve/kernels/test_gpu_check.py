"""What gpu_check would say of a kernel, played on a CPU: right ones pass, wrong ones do not."""

import pytest
import torch
from pretend_hopper import TILES, PretendLibrary

from ria_vllm.serve.kernels import cutlass, fp8, gpu_check, gpu_timing


@pytest.fixture
def played(hopper_layers, monkeypatch):
    monkeypatch.setattr(gpu_check, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "BACKENDS", (cutlass,))
    monkeypatch.setattr(gpu_check, "library_of", lambda index: hopper_layers)
    monkeypatch.setattr(gpu_check, "multiprocessors", lambda index: 132)
    return hopper_layers


def rows(weights, dtype=torch.bfloat16):
    layer = gpu_check.random_layer(136, 192, dtype, weights)
    return [*gpu_check.check_backends(layer), *gpu_check.check_tiles(layer)]


@pytest.mark.parametrize("weights", [None, fp8.DTYPE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_products_pass_at_every_number_of_tokens(played, weights, dtype):
    found = rows(weights, dtype)
    assert all(row["ok"] for row in found)
    assert {row["tokens"] for row in found if "tokens" in row} == set(gpu_check.TOKENS)
    tiles = {row["check"].split()[1] for row in found if row["check"].startswith("tile ")}
    assert tiles == {name for name in TILES if name.startswith("fp8_") == (weights is not None)}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, values, metadata, bias, scales: (x, values, metadata, bias, (scales[0].roll(1), scales[1])),
        lambda x, values, metadata, bias, scales: (x, values, metadata, bias, (scales[0], scales[1] * 1.1)),
        lambda x, values, metadata, bias, scales: (x, values, metadata.roll(1), bias, scales),
        lambda x, values, metadata, bias, scales: (x, values.roll(1), metadata, bias, scales),
        lambda x, values, metadata, bias, scales: (x.roll(1), values, metadata, bias, scales),
    ],
    ids=["rows of scales", "token scales", "metadata", "values", "activations"],
)
def test_wrong_products_fail(played, monkeypatch, spoil):
    right = PretendLibrary.linear

    def wrong(self, tile, split, x, values, metadata, bias, y, workspace, scales=None):
        x, values, metadata, bias, scales = spoil(x, values, metadata, bias, scales)
        right(self, tile, split, x, values, metadata, bias, y, workspace, scales)

    monkeypatch.setattr(PretendLibrary, "linear", wrong)
    assert not any(row["ok"] for row in rows(fp8.DTYPE) if "excess" in row)


def test_the_fastest_tiles_are_printed_by_width_of_values():
    measured = {"family": 90, "out_features": 64, "in_features": 128, "tokens": 16, "split": 1}
    table = gpu_timing.table_rows(
        [
            measured | {"value_bits": 16, "tile": "slow", "us": 2.0},
            measured | {"value_bits": 16, "tile": "fast", "us": 1.0},
            measured | {"value_bits": 8, "tile": "fp8_fast", "us": 0.5},
        ]
    )
    assert eval("{" + table + "}") == {(90, 16, 64, 128): ((16, "fast", 1),), (90, 8, 64, 128): ((16, "fp8_fast", 1),)}
