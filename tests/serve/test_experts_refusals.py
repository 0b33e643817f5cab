"""Pruned experts that are not served, and why."""

from types import SimpleNamespace

import pytest
import torch
from mixture_layers import EXPERTS, HIDDEN, INNER, LAYER, Model, StoredMixture, attached, play_rank, served
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import config as moe_config

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import INTEGERS
from ria_vllm.format.schema import WeightQuantization
from ria_vllm.serve.model.layer_matching import match_layers

pytestmark = pytest.mark.usefixtures("ranks")


def test_a_rank_with_part_of_a_byte_is_refused(monkeypatch):
    play_rank(monkeypatch, 0, 32)
    with pytest.raises(RiaError, match="128 input channels over 32 ranks leave 4 each.*Use a smaller"):
        Model(StoredMixture().config(), tp_size=32)


def test_channels_that_are_not_whole_groups_are_refused(monkeypatch):
    config = StoredMixture(weight_format=INTEGERS[4, 64]).config()
    play_rank(monkeypatch, 0, 4)
    with pytest.raises(
        RiaError, match="128 input .* over 4 ranks leave 32 each.*a group of 64.*enable-expert-parallel"
    ):
        Model(config, tp_size=4)
    config.schema.weights = WeightQuantization(**INTEGERS[4, 128].quantization)
    with pytest.raises(RiaError, match="64 input channels are not a multiple of 128, which int4-g128 needs"):
        Model(config, hidden_size=64)


def test_a_forced_kernel_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cpuu")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cpuu is not a kernel"):
        Model(StoredMixture().config())


def test_experts_without_a_layer():
    config = StoredMixture().config()
    model = Model(config)
    model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(RiaError, match=f"experts {LAYER} would not be served.*no layer.*ria-vllm export"):
        attached(config, model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{LAYER}.3.down_proj.bitmask"), "3.down_proj.bitmask is in none of the weight files"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.bitmask": torch.zeros(INNER, 4, dtype=torch.uint8)}), "needs"),
        (lambda t: t.update({f"{LAYER}.0.up_proj.compressed": torch.zeros(INNER, 32, dtype=torch.int8)}), "int8"),
        (lambda t: t[f"{LAYER}.1.gate_proj.bitmask"].fill_(255), "gate_up: .*damaged"),
        (lambda t: t.update({f"{LAYER}.1.gate_proj.zero": torch.zeros(2)}), "1.gate_proj.zero: .* no place"),
        (lambda t: t.update({f"{LAYER}.1.gate_proj.bias": torch.zeros(INNER)}), "1.gate_proj.bias: .* no place"),
    ],
)
def test_damaged_tensors(change, message):
    stored = StoredMixture()
    config = stored.config()
    change(stored.tensors)
    model = attached(config, Model(config))
    with pytest.raises(RiaError, match=message):
        model.load_weights(iter(stored.tensors.items()))
        model.experts.quant_method.process_weights_after_loading(model.experts)


def test_biases_of_the_wrong_shape():
    stored = StoredMixture(bias=True)
    stored.tensors[f"{LAYER}.gate_up_proj_bias"] = torch.zeros(EXPERTS, INNER)
    with pytest.raises(RiaError, match="gate_up_proj_bias is .* but the model needs"):
        served(stored, activation="swigluoai", has_bias=True)


def test_a_permutation_of_the_wrong_length():
    stored = StoredMixture()
    stored.permutations[f"{LAYER}.2.up_proj"] = torch.arange(HIDDEN + 4).int().numpy()
    with pytest.raises(RiaError, match=f"permutation of expert 2 has {HIDDEN + 4} channels"):
        Model(stored.config())


def test_a_fold_into_rows_of_an_expert_from_elsewhere():
    from ria_vllm.serve.load.folding import RowOrder

    config = StoredMixture().config()
    order = config.permutations[f"{LAYER}.0.down_proj"][::-1].copy()
    config.folding.row_orders[f"{LAYER}.0.up_proj"] = [RowOrder(order)]
    with pytest.raises(RiaError, match="0.up_proj: a fold reorders its rows"):
        Model(config)


def test_experts_that_are_partly_pruned():
    stored = StoredMixture()
    del stored.tensors[f"{LAYER}.2.up_proj.compressed"]
    with pytest.raises(RiaError, match="2.up_proj is not pruned, but others"):
        stored.config()
    stored = StoredMixture()
    stored.tensors[f"{LAYER}.{EXPERTS}.up_proj.compressed"] = torch.zeros(1)
    with pytest.raises(RiaError, match=f"says that there are {EXPERTS} experts"):
        stored.config()


def test_another_number_of_experts():
    message = f"{LAYER}.{EXPERTS}.up_proj is in none of the weight files: .*{EXPERTS} experts .* has {2 * EXPERTS}"
    with pytest.raises(RiaError, match=message):
        Model(StoredMixture().config(), num_experts=2 * EXPERTS)
    with pytest.raises(RiaError, match=f"has {EXPERTS} experts, but vLLM's layer has 2. config.json belongs"):
        Model(StoredMixture().config(), num_experts=2)


def test_redundant_experts():
    with pytest.raises(RiaError, match=f"{EXPERTS} experts, but vLLM's layer has {EXPERTS + 2}. .*--enable-eplb"):
        Model(StoredMixture().config(), num_redundant_experts=2, enable_eplb=True)


@pytest.mark.parametrize("prefix", ["layers.1.mlp.experts", "not.the.path"])
def test_experts_that_vllm_would_move_between_ranks(prefix):
    """vLLM asks the method that the prefix has chosen whether it supports that, and moves whatever it is in pieces."""
    current, config = VllmConfig(), StoredMixture().config()
    current.parallel_config.enable_eplb = True
    with set_current_vllm_config(current), pytest.raises(RiaError, match=f"{LAYER}: with --enable-eplb"):
        match_layers(config, Model(config, prefix=prefix))


def test_an_absurd_number_of_experts():
    """Without files only config.json says how many there are: no loop may run over them."""
    config = StoredMixture().config()
    config.schema.experts[0].num_experts, config.stored, config.experts = 10**15, None, {}
    config.expert_layers = {}
    with pytest.raises(RiaError, match=f"{10**15} experts, but vLLM's layer has {EXPERTS}"):
        Model(config, prefix=LAYER)


def test_nobody_serves_these_experts():
    """No kernel takes several orders, and vLLM's experts for CPUs ignore the limit."""
    with pytest.raises(RiaError, match=f"{LAYER}: no kernel .*--permute-scope shared.*swiglu_limit.*ria-vllm export"):
        Model(StoredMixture("linear").config(), swiglu_limit=0.7)


def test_expert_parallel_with_data_parallel_is_refused(monkeypatch):
    """vLLM gathers the tokens of all ranks after an expert's number was translated to this rank's."""
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    monkeypatch.setattr(moe_config, "get_dp_group", lambda: SimpleNamespace(rank_in_group=0), raising=False)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="without --enable-expert-parallel"):
        Model(StoredMixture().config(), dp_size=2)


def test_a_rank_without_experts_is_refused(monkeypatch):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    play_rank(monkeypatch, 4, 8)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="4 experts over 8 ranks leave this one"):
        Model(StoredMixture().config(), tp_size=8)


def test_router_weights_on_the_input_of_several_experts_are_refused():
    with pytest.raises(RiaError, match="router's weights on the experts' input, and each token has 2 experts"):
        Model(StoredMixture().config(), apply_router_weight_on_input=True)


def test_adapters_are_refused():
    current = VllmConfig()
    current.lora_config = LoRAConfig(max_lora_rank=8)
    with set_current_vllm_config(current), pytest.raises(RiaError, match="LoRA adapters on the experts"):
        Model(StoredMixture().config())
