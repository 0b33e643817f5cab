"""What topologies say of layers, and which layers are of one kind."""

import pytest
import torch
from decoders import layers_of, small
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.offline.model.experiments.survey import kinds_of
from ria_vllm.offline.model.run.architecture import decoder_layers
from ria_vllm.offline.model.topology import Group, Sublayer, Topologies, Topology

FOLD = Fold(consumer="mlp.down", producers=[Producer(name="mlp.up")], coupling="elementwise")
OTHER = Fold(consumer="mlp.down", producers=[Producer(name="mlp.up", rows=(0, 8))], coupling="elementwise")
SUBLAYERS = (Sublayer("layer", ((Group(("mlp.up",)),), (Group(("mlp.down",)),))),)


def written(index: int, name: str) -> str:
    return f"model.layers.{index}.{name}"


def pairs(folds: list[Fold]) -> list[tuple[str, str]]:
    return [(fold.consumer, fold.producers[0].name) for fold in folds]


def test_a_fold_of_all_layers_is_written_once():
    topologies = Topologies((Topology(SUBLAYERS, (FOLD,)),), (0,) * 12)
    assert pairs(topologies.absolute_folds(written)) == [("model.layers.{i}.mlp.down", "model.layers.{i}.mlp.up")]


def test_a_linear_that_other_layers_fold_otherwise_or_not_at_all():
    kinds = (Topology(SUBLAYERS, (FOLD,)), Topology(SUBLAYERS), Topology(SUBLAYERS, (OTHER,)))
    folds = Topologies(kinds, (0, 1, 2, 0)).absolute_folds(written)
    assert pairs(folds) == [(f"model.layers.{i}.mlp.down", f"model.layers.{i}.mlp.up") for i in (0, 3, 2)]
    assert [fold.producers[0].rows for fold in folds] == [None, None, (0, 8)]


def test_names_without_a_pattern_are_written_layer_by_layer():
    topologies = Topologies((Topology(SUBLAYERS, (FOLD,)),), (0, 0))
    folds = topologies.absolute_folds(lambda index, name: f"{'ab'[index]}.{name}")
    assert pairs(folds) == [("a.mlp.down", "a.mlp.up"), ("b.mlp.down", "b.mlp.up")]


def test_kinds_with_the_same_topology_become_one():
    same, other = Topology(SUBLAYERS, (FOLD,)), Topology(SUBLAYERS)
    topologies = Topologies.of_kinds([same, other, Topology(SUBLAYERS, (FOLD,))], (0, 1, 2, 1, 0))
    assert topologies == Topologies((same, other), (0, 1, 0, 1, 0))


@pytest.mark.parametrize(
    ("model_type", "changes", "kinds"),
    [
        ("llama", {"num_hidden_layers": 3}, (0, 0, 0)),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, (0, 0)),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, (0, 1)),
        ("gemma4_text", {}, (0, 1)),  # heads of another width
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}, (0, 1, 0)),
        ("deepseek_v3", {"num_hidden_layers": 3}, (0, 1, 1)),  # a dense layer before those with experts
    ],
)
def test_kinds(model_type, changes, kinds):
    assert kinds_of(layers_of(small(model_type, **changes))) == kinds


def test_layers_that_leave_something_for_others_are_of_a_kind_of_their_own():
    assert kinds_of(layers_of(small("llama", num_hidden_layers=4)), [(0, 0), (1, 0), (0, 0), (0, 1)]) == (0, 1, 0, 2)


def test_a_layer_that_reads_the_values_of_another_is_of_a_kind_of_its_own():
    """Its modules and shapes are the same, but its own value projection feeds nothing."""
    layers = layers_of(small("llama"))
    layers[1].self_attn.is_kv_shared_layer, layers[0].self_attn.is_kv_shared_layer = True, False
    assert kinds_of(layers) == (0, 1)


@pytest.mark.parametrize("name", ["use_rope", "num_heads"])
def test_layers_whose_numbers_differ_are_of_two_kinds(name):
    """All are called with their own layer_idx, too, which says nothing."""
    layers = layers_of(small("llama", num_hidden_layers=3))
    for layer, value in zip(layers, (1, 1, 0), strict=True):
        setattr(layer.self_attn, name, value)
    assert kinds_of(layers) == (0, 0, 1)


def test_no_layers_with_linears():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8))
    with pytest.raises(RiaError, match="Conv1D"):
        decoder_layers(model, 1)


def with_a_tower(model_type: str, **changes):
    """A model with a flat configuration, with as many layers in its vision tower as in its text decoder."""
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vision_config={"num_hidden_layers": 2}, **changes)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).base_model


def test_a_tower_with_as_many_layers_is_not_the_decoder():
    assert decoder_layers(with_a_tower("git"), 2) == "encoder.layer"
    lists = "vision_model.encoder.layers, layers, gated_cross_attn_layers"  # its tower has no configuration of its own
    with pytest.raises(RiaError, match=f"IdeficsModel: {lists} have 2 layers each, and nothing says which"):
        decoder_layers(with_a_tower("idefics", cross_layer_interval=1), 2)


def test_overlapping_sets_are_one():
    names = ["a.q_proj", "a.k_proj", "a.v_proj", "a.b_proj", "a.o_proj", "c.q_proj"]
    topology = Topology((Sublayer("layer", ()),), together=(frozenset(("a.v_proj", "a.b_proj")),))
    for name in names[:4]:
        assert topology.fused_with(name, names) == names[:4]
    assert topology.fused_with("c.q_proj", names) == ["c.q_proj"]
