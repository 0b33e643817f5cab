"""Reloads, layer by layer as vLLM does them. Afterwards a layer computes with the new weights, or the reload failed."""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors_layers import BY_TENSOR, BY_TOKEN, FLOAT, INT, Checkpoint
from stored import Stored
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError

pytestmark = pytest.mark.usefixtures("ranks")


def reload(model, stream):
    initialize_layerwise_reload(model)
    stream()
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def fused(checkpoint, dtype=torch.float32):
    layer = MergedColumnParallelLinear(
        128, [64, 32], bias=False, quant_config=checkpoint.config(), prefix="gate_up", params_dtype=dtype,
        return_bias=False,
    )  # fmt: skip
    return layer, {"gate": (0, 64), "up": (1, 32)}


def check(layer, checkpoint, dtype=torch.float32):
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(7)).to(dtype)
    plain = torch.cat([checkpoint.plain["gate"], checkpoint.plain["up"]])
    torch.testing.assert_close(layer(x).double(), x.double() @ plain.T, rtol=2e-6, atol=2e-5)


QUANTIZED = pytest.mark.parametrize(
    "quantized",
    [
        {"weights": FLOAT, "inputs": BY_TOKEN},
        {"weights": FLOAT, "inputs": BY_TENSOR, "strategy": "tensor"},
        {"weights": INT, "inputs": INT},
        {"weights": INT, "inputs": INT, "strategy": "tensor"},
    ],
)


@QUANTIZED
@pytest.mark.parametrize(("dense", "two_of_four"), [(True, True), (True, False), (False, True)])
def test_quantized_weights_are_scaled_again(quantized, dense, two_of_four):
    checkpoint = Checkpoint(dense=dense, **quantized)
    layer, linears = fused(checkpoint)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    check(checkpoint.load(layer, linears, two_of_four=two_of_four), checkpoint)
    for seed in (1, 2):
        reload(model, lambda: checkpoint.stream(layer, linears, seed=seed, two_of_four=two_of_four))
        check(layer, checkpoint)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_no_longer_two_of_four_are_refused(first):
    """Also the other way round: a layer that is served dense stays dense."""
    checkpoint = Checkpoint(dense=True)
    layer, linears = fused(checkpoint)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    checkpoint.load(layer, linears, two_of_four=first)
    with pytest.raises(RiaError, match="gate_up: .*Start the server again"):
        reload(model, lambda: checkpoint.stream(layer, linears, seed=1, two_of_four=not first))


def test_the_report_counts_a_layer_once():
    checkpoint = Checkpoint(dense=True)
    config = checkpoint.config()
    layers = [
        ReplicatedLinear(128, 64, bias=False, quant_config=config, prefix=name, params_dtype=torch.float32)
        for name in ("fc", "gc")
    ]
    model = torch.nn.Sequential(*layers)
    record_metadata_for_reloading(model)
    checkpoint.load(layers[0], {"fc": (None, 64)}, two_of_four=False)
    checkpoint.load(layers[1], {"gc": (None, 64)})
    first = (config.report.expected, config.report.loaded, config.report.graph)
    assert first[:2] == (1, 1)

    def stream():
        checkpoint.stream(layers[1], {"gc": (None, 64)}, seed=1)
        checkpoint.stream(layers[0], {"fc": (None, 64)}, seed=1, two_of_four=False)

    reload(model, stream)
    assert (config.report.expected, config.report.loaded, config.report.graph) == first


def test_processing_twice_changes_nothing():
    checkpoint = Checkpoint(dense=True)
    layer, linears = fused(checkpoint)
    checkpoint.load(layer, linears, two_of_four=False)
    layer.quant_method.process_weights_after_loading(layer)
    check(layer, checkpoint)


def test_a_reload_that_lacks_a_tensor_is_refused():
    first, other = Stored(), Stored(seed=1)
    for stored in (first, other):
        stored.add("fc", 64, 128)
    layer = ReplicatedLinear(128, 64, quant_config=first.config(), prefix="fc", return_bias=False)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    x = torch.randn(3, 128)

    def stream(stored, *parts):
        for part in parts:
            getattr(layer, part).weight_loader(getattr(layer, part), stored.tensors["fc"][part])

    def stream_all(stored):
        stream(stored, *stored.tensors["fc"])
        layer.bias.weight_loader(layer.bias, stored.bias["fc"])

    first.load(layer, {"fc": None})
    torch.testing.assert_close(layer(x).double(), first.apply(x, "fc"), rtol=0, atol=2e-5)
    reload(model, lambda: stream_all(other))
    torch.testing.assert_close(layer(x).double(), other.apply(x, "fc"), rtol=0, atol=2e-5)
    with pytest.raises(RiaError, match=r"fc\.compressed is in none of the weight files"):
        reload(model, lambda: stream(first, "bitmask"))
