"""Which linears vLLM serves dense only, and of which families it rearranges rows."""

import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from decoders import layers_of, small
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.offline.model.run.architecture import decoder_layers
from ria_vllm.offline.model.topology import linears_of
from ria_vllm.vllm_quirks import FUSED, fused_sets, rearranged, served_dense

MOES = (
    "afmoe", "aria_text", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling_text", "jamba", "jetmoe",
    "kimi_linear", "laguna", "lfm2_moe", "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open",
)  # fmt: skip
EXPERTS = 6


def small_moe(model_type: str):
    """A model of three layers on the meta device. Only its routers are as wide as the number of its experts."""
    config = AutoConfig.for_model(model_type)
    settings = {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
        "moe_intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "n_group": 1, "topk_group": 1,
        "enable_moe_block": True, "n_shared_experts": 1, "num_experts_per_tok": 2, "top_k_experts": 2,
        "first_k_dense_replace": 1, "num_dense_layers": 1, "pad_token_id": 0,
        "linear_num_value_heads": 16, "attn_layer_period": 2, "attn_layer_offset": 1,
    } | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)  # fmt: skip
    settings = {name: value for name, value in settings.items() if hasattr(config, name)}
    if model_type == "nemotron_h":
        settings["layers_block_type"] = ["mamba", "attention", "moe"]
    if model_type == "hunyuan_v1_moe":
        settings["head_dim"] = 32
    kinds = ["conv", "full_attention"] if model_type.startswith("lfm2") else getattr(config, "layer_types", None)
    if kinds and model_type != "jamba":
        settings["layer_types"] = (list(dict.fromkeys(kinds)) * 3)[:3]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


@pytest.mark.parametrize("model_type", MOES)
def test_routers_stay_dense_in_every_moe(model_type):
    """Whatever they are called: they are the linears with one output per expert, or one for the shared expert."""
    model = small_moe(model_type)
    found = 0
    for layer in model.get_submodule(decoder_layers(model, model.config.num_hidden_layers)):
        widths = {
            name: module.out_features for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)
        }
        routers = {name for name, width in widths.items() if width in (1, EXPERTS)}
        assert routers <= set(served_dense(layer)), routers
        projections = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_b_proj")
        attention = {name for name in widths if name.rpartition(".")[2] in projections}
        assert not attention & set(served_dense(layer))
        found += any("expert" in name for name, _ in layer.named_parameters())
    assert found


def test_linears_of_a_mamba_1_mixer():
    layer = layers_of(small("mamba", state_size=8))[0]
    dense = served_dense(layer)
    assert set(dense) == set(linears_of(layer)) and all("Mamba-1" in why for why in dense.values())


def test_shared_experts_and_what_is_beside_experts_are_not_dense():
    layer = layers_of(small("qwen2_moe"))[0]
    assert set(served_dense(layer)) == {"mlp.shared_expert_gate"}
    assert {"mlp.shared_expert.down_proj", "self_attn.o_proj"} <= set(linears_of(layer))
    layer = layers_of(
        small("gemma4_text", enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
    )[0]
    assert hasattr(layer, "experts") and set(served_dense(layer)) == {"router.proj"}


def test_the_tiny_linears_of_alternating_updates():
    altup = {"num_hidden_layers": 2, "intermediate_size": [96] * 2, "activation_sparsity_pattern": [0.0] * 2}
    altup |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
    layer = layers_of(small("gemma3n_text", **altup))[0]
    widths = {name for name in linears_of(layer) if 4 in layer.get_submodule(name).weight.shape}
    assert set(served_dense(layer)) == widths and len(widths) == 3


def test_rearranged_rows_are_expected_of_a_decoder_behind_a_wrapper_too():
    wrapper = SimpleNamespace(model_type="a wrapper", text_config=SimpleNamespace(model_type="llama4_text"))
    assert rearranged(SimpleNamespace(model_type="bloom")) and rearranged(wrapper)
    assert not rearranged(SimpleNamespace(model_type="llama")) and not rearranged(None)


@pytest.mark.skipif(find_spec("vllm") is None, reason="reads vLLM's models")
def test_what_is_fused_is_what_vllm_says():
    """In the mapping of Llama, which is lists of names in its source."""
    folder = Path(find_spec("vllm").origin).parent / "model_executor" / "models"
    found = set()
    for node in ast.walk(ast.parse((folder / "llama.py").read_text())):
        if isinstance(node, ast.List) and all(isinstance(one, ast.Constant) for one in node.elts):
            found.add(tuple(one.value for one in node.elts))
    assert set(FUSED) <= found


def test_fused_sets_are_those_of_the_modules_that_are_there():
    found = fused_sets(["layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "q_proj"])
    assert {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"} in found and {"q_proj", "k_proj", "v_proj"} in found
    assert not any("layers.0.q_proj" in one for one in found)
