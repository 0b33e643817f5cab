"""Which class a checkpoint is of, where its text decoder is, and how it is run without the rest."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from compressing import edit_config, run_small
from families import config_of
from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM
from wrappers import WRAPPERS, wrapper_config

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.architecture import find_decoder, model_class, output_head, output_heads
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.streaming import StreamedModel

TOKENS = torch.arange(2, 50).view(2, 24)
FAST = ("gemma3", "qwen2_5_vl", "idefics3")
FAMILIES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in WRAPPERS]


def decoder_layers_of(model):
    """transformers' own word for it."""
    decoder = model.get_decoder()
    return getattr(decoder, "model", decoder).layers


@torch.no_grad()
def output_of_last_layer(folder: Path, family: str) -> torch.Tensor:
    """Of the wrapper's own forward pass on text."""
    # With the fused kernels that transformers chooses by itself, PaliGemma's text reads later tokens.
    options = {"attn_implementation": "eager"} if family == "paligemma" else {}
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    found = []
    decoder_layers_of(model)[-1].register_forward_hook(lambda module, args, out: found.append(out))
    model(input_ids=TOKENS, use_cache=False)
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layers_run_one_by_one_as_in_the_wrapper(family, tiny_wrapper):
    folder = tiny_wrapper(family)
    model = StreamedModel(folder, AutoConfig.from_pretrained(folder), torch.device("cpu"), torch.float32)
    assert model.layers is decoder_layers_of(model.model)
    embedder = Embedder(model)
    embedder.learn_form(TOKENS[:1])
    stream, calls = embedder(TOKENS)
    outside = {n: p for n, p in model.model.named_parameters() if not n.startswith(f"{model.decoder_path}.")}
    loaded = [name for name, parameter in outside.items() if not parameter.is_meta]
    assert len(loaded) <= 1 < len(outside)  # at most the one that tells the wrapper its device
    for index, call in enumerate(calls):
        stream = call(model.load_layer(index), stream)
        model.free_layer(index)
    torch.testing.assert_close(stream, output_of_last_layer(folder, family), rtol=1e-5, atol=1e-5)
    embedder.close()
    assert all(parameter.is_meta for parameter in model.model.parameters())


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma3", {"use_bidirectional_attention": True}), ("qwen3", {"is_causal": False})]
)
@torch.no_grad()
def test_layers_of_embedding_models_see_later_tokens_as_in_the_model(family, changes, tmp_path):
    torch.manual_seed(0)
    config = config_of(family, **changes)
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = StreamedModel(tmp_path, AutoConfig.from_pretrained(tmp_path), torch.device("cpu"), torch.float32)
    assert type(model.model) is type(whole)
    embedder = Embedder(model)
    embedder.learn_form(TOKENS[:1])
    stream, calls = embedder(TOKENS)
    for index, call in enumerate(calls):
        stream = call(model.load_layer(index), stream)
        model.free_layer(index)
    found = []
    hook = whole.layers[-1].register_forward_hook(lambda module, args, out: found.append(out))
    whole(input_ids=TOKENS, use_cache=False)
    whole(input_ids=TOKENS[:, :-1], use_cache=False)
    hook.remove()
    found, other = (out[0] if isinstance(out, tuple) else out for out in found)
    torch.testing.assert_close(stream, found, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, found[:, :-1], atol=1e-3)  # the last token matters to those before it


def test_omni_models_hold_several_decoders():
    """Only the thinker reads text; the talker has as many layers here."""
    config = transformers.Qwen2_5OmniConfig()
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    assert find_decoder(model, Path("x")) == ("thinker.model", "thinker.model.layers")
    assert output_head(model) is None and output_heads(model, "thinker.model") == [model.thinker.lm_head]


def test_the_named_architecture_is_taken():
    config = transformers.LlamaConfig(architectures=["LlamaForSequenceClassification"])
    assert model_class("x", config) is transformers.LlamaForSequenceClassification
    assert model_class("x", transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    assert model_class("x", wrapper_config("llava")) is transformers.LlavaForConditionalGeneration


NOT_DECODERS = {
    "siglip_vision_model": "has no text decoder",
    "vit": "has no text decoder",
    "clip": "has no text decoder",
    "wav2vec2": "has no text decoder",
    "bert": "has no text decoder",
    "modernbert": "has no text decoder",
    "t5": "a t5 model is an encoder and a decoder",
    "whisper": "a whisper model is an encoder and a decoder",
    "florence2": "a florence2 model is an encoder and a decoder",
    "bart": "a bart model is an encoder and a decoder",
}


@pytest.mark.parametrize("model_type", NOT_DECODERS)
def test_what_has_no_text_decoder_is_refused_by_name(model_type, model, text, tmp_path):
    config = AutoConfig.for_model(model_type).to_dict()
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(RiaError, match=f"model: .*{NOT_DECODERS[model_type]}"):
        run_small(model, tmp_path / "out", text)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["BertModel", "os", "LlavaForConditionalGeneration", 7])
def test_architectures_that_do_not_belong_to_the_configuration(name, model, text, tmp_path):
    for said in ([name], name):
        edit_config(model, architectures=said)
        with pytest.raises(
            RiaError, match=f"says {name}, which is no class of transformers for a llama model.*ForCausalLM"
        ):
            run_small(model, tmp_path / "out", text)


def test_layers_that_read_keys_and_values_in_an_unknown_way(make_model, text, tmp_path, monkeypatch):
    """Here through a variable that is not among the arguments of a layer."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

    kept = {}

    def forward(self, *args, **kwargs):
        return real(self, *args, **kwargs | {"shared_kv_states": kept})

    real = Gemma4TextAttention.forward
    monkeypatch.setattr(Gemma4TextAttention, "forward", forward)
    message = "config.json says that its last 2 layers read the keys .* 0 were seen to do so.* Another version of tran"
    with pytest.raises(RiaError, match=message):
        run_small(make_model(tmp_path / "in", "gemma4-e2b"), tmp_path / "out", text)


def test_a_layer_that_reads_what_another_one_left_is_never_given_something_else(
    tiny_wrapper, text, tmp_path, monkeypatch
):
    """Gemma 4's layers put keys and values into a dictionary. One that reads it, alone, finds nothing there."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention

    def forward(self, *args, **kwargs):
        if self.layer_idx == 1 and not self.q_proj.weight.is_meta:
            kwargs["shared_kv_states"]["sliding_attention"]
        return real(self, *args, **kwargs)

    real = Gemma4TextAttention.forward
    monkeypatch.setattr(Gemma4TextAttention, "forward", forward)
    message = (
        "model.language_model.layers.1: transformers cannot run Gemma4TextDecoderLayer by itself.*sliding_attention"
    )
    with pytest.raises(RiaError, match=message):
        run_small(tiny_wrapper("gemma4"), tmp_path / "out", text)


def test_vision_weights_are_checked_though_they_are_only_copied(tiny_wrapper, text, tmp_path):
    from compressing import edit_weights

    source = Path(shutil.copytree(tiny_wrapper("llava"), tmp_path / "in"))
    names = []

    def change(tensors):
        names.append(next(name for name in sorted(tensors) if "vision" in name))
        tensors[names[0]] = torch.full_like(tensors[names[0]], float("nan"))

    edit_weights(source, change)
    with pytest.raises(RiaError, match=f"{names[0]}: NaN or infinite"):
        run_small(source, tmp_path / "out", text)
    edit_weights(source, lambda tensors: {name: tensors[name] for name in tensors if name != names[0]})
    with pytest.raises(RiaError, match="no weights for .*vision"):
        run_small(source, tmp_path / "out", text)
