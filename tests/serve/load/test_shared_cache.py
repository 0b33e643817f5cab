"""What is folded for engines that serve adapters, or whose KV cache others read."""

from types import SimpleNamespace

import pytest
from checkpoint_folder import config_of
from vllm.config import KVTransferConfig, LoRAConfig, get_current_vllm_config

from ria_vllm.errors import RiaError

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.1"
PATHS = [f"{LAYER}.{leaf}" for leaf in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")]


def transfer(current):
    current.kv_transfer_config = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def nothing(current):
    pass


def adapters(current):
    current.lora_config = LoRAConfig(max_lora_rank=8)


@pytest.mark.parametrize(("option", "folded"), [(nothing, True), (transfer, False), (adapters, False)])
def test_what_is_folded(option, folded, engine, checkpoint):
    option(get_current_vllm_config())
    config = config_of(checkpoint)
    config.packed_modules_mapping = PACKED
    methods = [config.sparse_method(path, config.linears_of(path)) for path in PATHS]
    linears = {one.name.removeprefix(f"{LAYER}."): one for method in methods for one in method.linears}
    consumers = {"self_attn.o_proj", "mlp.down_proj"} if folded else set()
    producers = {"self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"} if folded else set()
    assert {name for name, one in linears.items() if one.folded} == consumers
    assert {name for name, one in linears.items() if one.row_permutations} == producers


def test_a_draft_that_reads_its_targets_cache_is_refused(engine, checkpoint):
    """Gemma 4's attends to keys and values that its target keeps."""
    from vllm.model_executor.layers.linear import LinearBase

    layer, config = object.__new__(LinearBase), config_of(checkpoint)
    draft = SimpleNamespace(hf_config=SimpleNamespace(model_type="gemma4_mtp"))
    get_current_vllm_config().speculative_config = SimpleNamespace(
        method="mtp", draft_model_config=draft, target_model_config=object()
    )
    with pytest.raises(RiaError, match="reads its target's KV cache"):
        config.get_quant_method(layer, PATHS[-1])
    draft.hf_config.model_type = "gemma4_text"
    config.get_quant_method(layer, PATHS[-1])
