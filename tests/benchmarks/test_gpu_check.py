"""gpu_check with kernels mocked on a CPU: correct ones pass, wrong ones fail, and a broken one costs only its row."""

import os
import time

import pytest
import torch
from pretend_hopper import TILES, PretendLibrary
from small_gpu import MockStream, use_library

from benchmarks import gpu_check, gpu_products
from ria_vllm.errors import RiaError
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel


def rows(weights, dtype=torch.bfloat16, tiles=TILES):
    layer = gpu_products.random_layer(136, 192, dtype, weights)
    found = [*gpu_products.check_kernel(CutlassKernel, layer), *gpu_products.check_packing(layer)]
    found += [row for name in tiles for row in gpu_products.check_tile(name, layer)]
    return [row for row in found if "at" not in row]


def test_right_products_of_integers_pass_and_wrong_ones_fail(ampere_layers, monkeypatch):
    use_library(monkeypatch, ampere_layers)
    names, right = ampere_layers.tile_names, PretendLibrary.linear
    found = rows(torch.int8, tiles=names)
    tiles = {row["check"].split()[1] for row in found if row["check"].startswith("tile ")}
    assert all(row["ok"] for row in found) and tiles == {name for name in names if name.startswith("int8_")}

    def wrong(self, tile, split_k, x, values, metadata, bias, y, workspace, scales):
        right(self, tile, split_k, x.roll(1), values, metadata, bias, y, workspace, scales)

    monkeypatch.setattr(PretendLibrary, "linear", wrong)
    assert not any(row["ok"] for row in rows(torch.int8, tiles=names) if "excess" in row)


@pytest.mark.parametrize("weights", [None, FP8_DTYPE, torch.int8])
def test_experts_pass_and_wrong_ones_fail(request, monkeypatch, weights):
    use_library(monkeypatch, request.getfixturevalue("ampere_layers" if weights == torch.int8 else "hopper_layers"))

    def checked():
        found = [row for row in gpu_products.check_experts(torch.bfloat16, weights) if "at" not in row]
        assert [row["tokens"] for row in found] == [1, 64]
        return [row["ok"] for row in found]

    assert checked() == [True, True]
    right = PretendLibrary.linear

    def wrong(self, tile, split_k, x, values, *rest):
        right(self, tile, split_k, x, values.roll(2, 0), *rest)

    monkeypatch.setattr(PretendLibrary, "linear", wrong)
    assert checked() == [False, False]


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
def test_wrong_products_fail(mocked, monkeypatch, spoil):
    right = PretendLibrary.linear

    def wrong(self, tile, split_k, x, values, metadata, bias, y, workspace, scales=None):
        x, values, metadata, bias, scales = spoil(x, values, metadata, bias, scales)
        right(self, tile, split_k, x, values, metadata, bias, y, workspace, scales)

    monkeypatch.setattr(PretendLibrary, "linear", wrong)
    assert not any(row["ok"] for row in rows(FP8_DTYPE) if "excess" in row)


def test_two_streams_without_an_order_fail(mocked, monkeypatch):
    """A product that is right on one stream only."""
    layer = gpu_products.random_layer(64, 64, torch.bfloat16)
    assert [row["ok"] for row in gpu_products.check_streams(CutlassKernel, layer, (1,)) if "ok" in row] == [True]
    right = PretendLibrary.linear

    def wrong(self, tile, split_k, x, values, metadata, bias, y, *rest):
        right(self, tile, split_k, x, values, metadata, bias, y, *rest)
        if MockStream.current is not None and len(MockStream.current.waited_for) > 2:
            y += 1

    monkeypatch.setattr(PretendLibrary, "linear", wrong)
    assert [row["ok"] for row in gpu_products.check_streams(CutlassKernel, layer, (1,)) if "ok" in row] == [False]


def broken_parts():
    def good():
        yield {"ok": True}

    def failing():
        yield {"ok": True}
        yield {"at": "the second step"}
        raise RiaError("CUDA refused: no reason")

    def crashing():
        yield {"at": "the first step"}
        os.abort()

    def hanging():
        yield {"ok": True}
        time.sleep(3600)

    steps = (good, failing, crashing, hanging, good)
    parts = [gpu_check.Part(step.__name__, "checks", step, silence=3) for step in steps]
    return [*parts, gpu_check.Part("concurrent", "concurrent", crashing, tries_limit=True)]


def test_the_other_parts_run_when_one_is_broken():
    rows = list(gpu_check.supervise(broken_parts, time.monotonic() + 3600))
    judged = [(index, row) for index, row in rows if "ok" in row]
    assert [(index, row["ok"]) for index, row in judged] == [
        *((0, True), (1, True), (1, False), (2, False), (3, True), (3, False), (4, True))
    ]
    failed = [row for _, row in judged if not row["ok"]]
    assert [row["at"] for row in failed] == ["the second step", "the first step", "its start"]
    assert rows[-1] == (5, {"part": "concurrent", "at": "the first step", "error": "the process ended with code -6"})
    for row, error in zip(failed, ("RiaError: CUDA refused: no reason", "ended with code -6", "no answer for 3 s")):
        assert error in row["error"]
