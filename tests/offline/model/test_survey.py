"""One experiment for each kind of layer of a stored model, and what happens if one is too large."""

import pytest
from compressing import run_small

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experiments import survey
from ria_vllm.offline.model.run.streaming import StreamedModel


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
