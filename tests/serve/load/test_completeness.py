"""Weight files that do not hold what config.json describes, or hold it twice, are refused by vLLM's own commands."""

import json

import pytest
import tiny
import torch
from compare import generate, job_of
from moe_layers import EXPERTS, HIDDEN, INNER, Model, StoredMoE, attached
from stored import Stored
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.serve.load.completeness import check_loaded, empty_weights
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.layer_matching import match_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_dense_weight_that_never_came_is_named(ranks, dtype):
    config = RiaConfig(RiaSchema(sparsity_config=SparsityConfig()))
    config.stored, config.pruned = {"first", "second"}, {"third"}
    model = torch.nn.Module()
    settings = {"bias": False, "params_dtype": dtype, "quant_config": config}
    model.first = ReplicatedLinear(64, 32, prefix="first", **settings)
    model.second = ColumnParallelLinear(64, 32, prefix="second", **settings)
    match_layers(config, model)
    empty_weights(model)
    with pytest.raises(RiaError, match="^here: the weight of vLLM's layer first is in none of the weight files"):
        check_loaded(model, "here")
    model.first.weight.data.zero_()
    with pytest.raises(RiaError, match="vLLM's layer second"):
        check_loaded(model, "here")
    model.second.weight.data[3] = 1  # a part of a fused weight; some models leave out what they do not use
    check_loaded(model, "here")


def embedded(tied):
    """A model of an embedding and a head."""
    model = torch.nn.Module()
    model.embed = VocabParallelEmbedding(96, 64, params_dtype=torch.float32, prefix="embed")
    head = ParallelLMHead(96, 64, params_dtype=torch.float32, prefix="head")
    model.head = head.tie_weights(model.embed) if tied else head
    return model


@pytest.fixture
def one_rank(monkeypatch):
    """vLLM's embeddings ask for their rank."""
    from vllm.model_executor.layers import vocab_parallel_embedding as embeddings

    monkeypatch.setattr(embeddings, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(embeddings, "get_tensor_model_parallel_world_size", lambda: 1)


def load(layer):
    layer.weight.weight_loader(layer.weight, torch.zeros(96, 64))


def test_the_bias_of_a_dense_or_a_pruned_linear_that_never_came_is_named(ranks):
    stored = Stored()
    stored.add("fc", 64, 128)
    model = torch.nn.Module()
    for name in ("fc", "dense"):
        setattr(model, name, ReplicatedLinear(128, 64, quant_config=stored.config(), prefix=name))
    match_layers(stored.config(), model)
    empty_weights(model)
    model.dense.weight.data.zero_()
    for name in ("fc", "dense"):
        with pytest.raises(RiaError, match=f"^here: the bias of vLLM's layer {name} is in none of the weight files"):
            check_loaded(model, "here")
        getattr(model, name).bias.data[3] = 1  # a part of a fused one
    check_loaded(model, "here")


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_or_a_head_that_never_came_is_named(ranks, one_rank, tied):
    model = embedded(tied)
    empty_weights(model)
    with pytest.raises(RiaError, match="the weight of vLLM's layer embed is in none"):
        check_loaded(model, "here")
    load(model.embed)
    if not tied:
        with pytest.raises(RiaError, match="the weight of vLLM's layer head is in none"):
            check_loaded(model, "here")
        load(model.head)
    check_loaded(model, "here")
    draft = embedded(tied)  # it has them from its target, once it is loaded
    empty_weights(draft, embeddings=False)
    check_loaded(draft, "here", embeddings=False)


def dense_experts(**settings):
    """A model whose only MoE layer, layers.1.mlp.experts, was left dense, ready to be loaded."""
    config = StoredMoE().config()
    config.experts, config.expert_layers, config.required = {}, {}, set()
    model = attached(config, Model(config, **settings))
    empty_weights(model)
    return model


def load_experts(model, absent=(None, None)):
    """Load the weights of all experts, but that of (expert, part)."""
    layer = model.experts
    for expert in range(EXPERTS):
        for part in ("w1", "w3", "w2") if layer.moe_config.is_act_and_mul else ("w1", "w2"):
            weight = torch.zeros((HIDDEN, INNER) if part == "w2" else (INNER, HIDDEN))
            parameter = layer.w2_weight if part == "w2" else layer.w13_weight
            if (expert, part) != absent:
                layer.weight_loader(parameter, weight, "weight", shard_id=part, expert_id=expert)


@pytest.mark.parametrize(("part", "projection"), [("w3", "up"), ("w2", "down")])
def test_a_weight_of_a_dense_expert_that_never_came_is_named(ranks, part, projection):
    model = dense_experts()
    load_experts(model, absent=(2, part))
    what = rf"the {projection} projection of this rank's expert 2 of vLLM's layer layers\.1\.mlp\.experts\S*"
    with pytest.raises(RiaError, match=f"^here: {what} is in none of the weight files.*Get all files of one model"):
        check_loaded(model, "here")
    load_experts(model)
    check_loaded(model, "here")


@pytest.mark.slow
def test_what_is_not_complete_is_refused(tmp_path):
    tiny.write(tiny.FAMILIES["llama-gqa"], tmp_path / "longer", permuted=False, dense=("1.mlp.down_proj",))
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    (tmp_path / "longer" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    (result,) = generate(tmp_path / "run", [job_of(tmp_path / "longer", {"tokens": 4})])
    message = "the weight of vLLM's layer model.layers.2.self_attn.qkv_proj is in none of the weight files"
    assert message in result["error"]
