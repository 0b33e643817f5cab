"""The experts of compressed-tensors' checkpoints: plain ones are left to vLLM, all others refused by name."""

import logging

import pytest
from moe_layers import Model

from ria_vllm.errors import RiaError
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.names import plain_experts
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers

LAYER = "model.layers.1.mlp.experts"
GATED = ("gate_proj", "up_proj", "down_proj")
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def tensors(parts, ends=GATED, count=4, layer=LAYER):
    return [f"{layer}.{e}.{end}.{part}" for e in range(count) for end in ends for part in parts]


def read(names, form="dense", weights=None, ignore=()):
    of_all = {"targets": ["Linear"], "weights": weights, "format": form}
    config = RiaConfig.from_config({
        "quant_method": "compressed-tensors", "format": form, "ignore": list(ignore),
        "config_groups": {} if weights is None else {"group_0": of_all},
        "sparsity_config": {
            "format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": list(ignore),
        },
    })  # fmt: skip
    config._read_names(names)
    return config


@pytest.mark.parametrize(
    ("ends", "kinds"),
    [
        (("w1", "w2", "w3"), {"gate": "w1", "up": "w3", "down": "w2"}),
        (("up_proj", "down_proj"), {"up": "up_proj", "down": "down_proj"}),
    ],
)
def test_what_the_linears_of_an_expert_are_called(ends, kinds):
    modules = [name.removesuffix(".weight") for name in tensors(["weight"], ends)]
    (experts,) = plain_experts([*modules, "model.layers.1.mlp.gate"]).values()
    assert (experts.name, experts.num_experts, experts.biases) == (LAYER, 4, {})
    assert {kind: experts.linear(kind, 3) for kind in experts.patterns} == {
        kind: f"{LAYER}.3.{end}" for kind, end in kinds.items()
    }
    assert plain_experts(modules[:-1]) == plain_experts([f"{LAYER}.999999.{end}" for end in ends]) == {}


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (tensors(["weight"]), {"ignore": ["re:.*experts.*"], "form": "int-quantized", "weights": INT8}, False),
        (tensors(["weight"]), {}, True),
        ([f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj_bias"], {}, False),
    ],
)
def test_what_is_left_to_vllm(ranks, names, settings, said, caplog, monkeypatch):
    """Also by a layer that gets the numbers of a rank's experts right, see test_dense.py."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = read(names, **settings)
    assert config.experts == {} and ("served dense" in caplog.text) == said
    config.packed_modules_mapping = {}
    model = Model(config)
    match_layers(config, model)
    assert type(model.experts.quant_method) is DenseExpertsMethod


@pytest.mark.parametrize(
    "name",
    [
        *(f"{LAYER}.0.gate_proj.{part}" for part in ("bitmask", "weight_packed", "weight_scale", "weight_zero_point")),
        f"{LAYER}.w2_weight_scale",
    ],
)
def test_what_is_refused(name):
    with pytest.raises(RiaError, match=f"{name}: experts that another program has pruned or quantized are not served"):
        read([*tensors(["weight"]), name], form="int-quantized", weights=INT8)
