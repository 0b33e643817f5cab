"""Pruned experts that are not served, and why."""

from types import SimpleNamespace

import pytest
import torch
from moe_layers import EXPERTS, HIDDEN, INNER, LAYER, Model, StoredMoE, attached, play_rank, served
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import config as moe_config

from ria_vllm.checkpoint.folding import RowPermutation
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import INTEGERS
from ria_vllm.serve.model.layer_matching import match_layers

pytestmark = pytest.mark.usefixtures("ranks")
INT4_G64, INT4_G128 = INTEGERS[4, 64], INTEGERS[4, 128]


def stored_in(weight_format):
    return StoredMoE(weight_format=weight_format).config()


def elsewhere_permuted():
    """Permutations of another length than the layer reads."""
    stored = StoredMoE()
    for name in stored.permutations:
        stored.permutations[name] = torch.arange(HIDDEN + 4).int().numpy()
    return stored.config()


def differently_permuted():
    stored = StoredMoE()
    stored.permutations[f"{LAYER}.2.up_proj"] = stored.permutations[f"{LAYER}.2.up_proj"][::-1].copy()
    return stored.config()


def folded_from_elsewhere():
    config = StoredMoE().config()
    p = config.permutations[f"{LAYER}.0.down_proj"][::-1].copy()
    config.folding.row_permutations[f"{LAYER}.0.up_proj"] = [RowPermutation(p)]
    return config


def plain():
    return StoredMoE().config()


# What the refusal names; the configuration, vLLM's layer, this rank of all.
REFUSED = {
    "over 32 ranks leave 4 each": (plain, {"tp_size": 32}, (0, 32)),
    "a group of 64.*enable-expert-parallel": (lambda: stored_in(INT4_G64), {"tp_size": 4}, (0, 4)),
    "64 input channels .* int4-g128": (lambda: stored_in(INT4_G128), {"hidden_size": 64}, None),
    f"a permutation has {HIDDEN + 4} channels": (elsewhere_permuted, {}, None),
    "different permutations. .*ria-vllm export": (differently_permuted, {}, None),
    "0.up_proj: a fold permutes its rows": (folded_from_elsewhere, {}, None),
    f"{LAYER}.{EXPERTS}.up_proj is in none": (plain, {"num_experts": 2 * EXPERTS}, None),
    "but vLLM's layer has 2": (plain, {"num_experts": 2}, None),
    "swiglu_limit": (plain, {"swiglu_limit": 0.7, "activation": "gelu"}, None),
    "router's weights": (plain, {"apply_router_weight_on_input": True}, None),
}


@pytest.mark.parametrize("named", REFUSED)
def test_a_layer_that_cannot_be_served(monkeypatch, named):
    config, settings, rank = REFUSED[named]
    if rank:
        play_rank(monkeypatch, *rank)
    with pytest.raises(RiaError, match=named):
        Model(config(), **settings)


def with_lora(current):
    current.lora_config = LoRAConfig(max_lora_rank=8)


def with_experts_over_ranks(current):
    current.parallel_config.enable_expert_parallel = True


def with_moving_experts(current):
    current.parallel_config.enable_eplb = True


@pytest.mark.parametrize(
    ("option", "settings", "named"),
    [
        (with_lora, {}, "LoRA adapters on the experts"),
        (with_experts_over_ranks, {"tp_size": 8}, "over 8 ranks leave this one"),
        # vLLM gathers the tokens of all ranks after an expert's number was translated to this rank's.
        (with_experts_over_ranks, {"dp_size": 2}, "without --enable-expert-parallel"),
        # vLLM asks the method that the prefix has chosen, and moves whatever it is in pieces.
        (with_moving_experts, {"prefix": "not.the.path"}, "--enable-eplb"),
    ],
)
def test_options_of_the_engine_that_are_not_served(monkeypatch, option, settings, named):
    monkeypatch.setattr(moe_config, "get_dp_group", lambda: SimpleNamespace(rank_in_group=0), raising=False)
    play_rank(monkeypatch, settings.get("tp_size", 1) // 2, settings.get("tp_size", 1))
    option(current := VllmConfig())
    with set_current_vllm_config(current), pytest.raises(RiaError, match=named):
        match_layers(config := StoredMoE().config(), Model(config, **settings))


def test_experts_without_a_layer():
    config = plain()
    model = Model(config)
    model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(RiaError, match=f"{LAYER} would not be served"):
        attached(config, model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{LAYER}.3.down_proj.bitmask"), "3.down_proj.bitmask is in none"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.bitmask": torch.zeros(INNER, 4, dtype=torch.uint8)}), "needs"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.compressed": torch.zeros(INNER, 32, dtype=torch.int8)}), "int8"),
        (lambda t: t[f"{LAYER}.1.gate_proj.bitmask"].fill_(255), "gate_up: .*damaged"),
        (
            lambda t: t.update({f"{LAYER}.1.gate_proj.bias": torch.zeros(INNER)}),
            "1.gate_proj.bias: .* experts stored as",
        ),
    ],
)
def test_damaged_tensors(change, message):
    stored = StoredMoE()
    config = stored.config()
    change(stored.tensors)
    model = attached(config, Model(config))
    with pytest.raises(RiaError, match=message):
        model.load_weights(iter(stored.tensors.items()))
        model.experts.quant_method.process_weights_after_loading(model.experts)


def test_biases_of_the_wrong_shape():
    stored = StoredMoE(bias=True)
    stored.tensors[f"{LAYER}.gate_up_proj_bias"] = torch.zeros(EXPERTS, INNER)
    with pytest.raises(RiaError, match="gate_up_proj_bias"):
        served(stored, activation="swigluoai", has_bias=True)
