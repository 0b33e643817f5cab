"""Stacked tensors of the dense model, from experts that are stored one by one."""

import pytest
import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Experts, Stacked
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.format.stacks import layers_of_experts, problems_of_experts, stacked_tensors


def schema(num_experts: int = 3, **stacked) -> RiaSchema:
    module = "model.layers.{i}.mlp.experts"
    experts = Experts(
        module=module, num_experts=num_experts, gate=f"{module}.{{e}}.gate_proj", up=f"{module}.{{e}}.up_proj",
        down=f"{module}.{{e}}.down_proj",
        stacked=[
            Stacked(tensor=f"{module}.gate_up_proj", linears=["gate", "up"], **stacked),
            Stacked(tensor=f"{module}.down_proj", linears=["down"]),
        ],
    )  # fmt: skip
    return RiaSchema(sparsity_config=SparsityConfig(), experts=[experts])


def names(layer: int, experts: int = 3) -> set[str]:
    kinds = ("gate", "up", "down")
    return {f"model.layers.{layer}.mlp.experts.{e}.{kind}_proj" for e in range(experts) for kind in kinds}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_as_the_schema_says(interleaved, transposed):
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(5, 4, generator=draw) for name in names(7)}
    found = stacked_tensors(schema(interleaved=interleaved, transposed=transposed), names(7), "folder")
    assert list(found) == [f"model.layers.7.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    stacked = found["model.layers.7.mlp.experts.gate_up_proj"].join(weights.__getitem__)
    for expert in range(3):
        rows = stacked[expert].T if transposed else stacked[expert]
        gate, up = (rows[::2], rows[1::2]) if interleaved else rows.split(5)
        assert torch.equal(gate, weights[f"model.layers.7.mlp.experts.{expert}.gate_proj"])
        assert torch.equal(up, weights[f"model.layers.7.mlp.experts.{expert}.up_proj"])


def test_only_layers_with_pruned_experts_are_stacked():
    sparse = names(1) | names(12) | {"model.layers.3.mlp.gate_proj", "model.layers.3.mlp.experts_3.gate_proj"}
    assert {layer.name for layer in layers_of_experts(schema(), sparse)} == {
        "model.layers.1.mlp.experts",
        "model.layers.12.mlp.experts",
    }


@pytest.mark.parametrize("claimed", [4, 10**9])
def test_a_missing_expert_is_named(claimed):
    message = f"model.layers.1.mlp.experts.3.gate_proj is missing, .* has {claimed} experts"
    with pytest.raises(RiaError, match=message):
        stacked_tensors(schema(claimed), names(1), "folder")
    (problem,) = problems_of_experts(schema(claimed), {}, names(1))
    assert problem.startswith("model.layers.1.mlp.experts.3.gate_proj is missing")


@pytest.mark.parametrize("name", ["layers.1.mlp.experts.3.up_proj", "layers.1.mlp.experts.02.up_proj"])
def test_experts_that_config_json_does_not_have(name):
    sparse = names(1) | {f"model.{name}"}
    (problem,) = problems_of_experts(schema(), {}, sparse)
    assert problem == f"model.{name} is none of the 3 experts that model.layers.1.mlp.experts has by config.json"
    with pytest.raises(RiaError, match=f"folder: model.{name} is none of the 3 experts"):
        stacked_tensors(schema(), sparse, "folder")
