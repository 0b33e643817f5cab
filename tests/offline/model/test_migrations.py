"""Migrations against the model's own forward pass in float64, with scales put in by hand."""

import pytest
import torch
from decoders import calls_of, check_same, described, in_float64, layers_of, small
from torch import nn

from ria_vllm.offline.model.experiments.describe import describe

TOKENS = torch.arange(40, 70).view(2, 15)
# Family -> (what reads the tensor -> what absorbs its scales), in the last layer.
FAMILIES = {
    "llama": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "post_attention_layernorm",
              "down_proj": "up_proj"},
    "gemma2": {"q_proj": "input_layernorm", "o_proj": "v_proj", "gate_proj": "pre_feedforward_layernorm",
               "down_proj": "up_proj"},
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "v_proj", "fc1": "final_layer_norm", "fc2": "fc1"},  # ReLU
    "cohere2": {"q_proj": "input_layernorm", "o_proj": "v_proj", "down_proj": "up_proj"},  # attention beside the MLP
    "phi3": {"qkv_proj": "input_layernorm", "o_proj": "qkv_proj", "gate_up_proj": "post_attention_layernorm",
             "down_proj": "gate_up_proj"},
    "gpt_neox": {"query_key_value": "input_layernorm", "dense": "query_key_value",
                 "dense_h_to_4h": "post_attention_layernorm"},
    "olmo2": {"o_proj": "v_proj", "down_proj": "up_proj"},  # its norms come after the linears
    "mixtral": {"q_proj": "input_layernorm", "o_proj": "v_proj"},  # experts and a router read the other norm
    "qwen2_moe": {"q_proj": "input_layernorm", "o_proj": "v_proj", "down_proj": "up_proj"},  # the shared expert's
    "deepseek_v3": {"q_a_proj": "input_layernorm", "q_b_proj": "q_a_layernorm", "kv_b_proj": "kv_a_layernorm",
                    "o_proj": "kv_b_proj", "down_proj": "up_proj"},
}  # fmt: skip
# Norms that multiply by their weight plus one.
PLUS_ONE = ("gemma2",)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def rows_of(producer, total: int) -> list[int]:
    start, end = producer.rows or (0, total)
    size = total // producer.blocks
    return [block * size + row for block in range(producer.blocks) for row in range(start, end)]


def apply(layer, migration, draw: torch.Generator) -> None:
    """Migrate random scales, channel by channel."""
    width = layer.get_submodule(migration.consumers[0]).in_features
    absorber = layer.get_submodule(migration.absorber)
    if migration.norm is not None:
        scales = column = torch.rand(width, generator=draw, dtype=torch.float64) + 0.5
        absorber.weight.copy_((absorber.weight + migration.offset) / scales - migration.offset)
        if getattr(absorber, "bias", None) is not None:
            absorber.bias.div_(scales)
    else:
        rows = rows_of(migration.producer, absorber.out_features)
        scales = torch.rand(len(rows), generator=draw, dtype=torch.float64) + 0.5
        for part in (absorber.weight, absorber.bias):
            if part is not None:
                part[rows] = part[rows] / scales.view(-1, *[1] * (part.dim() - 1))
        column, heads = scales, migration.heads
        if heads is not None:
            share, size = heads.num_heads // heads.num_kv_heads, heads.head_dim
            column = torch.cat([scales[head // share * size :][:size] for head in range(heads.num_heads)])
    for name in migration.consumers:
        layer.get_submodule(name).weight.mul_(column)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_migration_changes_nothing(family):
    model = small(family)
    topologies = described(model)
    found = {last(one.consumers[0]): last(one.absorber) for one in topologies.of(1).migrations}
    assert found == FAMILIES[family]
    offsets = {one.offset for topology in topologies.kinds for one in topology.migrations if one.norm is not None}
    assert offsets <= {int(family in PLUS_ONE)}
    in_float64(model)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        before = model(TOKENS).logits
        for index, layer in enumerate(layers_of(model)):
            for migration in topologies.of(index).migrations:
                apply(layer, migration, draw)
        check_same(model(TOKENS).logits, before)
        name = topologies.of(1).migrations[0].consumers[0]
        layers_of(model)[1].get_submodule(name).weight[:, 3].mul_(4)
        assert (model(TOKENS).logits - before).abs().max() > 1e-4 * before.abs().max()


def test_attention_and_mlp_that_read_one_norm_migrate_together():
    (norm, *_) = described(small("cohere2")).of(0).migrations
    assert {last(name) for name in norm.consumers} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}


def found_with(change) -> set[str]:
    """What absorbs scales in the first layer of a Llama that `change` has changed."""
    model = small("llama")
    change(layers_of(model)[0])
    short, long = (calls_of(model, torch.arange(2, 2 + count)[None])[0] for count in (8, 100))
    with torch.no_grad():
        topology = describe(model.config, layers_of(model)[0], short, long)
    return {one.absorber for one in topology.migrations}


class Beside(nn.Module):
    """An MLP whose output also has what it reads."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + x


class Clipped(nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return x.clamp(-self.limit, self.limit)


def test_nothing_migrates_into_a_norm_that_others_read():
    assert found_with(lambda layer: None) == {
        "input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj",
    }  # fmt: skip
    found = found_with(lambda layer: setattr(layer, "mlp", Beside(layer.mlp)))
    assert found == {"input_layernorm", "self_attn.v_proj", "mlp.up_proj"}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_nothing_migrates_through_what_is_not_linear(limit):
    """There are models that limit what down reads, to 7 or 10."""
    assert "mlp.up_proj" not in found_with(
        lambda layer: setattr(layer.mlp, "down_proj", nn.Sequential(Clipped(limit), layer.mlp.down_proj))
    )
