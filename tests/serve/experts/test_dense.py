"""Dense experts in a checkpoint that has pruned experts or linears elsewhere."""

import moe_layers
import pytest
import torch
from moe_layers import LAYER, Model, StoredMoE, attached, play_rank, route
from moe_paths import close
from vllm.config import VllmConfig, set_current_vllm_config

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.serve.experts.dense import DenseExpertsMethod
from ria_vllm.serve.experts.method import Sparse24MoEMethod
from ria_vllm.serve.model.config import RiaConfig

pytestmark = pytest.mark.usefixtures("ranks")


def dense_beside_pruned(config, **settings):
    """A model whose only MoE layer has dense experts, though its prefix is that of pruned ones."""
    model = Model(config, **settings)
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity(), model.layers[1]])
    config.packed_modules_mapping = {}
    config.served_by["a linear of its target"] = torch.nn.Module
    return attached(config, model).layers[2].mlp.experts.routed_experts


def test_dense_experts_stay_with_vllm():
    config = StoredMoE().config()
    experts = dense_beside_pruned(config)
    assert type(experts.quant_method) is DenseExpertsMethod
    assert {"w13_weight", "w2_weight"} == set(experts._parameters)


def ours_with_pruned_experts_elsewhere():
    return StoredMoE().config()


def ours_with_dense_experts():
    """No expert of any layer is pruned, so config.json does not speak of experts."""
    config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig()))
    config._read_names([f"model.layers.1.self_attn.o_proj.{part}" for part in ("compressed", "bitmask")])
    return config


def stacks_of_compressed_tensors():
    """As in Granite: no part of the names says experts."""
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": []}
    config = RiaConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}
    )
    config._read_names([f"model.layers.1.block_sparse_moe.{end}_linear.weight" for end in ("input", "output")])
    return config


@pytest.mark.parametrize("config", [ours_with_dense_experts, stacks_of_compressed_tensors])
def test_dense_experts_on_ranks_of_expert_parallel(monkeypatch, config):
    """vLLM's own experts for CPUs would take an expert's global number for the one on this rank."""
    stored = StoredMoE()
    x, weights, ids = route()
    total = 0
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            experts = dense_beside_pruned(config(), tp_size=2)
        for here, e in enumerate(range(2 * rank, 2 * rank + 2)):
            gate, up, down = (stored.plain[f"{LAYER}.{e}.{end}"] for end in moe_layers.KINDS.values())
            experts.w13_weight.data[here], experts.w2_weight.data[here] = torch.cat([gate, up]).float(), down.float()
        experts.quant_method.process_weights_after_loading(experts)
        copies = [tensor.clone() for tensor in (x, weights, ids)]
        total = total + experts.quant_method.apply(experts, *copies, None, None)
    close(total, stored.expected(x, weights, ids))


@pytest.mark.parametrize(
    "config", [ours_with_pruned_experts_elsewhere, ours_with_dense_experts, stacks_of_compressed_tensors]
)
def test_dense_experts_that_vllm_gets_wrong(config):
    with pytest.raises(RiaError, match="layers.1.mlp.experts.*are dense, .* ignore swiglu_limit"):
        dense_beside_pruned(config(), swiglu_limit=0.7)


def test_a_draft_with_experts_where_its_target_has_pruned_ones():
    """Its names are not those of the target, though vLLM gives its layer the same prefix."""

    class Draft(Model):
        pass

    config = StoredMoE().config()
    target = attached(config, Model(config))
    config.served_by = dict.fromkeys(config.experts, Model)
    draft = Draft(config)
    assert isinstance(draft.experts.quant_method, Sparse24MoEMethod)
    attached(config, draft)
    assert type(draft.experts.quant_method) is DenseExpertsMethod
    assert {"w13_weight", "w2_weight"} == set(draft.experts._parameters)
    assert isinstance(target.experts.quant_method, Sparse24MoEMethod)
