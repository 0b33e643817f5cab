"""What is known about architectures: shared inputs, folds, and linears that stay dense."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.topology import Sublayer, Topology, decoder_layers, describe, linears_of, served_dense


def layer_and_inputs(folder):
    """A real forward pass of layer 0, and the tensor that each linear read in it."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = model.get_submodule(decoder_layers(model, model.config.num_hidden_layers))[0]
    seen = []
    for name in linears_of(layer):
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model, layer, [(name, id(x)) for name, x in seen], seen


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt-postnorm"]
)
def test_groups_share_an_input(family, tiny):
    model, layer, inputs, seen = layer_and_inputs(tiny(family))
    topology = describe(model.config, layer, inputs)
    assert topology.folds and sorted(topology.linears) == sorted(linears_of(layer))
    tensors = dict(seen)
    for sublayer in topology.sublayers:
        for group in (group for stage in sublayer.stages for group in stage):
            assert all(tensors[name] is tensors[group.linears[0]] for name in group.linears)
            if group.heads is not None:
                assert tensors[group.linears[0]].shape[-1] == group.heads.num_heads * group.heads.head_dim


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "opt", "opt-postnorm"])
def test_a_fold_changes_nothing(family, tiny):
    """Rows of the producers in the consumer's order, and its columns with them: the model's logits stay the same."""
    from ria_vllm.permutation import head_rows

    model, layer, inputs, _ = layer_and_inputs(tiny(family))
    model.double()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        for fold in describe(model.config, layer, inputs).folds:
            consumer = layer.get_submodule(fold.consumer)
            if fold.coupling == "heads":
                share = fold.num_heads // fold.num_kv_heads
                width = consumer.in_features // fold.num_heads
                inner = [torch.randperm(width) for _ in range(fold.num_kv_heads)]
                p = torch.cat([head * width + inner[head // share] for head in range(fold.num_heads)])
                rows = head_rows(p, fold.num_heads, fold.num_kv_heads)
            else:
                p = rows = torch.randperm(consumer.in_features)
            consumer.weight.copy_(consumer.weight[:, p])
            for producer in fold.producers:
                linear = layer.get_submodule(producer.name)
                start, stop = producer.rows or (0, linear.out_features)
                for part in (linear.weight, linear.bias):
                    if part is not None:
                        part[start:stop] = part[start:stop][rows]
        assert not torch.equal(p, torch.arange(len(p)))
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-9, atol=1e-9)


def test_an_unknown_family_groups_by_the_tensor_that_is_read(tiny):
    model, layer, inputs, _ = layer_and_inputs(tiny("llama"))
    model.config.model_type = "unheard-of"
    topology = describe(model.config, layer, inputs)
    groups = [group.linears for group in topology.sublayers[0].stages[0]]
    assert groups == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    assert topology.folds == ()


def test_linears_of_a_mamba_1_mixer(tiny):
    """vLLM's Mamba-1 mixer passes no quantization method on."""
    model, layer, inputs, _ = layer_and_inputs(tiny("mamba"))
    topology = describe(model.config, layer, inputs)
    assert not topology.linears and set(topology.dense) == set(linears_of(layer))
    assert all("Mamba-1" in reason for reason in topology.dense.values())


def test_experts_stay_dense(tiny):
    model, layer, inputs, _ = layer_and_inputs(tiny("qwen3-moe"))
    assert all(name.startswith("self_attn.") for name in describe(model.config, layer, inputs).linears)


def test_experts_at_the_root_of_a_layer_do_not_keep_the_rest_dense(tiny):
    model, layer, inputs, _ = layer_and_inputs(tiny("gemma4-moe"))
    assert hasattr(layer, "experts") and hasattr(layer, "router")
    topology = describe(model.config, layer, inputs)
    assert set(topology.linears) == {
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    }
    assert set(topology.dense) == {name for name in linears_of(layer) if name.startswith("router.")} != set()


MIXTURES = (
    "afmoe", "aria_text", "axk1", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling_text", "jamba", "jetmoe",
    "kimi_linear", "laguna", "lfm2_moe", "llama4_text", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "solar_open",
)  # fmt: skip
EXPERTS = 6


def small_mixture(model_type: str):
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


@pytest.mark.parametrize("model_type", MIXTURES)
def test_routers_stay_dense_in_every_mixture_of_experts(model_type):
    """Whatever they are called: they are the linears with one output per expert, or one for the shared expert."""
    model = small_mixture(model_type)
    found = 0
    for layer in model.get_submodule(decoder_layers(model, model.config.num_hidden_layers)):
        widths = {
            name: module.out_features for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)
        }
        routers = {name for name, width in widths.items() if width in (1, EXPERTS)}
        assert routers <= set(served_dense(layer)), routers
        attention = {name for name in widths if name.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj")}
        assert not attention & set(served_dense(layer))
        found += any("expert" in name for name, _ in layer.named_parameters())
    assert found


@pytest.mark.parametrize(
    ("family", "together"),
    [
        ("lfm2", ["feed_forward.w1 feed_forward.w3", "feed_forward.w2", "conv.in_proj", "conv.out_proj"]),
        (
            "qwen3.5",
            [
                " ".join(f"linear_attn.in_proj_{x}" for x in ("qkv", "z", "a", "b")), "linear_attn.out_proj",
                "mlp.gate_proj mlp.up_proj", "mlp.down_proj",
            ],
        ),
        (
            "deepseek-v3",
            [
                "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa", "self_attn.q_b_proj", "self_attn.o_proj",
                "mlp.gate_proj mlp.up_proj", "mlp.down_proj",
            ],
        ),
    ],
)  # fmt: skip
def test_what_reads_the_same_tensor_in_one_module_stays_together(family, together, tiny):
    model, layer, inputs, _ = layer_and_inputs(tiny(family))
    topology = describe(model.config, layer, inputs)
    found = {frozenset(topology.fused_with(name, linears_of(layer))) for name in topology.linears}
    assert found == {frozenset(names.split()) for names in together}


def test_modules_that_read_the_same_tensor_are_independent(tiny):
    """In a layer with parallel attention and MLP, linears are fused within a module, never across two."""
    model, layer, _, _ = layer_and_inputs(tiny("gpt-neox"))
    one = [(name, 1) for name in linears_of(layer)]
    topology = describe(model.config, layer, one)
    assert topology.fused_with("attention.dense", linears_of(layer)) == ["attention.query_key_value", "attention.dense"]


def test_a_linear_that_is_called_twice_is_in_one_group(tiny):
    """Such as Gemma 3n's router of its streams. In two groups its statistics would never be complete."""
    model, layer, inputs, _ = layer_and_inputs(tiny("gpt-neox"))
    topology = describe(model.config, layer, [*inputs, ("attention.dense", 7), ("mlp.dense_4h_to_h", 7)])
    assert topology == describe(model.config, layer, inputs) and len(topology.linears) == 4


def test_overlapping_sets_are_one():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.b_proj", "a.o_proj", "c.q_proj"]
    topology = Topology((Sublayer("layer", ()),), together=(frozenset(("a.v_proj", "a.b_proj")),))
    for name in names[:4]:
        assert topology.fused_with(name, names) == names[:4]
    assert topology.fused_with("c.q_proj", names) == ["c.q_proj"]


def test_no_layers_with_linears():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(RiaError, match="Conv1D"):
        decoder_layers(model, 1)


def test_fused_linears_of_one_layer_only():
    names = [f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"]
    topology = Topology((Sublayer("layer", ()),))
    assert topology.fused_with("layers.1.self_attn.k_proj", names) == [f"layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert topology.fused_with("layers.1.self_attn.o_proj", names) == ["layers.1.self_attn.o_proj"]
