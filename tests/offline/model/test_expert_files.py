"""Which tensors in the files hold a layer's experts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.core_model_loading import Transpose, WeightConverter

from ria_vllm.errors import RiaError
from ria_vllm.hf.experts_layout import ExpertsLayout
from ria_vllm.offline.model.experts.files import ExpertWeights
from ria_vllm.offline.model.files.source_tensors import SourceTensors

LAYOUT = ExpertsLayout("mlp.experts", num_experts=4, width=64, inner=32)
TENSORS = {name: f"layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
MODULE = {TENSORS["gate_up_proj"]: (4, 64, 64), TENSORS["down_proj"]: (4, 64, 32)}
TRANSPOSED = {TENSORS["gate_up_proj"]: (4, 64, 64), TENSORS["down_proj"]: (4, 32, 64)}


def found(shapes: dict, layout: ExpertsLayout = LAYOUT, check_dims: bool = False):
    converter = WeightConverter("x", "x", operations=[Transpose(1, 2, check_dims=check_dims)])
    made_of = {name: [name] for name in TENSORS.values()}
    names = SimpleNamespace(
        folder="folder",
        direct={},
        made_of=made_of,
        files={n: n for n in shapes},
        converted=dict.fromkeys(made_of, (converter, 0)),
    )
    tensors = SourceTensors.__new__(SourceTensors)
    tensors.files = dict.fromkeys(shapes, Path("file"))
    tensors.shape = shapes.__getitem__
    return ExpertWeights([], "layers", 64, names, tensors)._find("layers.0.mlp.experts.", layout)


def test_stacks_that_transformers_transposes():
    assert found(TRANSPOSED).transposed
    narrow = ExpertsLayout("mlp.experts", num_experts=4, width=64, inner=48)
    module = {TENSORS["gate_up_proj"]: (4, 96, 64), TENSORS["down_proj"]: (4, 64, 48)}
    assert not found(module, narrow, check_dims=True).transposed
    swapped = {name: (4, shape[2], shape[1]) for name, shape in module.items()}
    assert found(swapped, narrow, check_dims=True).transposed


@pytest.mark.parametrize("check_dims", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 64), (4, 32, 65), (4, 32)])
def test_a_stack_of_another_shape(shape, check_dims):
    with pytest.raises(RiaError, match="layers.0.mlp.experts.down_proj"):
        found(TRANSPOSED | {TENSORS["down_proj"]: shape}, check_dims=check_dims)
    if not check_dims:
        with pytest.raises(RiaError, match="down_proj"):
            found(MODULE)
