"""One experiment for each kind of layer of a stored model, and what happens if one is too large."""

from unittest.mock import Mock

import pytest
import torch
from compressing import run_small
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments import survey
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Sublayer, Topology


def test_a_layer_too_large_for_memory_is_refused_by_name(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "available", lambda device: 100_000)
    with pytest.raises(RiaError, match="model.layers.0: .*does not fit into memory"):
        run_small(tiny("llama"), tmp_path / "out", text)


def test_one_experiment_for_each_kind_and_no_weights_are_read(tiny, text, tmp_path, monkeypatch):
    described, loaded = [], []
    describe, load_layer = survey.describe, StreamedModel.load_layer

    def watched(config, layer, short, long, changes):
        assert short[1].shape[1] == 8 < long[1].shape[1]
        assert all(parameter.is_meta for parameter in layer.parameters())
        described.append((type(layer).__name__, changes))
        return describe(config, layer, short, long, changes)

    def load(self, index):
        loaded.append((index, len(described)))
        return load_layer(self, index)

    monkeypatch.setattr(survey, "describe", watched)
    monkeypatch.setattr(StreamedModel, "load_layer", load)
    run_small(tiny("llama"), tmp_path / "out", text)
    assert described == [("LlamaDecoderLayer", False)]  # nothing migrates or rotates in this run
    assert loaded == [(0, 0), (0, 1), (1, 1)]


class Passing(nn.Module):
    """The first one leaves something for all the others."""

    def forward(self, stream, kept):
        stream = stream + kept.get("it", 0)
        kept.setdefault("it", stream)
        return stream


def test_layers_are_of_two_kinds_if_only_one_leaves_something_for_others(monkeypatch):
    """The folds of one might change what the other leaves."""

    layers = nn.ModuleList([Passing() for _ in range(3)])

    def found(config, layer, short, long, changes):
        return Topology((Sublayer(f"of layer {[*layers].index(layer)}", ()),))

    monkeypatch.setattr(survey, "describe", found)
    calls = [LayerCall(({},), {}, False, "toy", mappings={0: 0}) for _ in layers]
    topologies = survey.survey(
        Mock(layers=layers), lambda text: (torch.zeros(*text.shape, 8), calls), torch.zeros(1, 8, dtype=torch.int64)
    )
    assert topologies.layers == (0, 1, 1)
    assert [topologies.of(index).sublayers[0].name for index in range(3)] == ["of layer 0", "of layer 1", "of layer 1"]
