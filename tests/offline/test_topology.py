"""What the pipeline knows of architectures, and which linears a plan leaves dense."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ria_vllm.errors import RiaError
from ria_vllm.offline.plan import most_sensitive
from ria_vllm.offline.topology import decoder_layers, describe, fused_with, linears_of


def layer_and_inputs(folder):
    """A real forward pass of layer 0, and which tensor each linear read in it."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = model.get_submodule(decoder_layers(model, model.config.num_hidden_layers))[0]
    seen = []
    for name in linears_of(layer):
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0])))
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model, layer, [(name, id(x)) for name, x in seen], seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt", "opt-postnorm"])
def test_what_is_said_to_share_an_input_does(family, tiny):
    model, layer, inputs, seen = layer_and_inputs(tiny(family))
    topology = describe(model.config, layer, inputs)
    assert topology.folds and sorted(topology.linears) == sorted(linears_of(layer))
    tensors = {name: x for name, x in seen}
    for component in topology.components:
        for group in (group for stage in component.stages for group in stage):
            assert all(tensors[name] is tensors[group.linears[0]] for name in group.linears)
            if group.heads is not None:
                assert tensors[group.linears[0]].shape[-1] == group.heads.num_heads * group.heads.head_dim


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "opt", "opt-postnorm"])
def test_a_fold_changes_nothing(family, tiny):
    """Rows of the producers in the consumer's order, and its columns with them: the same output of the layer."""
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
    groups = [group.linears for group in topology.components[0].stages[0]]
    assert groups == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    assert topology.folds == ()


def test_linears_that_vllm_serves_dense_only(tiny):
    """vLLM's Mamba-1 mixer passes no quantization method on."""
    model, layer, inputs, _ = layer_and_inputs(tiny("mamba"))
    topology = describe(model.config, layer, inputs)
    assert not topology.linears and set(topology.dense) == set(linears_of(layer))
    assert all("Mamba-1" in reason for reason in topology.dense.values())


def test_experts_stay_dense(tiny):
    model, layer, inputs, _ = layer_and_inputs(tiny("qwen3-moe"))
    assert all(name.startswith("self_attn.") for name in describe(model.config, layer, inputs).linears)


def test_no_layers_with_linears():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(RiaError, match="Conv1D"):
        decoder_layers(model, 1)


def test_fused_linears_of_one_layer_only():
    names = [f"layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"]
    assert fused_with("layers.1.self_attn.k_proj", names) == [f"layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert fused_with("layers.1.self_attn.o_proj", names) == ["layers.1.self_attn.o_proj"]


def test_the_most_sensitive_are_those_that_lose_most_for_a_byte():
    records = {
        "a.q_proj": {"shape": [10, 10], "error_after": 0.3},
        "a.k_proj": {"shape": [10, 10], "error_after": 0.1},
        "a.o_proj": {"shape": [10, 10], "error_after": 0.25},
        "a.down_proj": {"shape": [20, 10], "error_after": 0.9},
        "b.down_proj": {"shape": [10, 10], "error_after": 0.01},
    }
    # Of 600 weights: q and k lose 0.1 / 200, o 0.0625 / 100, the first down_proj 0.81 / 200.
    assert most_sensitive(records, 0.4) == ["a.down_proj"]
    assert most_sensitive(records, 0.5) == ["a.down_proj", "a.o_proj"]
    assert most_sensitive(records, 0.3) == ["a.o_proj"]
    assert most_sensitive(records, 0.1) == []
