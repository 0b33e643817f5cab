import pytest
from moe_layers import AT, EXPERTS, LAYER, StoredMoE

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Experts
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.serve.experts.stored import stored_experts


def schema():
    names = {kind: f"{AT}.{{e}}.{kind}" for kind in ("gate", "up", "down")}
    return RiaSchema(sparsity_config=SparsityConfig(), experts=[Experts(module=AT, num_experts=2, **names)])


def names(layer, *kinds):
    return [f"model.layers.{layer}.mlp.experts.{e}.{kind}" for e in range(2) for kind in kinds]


def test_the_layers_are_those_of_the_pruned_linears():
    pruned = [*names(0, "gate", "up", "down"), *names(12, "gate", "up", "down"), "model.layers.3.mlp.gate"]
    found = stored_experts(schema(), pruned, "here")
    assert set(found) == {"model.layers.0.mlp.experts", "model.layers.12.mlp.experts"}
    one = found["model.layers.12.mlp.experts"]
    assert one.linear("down", 1) == "model.layers.12.mlp.experts.1.down" and one.is_gated
    assert {name for name, _, _ in one.linears()} == set(names(12, "gate", "up", "down"))


@pytest.mark.parametrize(
    "pruned, message",
    [
        (names(0, "gate", "up"), "0.mlp.experts.0.down is missing"),
        ([*names(0, "gate", "up", "down"), "model.layers.0.mlp.experts.01.up"], "experts.01.up is none of the 2"),
    ],
)
def test_a_layer_is_pruned_whole(pruned, message):
    with pytest.raises(RiaError, match=message):
        stored_experts(schema(), pruned, "here")


def test_a_config_survives_pickling():
    """vLLM sends it to its workers before the model is built."""
    import pickle

    config = pickle.loads(pickle.dumps(StoredMoE(bias=True).config()))
    assert set(config.experts) == {LAYER} and len(config.expert_linears) == 3 * EXPERTS
