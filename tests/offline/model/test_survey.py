"""One experiment for each kind of layer of a stored model, and what happens if one is impossible."""

from unittest.mock import Mock

import pytest
import torch
from compressing import check_complete, check_export, run_small
from torch import nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from ria_vllm.offline.model.experiments import survey
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Sublayer, Topology


def test_a_kind_without_an_experiment_is_pruned_without_folds(tiny, text, tmp_path, monkeypatch):
    """Such as one whose convolution does not run in float64."""

    def forward(self, hidden_states, **kwargs):
        assert hidden_states.dtype != torch.float64, "no float64 here"
        return real(self, hidden_states, **kwargs)

    real = Lfm2ShortConv.forward
    monkeypatch.setattr(Lfm2ShortConv, "forward", forward)
    report, warnings = run_small(tiny("lfm2"), tmp_path / "out", text)
    (warning,) = [text for text in warnings if "without folds" in text]
    assert warning.startswith("model.layers.0 and its like: ") and "no float64 here" in warning
    reader = check_complete(tiny("lfm2"), tmp_path / "out")
    check_export(tiny("lfm2"), reader, tmp_path / "dense")
    folded = {name for name, _, _ in reader.schema.active_folds(reader.permuted_names, set(reader.sparse_names))}
    assert folded == {"model.layers.1.self_attn.out_proj", "model.layers.1.feed_forward.w2"}
    assert {"model.layers.0.conv.in_proj", "model.layers.0.feed_forward.w2"} <= set(report["linears"])


@pytest.mark.parametrize("refused", ["before", "MemoryError", "RuntimeError"])
def test_a_layer_too_large_for_memory_is_pruned_without_folds(refused, tiny, text, tmp_path, monkeypatch):
    if refused == "before":
        monkeypatch.setattr(survey, "available", lambda device: 100_000)
    else:
        error = {"MemoryError": MemoryError(), "RuntimeError": RuntimeError("can't allocate memory")}[refused]
        monkeypatch.setattr(survey, "describe", Mock(side_effect=error))
    report, warnings = run_small(tiny("llama"), tmp_path / "out", text)
    (warning,) = [text for text in warnings if "without folds" in text]
    assert "memory" in warning or "GB are free" in warning
    assert report["recipe"]["topology"][0]["folds"] == [] and len(report["linears"]) == 14
    check_complete(tiny("llama"), tmp_path / "out")


def test_one_experiment_for_each_kind_and_no_weights_are_read(tiny, text, tmp_path, monkeypatch):
    described, loaded = [], []
    describe, load_layer = survey.describe, StreamedModel.load_layer

    def watched(config, layer, short, long):
        assert short[1].shape[1] == 8 < long[1].shape[1]
        assert all(parameter.is_meta for parameter in layer.parameters())
        described.append(type(layer).__name__)
        return describe(config, layer, short, long)

    def load(self, index):
        loaded.append((index, len(described)))
        return load_layer(self, index)

    monkeypatch.setattr(survey, "describe", watched)
    monkeypatch.setattr(StreamedModel, "load_layer", load)
    run_small(tiny("llama"), tmp_path / "out", text)
    assert described == ["LlamaDecoderLayer"]
    assert loaded == [(0, 0), (0, 1), (1, 1)]


class Passing(nn.Module):
    """The first one leaves something for all the others."""

    def forward(self, stream, kept):
        stream = stream + kept.get("it", 0)
        kept.setdefault("it", stream)
        return stream


def test_layers_are_of_two_kinds_if_only_one_leaves_something_for_others(monkeypatch):
    """The folds of one might change what the other leaves."""

    def found(model, index, short, long):
        return Topology((Sublayer(f"of layer {index}", ()),)), []

    monkeypatch.setattr(survey, "_describe", found)
    layers = nn.ModuleList([Passing() for _ in range(3)])
    calls = [LayerCall(({},), {}, False, "toy", mappings={0: 0}) for _ in layers]
    topologies = survey.survey(
        Mock(layers=layers), lambda text: (torch.zeros(*text.shape, 8), calls), torch.zeros(1, 8, dtype=torch.int64)
    )
    assert topologies.layers == (0, 1, 1)
    assert [topologies.of(index).sublayers[0].name for index in range(3)] == ["of layer 0", "of layer 1", "of layer 1"]
