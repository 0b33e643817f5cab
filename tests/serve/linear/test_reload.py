"""Reloads, layer by layer as vLLM does them. Afterwards a layer computes with the new weights, or the reload failed."""

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors_layers import Checkpoint
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError
from ria_vllm.serve.model.config import RiaConfig

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


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_no_longer_two_of_four_are_refused(first):
    """Also the other way round: a layer that is served dense stays dense."""
    checkpoint = Checkpoint(dense=True)
    layer, linears = fused(checkpoint)
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    checkpoint.load(layer, linears, two_of_four=first)
    with pytest.raises(RiaError, match="gate_up: .*Start a server of the new weights"):
        reload(model, lambda: checkpoint.stream(layer, linears, seed=1, two_of_four=not first))


FOUR_BITS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def in_groups(form, group_size, scales=None):
    config = RiaConfig.from_config(
        {
            "quant_method": "compressed-tensors", "format": form,
            "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]},
            "config_groups": {"0": {"targets": ["Linear"], "weights": FOUR_BITS | {"group_size": group_size}}},
        }
    )  # fmt: skip
    config.scale_dtypes = {} if scales is None else {"fc": scales}
    layer = ReplicatedLinear(
        256, 64, bias=False, quant_config=config, prefix="fc", params_dtype=torch.bfloat16, return_bias=False
    )
    model = torch.nn.Sequential(layer)
    record_metadata_for_reloading(model)
    for parameter in layer.parameters():
        parameter.data = torch.randint(0, 100, parameter.shape).to(parameter.dtype)
    return model, config


def stream_packed(model, config, tensors):
    for name, tensor in config.translation.translate([(f"fc.{n}", t) for n, t in tensors.items()], whole=True):
        parameter = getattr(model[0], name.removeprefix("fc."))
        parameter.weight_loader(parameter, tensor)


@pytest.fixture
def dummies(ranks):
    get_current_vllm_config().load_config.load_format = "dummy"


@pytest.mark.parametrize("files", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("real", [torch.bfloat16, torch.float32])
def test_dummies_whose_scales_cannot_hold_the_real_ones_are_refused(dummies, monkeypatch, files, real):
    """They have the dtype of those in the files. torch would round real ones as it copies them.

    (The packed bytes of the CPU kernel say what they hold.)
    """
    monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    model, config = in_groups("pack-quantized", 64, files)
    model[0].quant_method.process_weights_after_loading(model[0])
    words = torch.full((64, 32), 0x8F858F85 - 2**32, dtype=torch.int32)  # -3, 0, 7, 0 and again
    stored = {"weight_packed": words, "weight_scale": torch.ones(64, 4, dtype=real)}
    if real == files:
        reload(model, lambda: stream_packed(model, config, stored))
        return
    with pytest.raises(RiaError, match=r"fc: its new weights are packed as .*, unlike those .*Start a server"):
        reload(model, lambda: stream_packed(model, config, stored))
