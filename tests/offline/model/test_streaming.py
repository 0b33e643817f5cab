"""Models that cannot be loaded or run: each error names the file, tensor or layer."""

import shutil
from pathlib import Path

import pytest
import torch
from compressing import edit_config, edit_weights, run_small
from decoders import small
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaModel

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.run import compress


def test_a_linear_that_one_of_the_layers_does_not_use(tiny, text, tmp_path, monkeypatch):
    def forward(self, x):
        return x if self is LlamaMLP.idle else real(self, x)

    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    layers = StreamedModel.load_layer

    def load_layer(self, index):
        LlamaMLP.idle = self.layers[1].mlp
        return layers(self, index)

    monkeypatch.setattr(LlamaMLP, "idle", None, raising=False)
    monkeypatch.setattr(StreamedModel, "load_layer", load_layer)
    message = "model.layers.1.mlp.gate_proj: not used in this layer, but in others like it.*--ignore mlp.gate_proj"
    with pytest.raises(RiaError, match=message):
        run_small(tiny("llama"), tmp_path / "out", text)
    options = {"ignore": (r"1\.mlp",), "weights": "int8", "activations": "int8", "smooth": 0.5}
    report, _ = run_small(tiny("llama"), tmp_path / "out", text, **options)
    assert {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")} == set(report["dense_in_int8"])
    assert list(Reader(tmp_path / "out").problems()) == []


def test_a_layer_that_does_not_run_by_itself_is_named(tiny, text, tmp_path, monkeypatch):
    def forward(self, *args, **kwargs):
        if self.self_attn.layer_idx == 1 and not self.input_layernorm.weight.is_meta:
            raise TypeError("needs more")
        return real(self, *args, **kwargs)

    real = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    message = "llama.*/dense: model.layers.1: transformers cannot run LlamaDecoderLayer by itself.*needs more"
    with pytest.raises(RiaError, match=message):
        run_small(tiny("llama"), tmp_path / "out", text)


def test_models_that_do_more_than_call_one_layer_after_another(tiny, text, tmp_path, monkeypatch):
    def changing(self, input_ids, **_):
        stream = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(stream, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            stream = layer(stream, position_embeddings=rotary) * 2
        return stream

    monkeypatch.setattr(LlamaModel, "forward", changing)
    message = "model.layers.1: LlamaForCausalLM changes the residual stream before this layer"
    with pytest.raises(RiaError, match=message):
        run_small(tiny("llama"), tmp_path / "out", text)
    monkeypatch.setattr(LlamaModel, "forward", lambda self, input_ids, **_: self.embed_tokens(input_ids))
    with pytest.raises(RiaError, match="LlamaForCausalLM does not call its decoder layers one after another"):
        run_small(tiny("llama"), tmp_path / "out", text)


def change_config(**changes):
    return lambda folder: edit_config(folder, **changes)


def change_tensors(**extra):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update(extra))


ODD = {
    "no weights for model.layers.2.": change_config(num_hidden_layers=3),
    "no list of 0 decoder layers": change_config(num_hidden_layers=0),
    "mtp.x.compressed is in the files, which is a name that only compressed": change_tensors(
        **{"mtp.x.compressed": torch.ones(4, 4)}
    ),
    "mtp.x.weight: NaN": change_tensors(**{"mtp.x.weight": torch.full((4,), float("nan"))}),
}


@pytest.mark.parametrize("message", ODD)
def test_odd_folders_are_refused_before_any_work(message, tiny, text, tmp_path, monkeypatch):
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "in"))
    ODD[message](source)
    monkeypatch.setattr(compress._Run, "compress", lambda *_: pytest.fail("work had begun"))
    with pytest.raises(RiaError, match=message):
        run_small(source, tmp_path / "out", text)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("model_type", ["falcon_h1", "gemma3_text", "gpt_oss"])
def test_buffers_that_no_file_holds_are_as_in_transformers(model_type, tmp_path):
    """Falcon-H1's are computed by the decoder around its layers."""
    model = small(model_type)
    model.save_pretrained(tmp_path)
    streamed = StreamedModel(tmp_path, model.config, torch.device("cpu"))
    expected = dict(model.named_non_persistent_buffers())
    assert expected
    for name, buffer in streamed.model.named_non_persistent_buffers():
        torch.testing.assert_close(buffer, expected.pop(name), rtol=0, atol=0)
    assert not expected
