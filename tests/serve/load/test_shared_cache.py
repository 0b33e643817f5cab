"""Engines whose KV cache others read keep keys and values in the model's own order, whatever else they fold."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from checkpoint_folder import config_of
from tiny import logits
from transformers import Gemma4TextConfig, LlamaConfig
from vllm.config import KVTransferConfig, LoRAConfig, get_current_vllm_config

from ria_vllm.checkpoint.reader import Reader

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.1"
DOWN, O_PROJ = f"{LAYER}.mlp.down_proj", f"{LAYER}.self_attn.o_proj"


def transfer(current):
    current.kv_transfer_config = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def nothing(current):
    pass


def adapters(current):
    current.lora_config = LoRAConfig(max_lora_rank=8)


def draft(model_type):
    def option(current):
        target = SimpleNamespace(hf_config=Gemma4TextConfig(num_hidden_layers=2))
        current.speculative_config = SimpleNamespace(
            draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type)),
            target_model_config=target,
        )

    return option


def linears(folder, **settings):
    """Name -> how vLLM's layers take the linears of layer 1 under the current configuration."""
    config = config_of(folder)
    config.packed_modules_mapping = PACKED
    config.one_head = settings.get("one_head", False)
    paths = [
        f"{LAYER}.{leaf}" for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    methods = [config.sparse_method(path, config.linears_of(path)) for path in paths]
    return {one.name: one for method in methods for one in method.linears}


@pytest.mark.parametrize(
    ("options", "folded"),
    [([nothing], {DOWN, O_PROJ}), ([transfer], {DOWN}), ([adapters, transfer], set()), ([draft("gemma4_mtp")], {DOWN})],
)
def test_what_is_folded(options, folded, engine, checkpoint):
    for option in options:
        option(get_current_vllm_config())
    found = linears(checkpoint)
    assert {name for name, one in found.items() if one.folded} == folded
    reordered = {name.rpartition(".")[2] for name, one in found.items() if one.row_orders}
    producers = {DOWN: {"gate_proj", "up_proj"}, O_PROJ: {"v_proj"}}
    assert reordered == set().union(*(producers[name] for name in folded))
    assert (found[O_PROJ].input_permutation is None) == (O_PROJ in folded)


def test_a_single_head(engine, checkpoint):
    """Nothing tells a fold through its attention from one through an MLP."""
    transfer(get_current_vllm_config())
    assert not any(one.folded or one.row_orders for one in linears(checkpoint, one_head=True).values())
    for heads in (1, 4):
        config = config_of(checkpoint)
        config.maybe_update_config(str(checkpoint), LlamaConfig(num_attention_heads=heads, num_key_value_heads=1))
        assert config.one_head == (heads == 1)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt-neox"])
def test_values_are_those_of_the_dense_model(family, tmp_path):
    """What attention reads, and what the model says, in float64 on Hugging Face's modules."""
    model = tiny.write(tiny.FAMILIES[family], tmp_path).double()
    read = []
    want = logits(model)
    folding = config_of(tmp_path).folding
    reader = Reader(tmp_path)
    changed = tiny.model_of(tiny.FAMILIES[family]).double()
    changed.load_state_dict(model.state_dict())
    kind = tiny.FAMILIES[family]
    values = [kind.block.format(i=layer) + kind.value[0] for layer in range(2)]
    for name, linear in tiny.linears(changed).items():
        if name not in reader.sparse_names:
            continue
        stored = reader.linear(name)
        weight = stored.stored() if name in folding.outside_attention.folded else stored.dense()
        for order in folding.outside_attention.row_orders.get(name, []):
            weight = order.take(weight)
            if linear.bias is not None:
                linear.bias.data = order.take(linear.bias.data)
        if name in values:
            read.append(torch.equal(weight.double(), model.get_submodule(name).weight))
        linear.weight.data = weight.double()
    assert read == [True, True]
    assert set(values) <= set(folding.row_orders)
    torch.testing.assert_close(logits(changed), want, rtol=0, atol=1e-11)
