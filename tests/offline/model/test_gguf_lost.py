"""What transformers' reader leaves out of a GGUF file is refused; everything else is converted."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import TOKENS
from families import save_tokenizer
from gguf_files import write_gguf
from transformers import AutoConfig, AutoModelForCausalLM, Starcoder2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.gguf import gguf_file
from ria_vllm.offline.model.gguf.gguf_file import convert_gguf

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA2 = {"head_dim": 256}  # for which the reader has the scale
GEMMA3 = GEMMA2 | {"num_hidden_layers": 6, "layer_types": None}


def rotary(full: dict, local_base: float = 1e4) -> dict:
    """Gemma 3's: it scales its global layers only."""
    parameters = {"full_attention": full | {"rope_theta": 1e6}, "sliding_attention": PLAIN | {"rope_theta": local_base}}
    return GEMMA3 | {"rope_parameters": parameters}


def source(make_model, folder: Path, family: str, **changes) -> Path:
    if family != "starcoder2":
        return make_model(folder, family, **changes)
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Starcoder2Config(vocab_size=258, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **shape, **changes)
    config.initializer_range = 0.1
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    """Of the weights in bfloat16, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        return model.float()(TOKENS).logits


def distance(folder: Path, original: Path) -> float:
    expected = logits(original)
    return float((logits(folder) - expected).norm() / expected.norm())


WHOLE = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # the reader takes no other
    "phi3": {},
    "gemma2": GEMMA2,
    "gemma3": rotary({"rope_type": "default"}),
    "starcoder2": {"rope_parameters": PLAIN},
    "lfm2": {},
}


@pytest.mark.parametrize("family", WHOLE)
def test_what_nothing_is_lost_of_computes_the_same(family, make_model, tmp_path):
    folder = source(make_model, tmp_path / "in", family, **WHOLE[family])
    convert_gguf(write_gguf(tmp_path / "m.gguf", folder, family), tmp_path / "out")
    assert distance(tmp_path / "out", folder) < 0.01


LOST = {  # family, the original's configuration, what the header says of it, the message
    "linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "llama.rope.scaling.factor (4)",
    ),
    "linear, old": (
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope.scale_linear": 4.0}, "llama.rope.scale_linear (4)",
    ),
    "yarn": (
        "qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                      "original_max_position_embeddings": 32}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        "qwen2.rope.scaling.type (yarn) and qwen2.rope.scaling.factor (4)",
    ),
    "global layers": (
        "gemma3", rotary({"rope_type": "linear", "factor": 8.0}),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "gemma3.rope.scaling.factor (8)",
    ),
    "local layers": (
        "gemma3", rotary({"rope_type": "default"}, 50.0),
        {"rope.freq_base_swa": 50.0}, "gemma3.rope.freq_base_swa (50)",
    ),
    "base": ("starcoder2", {"rope_parameters": PLAIN | {"rope_theta": 50.0}}, {}, "starcoder2.rope.freq_base (50)"),
    "part of a head": (
        "phi3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, {}, "phi3.rope.dimension_count (16)",
    ),
    "window": ("phi3", {"sliding_window": 8}, {"attention.sliding_window": 8}, "phi3.attention.sliding_window (8)"),
    "layers with a window": (
        "gemma2", GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention.sliding_window_pattern": [False, True]}, "gemma2.attention.sliding_window_pattern",
    ),
    "soft caps": (
        "gemma2", GEMMA2 | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0},
        {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 5.0},
        "gemma2.attn_logit_softcapping (0.5), gemma2.final_logit_softcapping (5)",
    ),
    # llama.cpp scales a Gemma by the size of a head, unless it has 27B parameters.
    "scale": ("gemma2", {"query_pre_attn_scalar": 16, "head_dim": 16}, {}, "the scale of its attention (0.25)"),
    "norms": ("lfm2", {"norm_eps": 0.5}, {}, "lfm2.attention.layer_norm_rms_epsilon (0.5)"),
}  # fmt: skip


def converted(path: Path, out: Path, monkeypatch) -> Path:
    """As if nothing were lost."""
    with monkeypatch.context() as patch:
        patch.setattr(gguf_file, "lost", lambda header, model: ())
        convert_gguf(path, out)
    return out


@pytest.mark.parametrize("name", LOST)
def test_what_would_be_another_model_is_refused_by_name(name, make_model, tmp_path, monkeypatch):
    """A later transformers may read what this one ignores, and then nothing is refused."""
    family, changes, keys, message = LOST[name]
    folder = source(make_model, tmp_path / "in", family, **changes)
    path = write_gguf(tmp_path / "m.gguf", folder, family, **keys)
    if distance(converted(path, tmp_path / "unchecked", monkeypatch), folder) < 0.01:
        convert_gguf(path, tmp_path / "out")
        return
    said = re.escape(f"m.gguf: transformers does not convert {message}, so its model would compute something else. ")
    with pytest.raises(RiaError, match=said + "Give the original Hugging Face folder"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def llama3_factors(folder: Path) -> np.ndarray:
    """By what its frequencies are divided, as llama.cpp's converter writes it."""
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    return (1e4 ** -(torch.arange(len(frequencies)) / len(frequencies)) / frequencies).numpy().astype(np.float32)


def test_the_factors_of_llama_3_are_not_lost_in_silence(make_model, tmp_path, monkeypatch):
    folder = make_model(tmp_path / "in", "llama", rope_parameters=LLAMA3)
    factors = llama3_factors(folder)
    assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(8)
    change = lambda tensors: tensors.update({"rope_freqs.weight": factors})  # noqa: E731
    path = write_gguf(tmp_path / "m.gguf", folder, change=change)
    with pytest.raises(RiaError, match="m.gguf: transformers does not convert rope_freqs.weight, so"):
        convert_gguf(path, tmp_path / "out")
    assert distance(converted(path, tmp_path / "out", monkeypatch), folder) > 0.02


def test_the_two_sets_of_factors_of_phi_are_not_lost_in_silence(make_model, tmp_path):
    factors = {f"rope_factors_{kind}.weight": np.full(16, 2, np.float32) for kind in ("long", "short")}
    path = write_gguf(tmp_path / "m.gguf", make_model(tmp_path / "in", "phi3"), "phi3", lambda t: t.update(factors))
    with pytest.raises(RiaError, match="convert rope_factors_long.weight and rope_factors_short.weight, so"):
        convert_gguf(path, tmp_path / "out")


IGNORED = {  # key: a value that changes the model, one that does not
    "attention.causal": (False, True), "attention.scale": (0.5, 32**-0.5), "expert_gating_func": (2, 1),
    "expert_weights_scale": (2.5, 1.0), "logit_scale": (0.25, 0.0), "residual_scale": (0.2, 1.0),
    "embedding_scale": (12.0, 0.0), "attention.clamp_kqv": (8.0, 0.0), "ssm.dt_b_c_rms": (True, False),
    "expert_group_count": (4, 1), "rope.scaling.attn_factor": (1.2, 1.0), "router_logit_softcapping": (30.0, 0.0),
    "rope.scaling.factor": (2.0, 0.0), "rope.scaling.type": ("longrope", "none"), "attention.sliding_window": (16, 128),
}  # fmt: skip


@pytest.mark.parametrize("key", IGNORED)
def test_keys_without_a_place_in_transformers_model_are_refused_by_name(key, tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), **{key: IGNORED[key][0]})
    with pytest.raises(RiaError, match=re.escape(f"convert llama.{key} (")):
        convert_gguf(path, tmp_path / "out")


def test_values_that_change_nothing_are_no_loss(tiny, tmp_path):
    """llama.cpp writes them when it saves a model, and softcaps that this architecture does not heed."""
    keys = {key: value for key, (_, value) in IGNORED.items()} | {"attn_logit_softcapping": 50.0}
    ones = {"rope_freqs.weight": np.ones(16, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), change=lambda tensors: tensors.update(ones), **keys)
    convert_gguf(path, tmp_path / "out")
    assert distance(tmp_path / "out", tiny("llama")) < 0.01


def test_a_key_of_another_type_is_named(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), **{"rope.scaling.factor": "two"})
    with pytest.raises(RiaError, match="m.gguf: llama.rope.scaling.factor in its header is not a number"):
        convert_gguf(path, tmp_path / "out")
