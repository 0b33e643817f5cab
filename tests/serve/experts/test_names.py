"""The experts of compressed-tensors' checkpoints, found by the names of tensors, or refused by name."""

import pickle

import pytest
from mixture_layers import Model

from ria_vllm.errors import RiaError
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers

LAYER = "model.layers.1.mlp.experts"
GATED = ("gate_proj", "up_proj", "down_proj")
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
MARLIN = ("weight_packed", "scale_packed", "meta")
BITMASK = ("compressed", "bitmask", "shape")


def tensors(parts, ends=GATED, count=4, layer=LAYER):
    return [f"{layer}.{e}.{end}.{part}" for e in range(count) for end in ends for part in parts]


def read(names, form="dense", sparse="dense", weights=None, ignore=(), groups=None):
    of_all = {"targets": ["Linear"], "weights": weights, "format": form}
    config = RiaConfig.from_config({
        "quant_method": "compressed-tensors", "format": form, "ignore": list(ignore),
        "config_groups": groups or ({} if weights is None else {"group_0": of_all}),
        "sparsity_config": {
            "format": sparse, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": list(ignore),
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
    config = read([*tensors(BITMASK, ends), "model.layers.1.mlp.gate.weight"], sparse="sparse-24-bitmask")
    (experts,) = config.experts.values()
    assert (experts.name, experts.num_experts, experts.biases, experts.claims_24) == (LAYER, 4, {}, True)
    assert {kind: experts.linear(kind, 3) for kind in experts.patterns} == {
        kind: f"{LAYER}.3.{end}" for kind, end in kinds.items()
    }
    assert config.expert_linears == {f"{LAYER}.{e}.{end}" for e in range(4) for end in ends} == config.required
    assert not config.scheme(f"{LAYER}.3.{ends[0]}").dense


@pytest.mark.parametrize(
    ("form", "sparse", "weights", "parts", "of"),
    [
        ("dense", "dense", None, ["weight"], ("float", True)),
        ("int-quantized", "sparse-24-bitmask", INT8, [*BITMASK, "weight_scale"], ("int8", False)),
        ("marlin-24", "dense", INT8, MARLIN, ("int8", False)),
    ],
)
def test_how_they_are_stored(form, sparse, weights, parts, of):
    config = pickle.loads(pickle.dumps(read(tensors(parts), form, sparse, weights)))
    scheme = config.scheme(config.experts[LAYER].linear("up", 0))
    assert (scheme.format.name, scheme.dense) == of


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (tensors(["weight"]), {"ignore": ["re:.*experts.*"], "form": "int-quantized", "weights": INT8}),
        ([f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj", f"{LAYER}.gate_up_proj_bias"], {}),
    ],
)
def test_what_is_left_to_vllm(ranks, names, settings):
    """Also by a layer that gets the numbers of a rank's experts right, see test_dense.py."""
    config = read(names, **settings)
    assert config.experts == {}
    config.packed_modules_mapping = {}
    model = Model(config)
    match_layers(config, model)
    assert type(model.experts.quant_method) is DenseExpertsMethod


def mixed(end, weights, parts):
    """int8 in all linears but one of an expert."""
    others = [name for name in tensors(["weight", "weight_scale"]) if f".2.{end}." not in name]
    groups = {
        "group_0": {"targets": ["Linear"], "weights": INT8, "format": "int-quantized"},
        "group_1": {"targets": [f"re:.*2.{end}"], **weights},
    }
    return [*others, *(f"{LAYER}.2.{end}.{part}" for part in parts)], {"groups": groups, "form": "mixed-precision"}


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        mixed("up_proj", {"weights": INT4, "format": "pack-quantized"}, ["weight_packed", "weight_scale"]),
        (tensors(["weight", "weight_scale"]), {
            "form": "int-quantized", "weights": INT8, "ignore": ["re:.*2.up_proj"]}),
        ([*tensors(BITMASK, GATED[:2]), *tensors(["weight"], GATED[2:])], {"sparse": "sparse-24-bitmask"})
    ],
)  # fmt: skip
def test_experts_that_are_not_stored_alike(names, settings):
    with pytest.raises(RiaError, match=rf"{LAYER}: the linears of a layer's experts must be stored alike, but {LAYER}"):
        read(names, **settings)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (tensors(BITMASK, ["gate_up_proj", "down_proj"]), {"sparse": "sparse-24-bitmask"},
         f"{LAYER}: experts of down_proj and gate_up_proj are not served, only of gate_proj and up_proj and"),
        (tensors(BITMASK, GATED[:2]), {"sparse": "sparse-24-bitmask"}, f"{LAYER}: experts of gate_proj and up_proj"),
        (tensors(BITMASK)[:-3], {"sparse": "sparse-24-bitmask"}, f"{LAYER}.3.down_proj is in none of the weight files"),
        (tensors(["weight"], count=2) + tensors(["weight"], layer=LAYER)[9:], {}, f"{LAYER}.2.gate_proj is in none"),
        ([f"{LAYER}.999999.{end}.weight" for end in GATED], {}, f"{LAYER}.0.gate_proj is in none"),
        (tensors(["weight", "weight_scale"]), {}, f"{LAYER}.0.gate_proj.weight_scale: .*quantization_config says noth"),
        (tensors(["weight", "weight_scale"]), {"ignore": ["re:.*experts.*"], "form": "int-quantized", "weights": INT8},
         f"{LAYER}.0.gate_proj.weight_scale: .*config says nothing"),
        (tensors(MARLIN), {"ignore": ["re:.*experts.*"], "form": "marlin-24", "weights": INT8}, "no group of config"),
        ([*tensors(["weight"]), f"{LAYER}.w2_weight_scale"], {"weights": INT8, "form": "int-quantized"},
         f"{LAYER}.w2_weight_scale: .*this one holds several"),
    ],
)  # fmt: skip
def test_what_is_refused(names, settings, message):
    with pytest.raises(RiaError, match=message):
        read(names, **settings)
