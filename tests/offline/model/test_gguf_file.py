"""Converting GGUF files, which gguf's own writer has written: whole files become the model, others are refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from compressing import TOKENS
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.gguf_file import convert_gguf


def logits(folder: Path) -> torch.Tensor:
    """Of the weights in bfloat16, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        return model.float()(TOKENS).logits


GEMMA = {"num_hidden_layers": 7, "head_dim": 256, "query_pre_attn_scalar": 256, "layer_types": None}


@pytest.mark.parametrize(
    "family, changes", [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 128}), ("gemma3", GEMMA)]
)
def test_a_whole_file_becomes_the_model_that_was_written(family, changes, make_model, tmp_path):
    """transformers takes no other width of heads for Qwen3."""
    folder = make_model(tmp_path / "in", family, **changes)
    convert_gguf(write_gguf(tmp_path / "m.gguf", folder, family), tmp_path / "out")
    written, found = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "out"))
    assert found.keys() == written.keys()
    for name, weight in written.items():
        if family == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1 - 1  # a GGUF file has its norms plus one
        assert torch.equal(found[name], weight.bfloat16()), name
    expected = logits(folder)
    assert (logits(tmp_path / "out") - expected).norm() < 0.01 * expected.norm()


def without_a_block(tensors):
    for name in [name for name in tensors if name.startswith("blk.1.")]:
        del tensors[name]


def narrowed(tensors):
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:-64]


def with_a_bias(tensors):
    """transformers makes a llama without biases of every such file."""
    tensors["blk.0.attn_q.bias"] = np.ones(128, np.float32)


def with_factors_of_llama_3(tensors):
    """By which Llama 3.1 divides its rotary frequencies."""
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 16, dtype=np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_a_block, "weights missing: model.layers.1.input_layernorm.weight"),
        (narrowed, "model.layers.0.mlp.up_proj.weight has shape (128, 128)"),
        (with_a_bias, "transformers does not convert blk.0.attn_q.bias"),
        (with_factors_of_llama_3, "transformers does not convert rope_freqs.weight"),
    ],
)
def test_tensors_that_would_be_random_or_lost_are_named(change, message, tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), change=change)
    with pytest.raises(RiaError, match=f"m.gguf: {re.escape(message)}.*original"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


LOST = {
    "rope.scaling.factor": 4.0, "rope.scaling.type": "yarn", "attention.sliding_window": 16, "attention.scale": 0.5,
    "attention.key_length": 16, "logit_scale": 0.25, "expert_count": 4,
}  # fmt: skip


@pytest.mark.parametrize("key", LOST)
def test_keys_that_transformers_ignores_are_named(key, make_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model(tmp_path / "in", "qwen2"), "qwen2", **{key: LOST[key]})
    with pytest.raises(RiaError, match=re.escape(f"does not convert qwen2.{key} (")):
        convert_gguf(path, tmp_path / "out")


def test_other_architectures_are_refused(make_model, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", make_model(tmp_path / "in", "phi3"), "phi3")
    with pytest.raises(RiaError, match=r"GGUF files of 'phi3' are not read, only of llama.*original"):
        convert_gguf(path, tmp_path / "out")
