"""Which heads can be rotated, against the whole model's forward pass in float64, with matrices put in by hand."""

import pytest
import torch
from decoders import Halved, calls_of, check_same, described, in_float64, layers_of, small

from ria_vllm.offline.model.experiments.describe import describe

TOKENS = torch.arange(40, 70).view(2, 15)
# Family -> (the linear before attention, the one after it) in the last layer.
FAMILIES = {
    "llama": ("v_proj", "o_proj"),
    "gemma2": ("v_proj", "o_proj"),
    "opt": ("v_proj", "out_proj"),
    "cohere2": ("v_proj", "o_proj"),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt_neox": ("query_key_value", "dense"),
    "bloom": ("query_key_value", "dense"),
    "falcon": ("query_key_value", "dense"),
    "mixtral": ("v_proj", "o_proj"),
    "gemma4_text": ("v_proj", "o_proj"),  # with a norm of the values, which has no weight
    "deepseek_v3": ("kv_b_proj", "o_proj"),
}


def last(name: str) -> str:
    return name.rpartition(".")[2]


def block_diagonal(matrices: torch.Tensor, counts: int) -> torch.Tensor:
    """Each matrix `counts` times."""
    return torch.block_diag(*matrices.repeat_interleave(counts, 0))


def apply(layer, fold, draw: torch.Generator) -> None:
    """Multiply by random orthogonal matrices, whole linears at a time."""
    consumer, producer = layer.get_submodule(fold.consumer), layer.get_submodule(fold.producers[0].name)
    d = consumer.in_features // fold.num_heads
    random = torch.randn(fold.num_kv_heads, d, d, dtype=torch.float64, generator=draw)
    rotations = torch.linalg.qr(random).Q
    start, end = fold.producers[0].rows or (0, producer.out_features)
    size = producer.out_features // fold.producers[0].blocks
    rows = [block * size + row for block in range(fold.producers[0].blocks) for row in range(start, end)]
    whole = torch.eye(producer.out_features, dtype=torch.float64)
    whole[torch.tensor(rows)[:, None], torch.tensor(rows)] = block_diagonal(rotations, 1)
    for part in (producer.weight, producer.bias):
        if part is not None:
            part.copy_(whole @ part)
    consumer.weight.copy_(consumer.weight @ block_diagonal(rotations, fold.num_heads // fold.num_kv_heads).T)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_change_nothing(family):
    model = small(family)
    topologies = described(model)
    in_float64(model)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        before = model(TOKENS).logits
        for index, layer in enumerate(layers_of(model)):
            topology = topologies.of(index)
            (fold,) = (fold for fold in topology.folds if fold.consumer in topology.rotations)
            assert (last(fold.producers[0].name), last(fold.consumer)) == FAMILIES[family]
            apply(layer, fold, draw)
        check_same(model(TOKENS).logits, before)
        layer.get_submodule(fold.consumer).weight[:, :2].copy_(layer.get_submodule(fold.consumer).weight[:, [1, 0]])
        assert (model(TOKENS).logits - before).abs().max() > 1e-4 * before.abs().max()


def test_what_lets_permutations_through_only():
    """A gate on attention's output multiplies channel by channel."""
    gated = [
        topology
        for topology in described(small("qwen3_next")).kinds
        if any(fold.coupling == "heads" and len(fold.producers) == 2 for fold in topology.folds)
    ]
    assert gated and not any(topology.rotations for topology in gated)


@pytest.mark.parametrize("family", ["olmo", "olmoe"])
def test_values_that_are_cut_at_a_limit(family):
    """Far beyond what random weights give. In OLMo 7B it is 8."""
    (without,), (limited,) = (described(small(family, clip_qkv=limit)).kinds for limit in (None, 100.0))
    assert any(fold.coupling == "heads" for fold in limited.folds)
    assert without.rotations and not limited.rotations


def test_values_that_are_not_linear():
    model = small("llama")
    layer = layers_of(model)[0]
    layer.self_attn.v_proj = Halved(layer.self_attn.v_proj)
    short, long = (calls_of(model, torch.arange(2, 2 + count)[None])[0] for count in (8, 100))
    with torch.no_grad():
        topology = describe(model.config, layer, short, long)
    assert any(fold.consumer == "self_attn.o_proj" for fold in topology.folds) and not topology.rotations
