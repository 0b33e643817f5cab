"""Where the names of tensors lead in a model."""

import pytest
import torch
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer, WeightsMapper

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.model_paths import destinations, place_of


def tree(*paths):
    root = torch.nn.Module()
    for path in paths:
        module = root
        for name in path.split("."):
            if name not in module._modules:
                module.add_module(name, torch.nn.Module())
            module = module._modules[name]
    return root


def test_names_may_be_relative_to_a_child():
    """As in files of a decoder without a head, which vLLM loads into a model that could have one."""
    model = tree("head", "model.layers.0.up", "model.layers.1")
    model.head = StageMissingLayer("output")
    model.model.layers._modules["1"] = PPMissingLayer()
    assert (
        destinations(model, "layers.0.up") == destinations(model, "model.layers.0.up") == [("model.layers.0.up", None)]
    )
    assert destinations(model, "layers.1.up") is None  # of another pipeline stage
    assert destinations(model, "layers.2.up") == destinations(model, "mtp.layers.0.up") == []


def test_a_whole_path_is_better_than_a_part_of_one():
    model = tree("vision.layers.0.norm", "model.layers.0.up")
    assert destinations(model, "layers.0.up") == [("model.layers.0.up", None)]
    assert place_of(model, "layers.0.experts.3.up.weight").path == ("vision", "layers", "0")
    model.model.layers._modules["0"].add_module("experts", torch.nn.Module())
    assert place_of(model, "layers.0.experts.3.up.weight").path == ("model", "layers", "0", "experts")


def test_a_path_in_two_children():
    model = tree("vision.layers.0.up", "model.layers.0.up")
    with pytest.raises(RiaError, match="layers.0.up.weight: vLLM's Module has a place for it in vision and model"):
        destinations(model, "layers.0.up")
    model._modules["vision"] = model.model  # one module with two names
    assert destinations(model, "layers.0.up") == [("model.layers.0.up", None)]


def test_what_a_child_drops_may_still_be_anothers():
    model = tree("vision.blocks.0.up", "model.layers.0.up")
    model.vision.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"layers.": None, "mtp.": None})
    model.vision.load_weights = lambda weights: None
    assert destinations(model, "layers.0.up") == [("model.layers.0.up", None)]
    assert destinations(model, "layers.1.up") == destinations(model, "mtp.up") == []  # lost, not elsewhere
    model.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"layers.1.": None})
    model.model.load_weights = lambda weights: None
    assert destinations(model, "layers.1.up") is None


def test_wrappers_rename():
    model = tree("language_model.model.layers.0.up", "vision_tower.layers.0.up")
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
    )
    model.load_weights = lambda weights: None
    for name in ("model.language_model.layers.0.up", "language_model.model.layers.0.up"):
        assert destinations(model, name) == [("language_model.model.layers.0.up", None)]
    assert destinations(model, "model.vision_tower.layers.0.up") == [("vision_tower.layers.0.up", None)]
    assert place_of(model, "model.language_model.layers.0.down.weight").rest == "down.weight"
