"""What we need from transformers: models in the right dtype, and errors in our own words."""

from types import SimpleNamespace

import pytest
import torch
from compressing import edit_config, edit_weights, edited, run_small
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from wrappers import save_wrapper

import ria_vllm.hf.install  # noqa: F401  loads pruned folders
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.errors import RiaError
from ria_vllm.export import export_dense
from ria_vllm.offline.model.run.hf import configured_dtype, load_model, read_config
from ria_vllm.offline.model.run.streaming import StreamedModel

CPU = torch.device("cpu")


def test_a_bf16_model_in_float32_computes_what_a_float32_model_would(make_model, tmp_path):
    """Gemma multiplies its embeddings by a factor that bfloat16 cannot hold; frequencies stay in float32 throughout."""
    folder = make_model(tmp_path / "model", "gemma3", dtype=torch.bfloat16)
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(2, 60)[None]
    silent = edited(folder, tmp_path / "silent", lambda tensors: None, dtype=None)
    for source in (folder, silent):
        model = load_model(str(source), CPU, "float32")
        assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, wide(tokens).logits)
    frequencies = [b for name, b in load_model(str(folder), CPU, "bfloat16").named_buffers() if "inv_freq" in name]
    assert frequencies and all(buffer.dtype == torch.float32 for buffer in frequencies)


@pytest.mark.parametrize("wrong", [{"hidden_size": "128"}, {"eos_token_id": "</s>"}, {"vocab_size": -3}], ids=str)
def test_what_transformers_refuses_in_a_configuration_is_an_error_with_the_folder(wrong, model):
    """Whatever it raises for that: its own types, AssertionError."""
    edit_config(model, **wrong)
    with pytest.raises(RiaError, match=f"^{model}: transformers cannot load it: ."):
        load_model(str(model), CPU, "float32")


def sharp(tensors):
    """Attention's logits far beyond a soft cap of 0.5."""
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            tensors[name] *= 3


@pytest.mark.parametrize("kind", ["dense", "compressed", "wrapper"])
def test_attention_of_gemma_2_keeps_its_soft_cap(kind, make_model, text, tmp_path):
    """Unlike in the fused kernels that transformers chooses by itself."""
    capped, auto, source = {"attn_logit_softcapping": 0.5}, AutoModelForCausalLM, tmp_path / "dense"
    if kind == "wrapper":
        auto = AutoModelForMultimodalLM
        save_wrapper(source, "paligemma", model_type="gemma2", layer_types=["full_attention"] * 2, **capped)
    else:
        make_model(source, "gemma2", **capped)
    edit_weights(source, sharp)
    folder, oracle = source, source
    if kind == "compressed":
        folder, oracle = tmp_path / "out", tmp_path / "exported"
        run_small(source, folder, text)
        export_dense(Reader(folder), oracle, 1 << 40)
    tokens = torch.arange(2, 60)[None]
    with torch.no_grad():
        found = load_model(str(folder), CPU)(input_ids=tokens).logits
        eager, fused = (
            auto.from_pretrained(oracle, attn_implementation=way).eval()(input_ids=tokens).logits
            for way in ("eager", "sdpa")
        )
    assert torch.equal(found, eager)
    assert not torch.allclose(found, fused, atol=0.1)


def test_paligemma_does_not_read_later_tokens(tiny_wrapper):
    """Where there is no image. transformers' choice of attention does, because its layers call themselves
    bidirectional; vLLM's does not."""
    folder = tiny_wrapper("paligemma")
    streamed = StreamedModel(folder, read_config(str(folder)), CPU)
    base = streamed.load_base()
    for index in range(len(streamed.layers)):
        streamed.load_layer(index)
    tokens = torch.arange(2, 60)[None]
    others = torch.cat([tokens[:, :30], tokens[:, 30:] + 100], 1)

    def reads_later_tokens(model):
        with torch.no_grad():
            one, other = (model(input_ids=ids, use_cache=False)[0][:, :30] for ids in (tokens, others))
        return not torch.equal(one, other)

    assert reads_later_tokens(AutoModelForMultimodalLM.from_pretrained(folder).eval())
    assert not reads_later_tokens(load_model(str(folder), CPU))
    assert not reads_later_tokens(base)


@pytest.mark.parametrize(
    ("own", "of_text", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
        (None, "bfloat16", torch.bfloat16),
        (None, None, None),
        ("junk", None, None),
    ],
)
def test_the_dtype_that_a_configuration_names(own, of_text, expected):
    config = SimpleNamespace(dtype=own, get_text_config=lambda **_: SimpleNamespace(dtype=of_text))
    assert configured_dtype(config) == expected
