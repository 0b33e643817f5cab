"""Tiny random models of every family, as Hugging Face folders with a byte-level tokenizer."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "The quick brown fox jumps over the lazy dog, and the sun goes down behind the hills. "
# Arguments of vLLM's `LLM` for latent attention on CPUs. vLLM's operator for rotary embeddings there is wrong for
# queries of that shape; what it compiles, and takes here, is right. Its attention for AMX takes no float32.
ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
LATENT_ATTENTION = ROTARY | {"attention_backend": "CPU_MLA"}


def config_of(family: str, **changes: Any) -> Any:
    import transformers as t

    base = {
        "vocab_size": 258,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    opt = {"ffn_dim": 192, "word_embed_proj_dim": 128}
    moe = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    window = {"head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    experts = moe | {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "head_dim": 16}
    latent = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    deepseek = experts | latent | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    linear_attention = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "head_dim": 32,
    }  # fmt: skip
    gemma4 = window | {"global_head_dim": 64, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    # The last two layers read the keys and values of the first two.
    shared = {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 64, "head_dim": 32,
        "vocab_size_per_layer_input": 258, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    altup = {
        "intermediate_size": [192] * 4, "laurel_rank": 64, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }  # fmt: skip
    hybrid = {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 32,
        "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 4, "moe_intermediate_size": 64, "head_dim": 32,
        "moe_shared_expert_intermediate_size": 64, "num_hidden_layers": 4,
    }  # fmt: skip
    families = {
        "llama": (t.LlamaConfig, {}),
        "llama-mha": (t.LlamaConfig, {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        "llama-mqa": (t.LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        "mistral": (t.MistralConfig, {"head_dim": 16, "sliding_window": 16}),
        "qwen2": (t.Qwen2Config, {}),
        "qwen3": (t.Qwen3Config, {"head_dim": 48}),
        "gemma2": (t.Gemma2Config, window),
        "gemma3": (t.Gemma3TextConfig, window),
        "phi3": (t.Phi3Config, {}),
        "opt": (t.OPTConfig, opt),
        "opt-postnorm": (t.OPTConfig, opt | {"do_layer_norm_before": False, "word_embed_proj_dim": 64}),
        "gpt-neox": (t.GPTNeoXConfig, {}),
        "olmo2": (t.Olmo2Config, {}),
        "cohere2": (t.Cohere2Config, {"sliding_window": 16}),
        "gemma4": (t.Gemma4TextConfig, gemma4),
        "gemma4-e2b": (t.Gemma4TextConfig, shared | {"use_double_wide_mlp": True, "global_head_dim": 64}),
        "gemma3n": (t.Gemma3nTextConfig, shared | altup),
        "qwen3-moe": (t.Qwen3MoeConfig, moe),
        "deepseek-v3": (t.DeepseekV3Config, deepseek),
        "lfm2": (t.Lfm2Config, {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
        "qwen3.5": (t.Qwen3_5TextConfig, linear_attention),
        "nemotron-h": (t.NemotronHConfig, hybrid),
        "mamba": (t.MambaConfig, {"state_size": 8}),
        "bloom": (t.BloomConfig, {"n_layer": 2, "n_head": 4}),
        "gpt2": (t.GPT2Config, {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    }
    kind, own = families[family]
    return kind(**base | own | changes)


def save_tokenizer(folder: Path, **settings: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **settings)
    fast.save_pretrained(folder)


def save_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Random weights with channels of different scales, so that permutations have something to gain."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return save_scaled(AutoModelForCausalLM.from_config(config_of(family, **changes)).to(dtype), folder)


def save_scaled(model: Any, folder: Path) -> Path:
    """Save a model, with channels of different scales."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(torch.rand(parameter.shape[1]).add(0.2).to(parameter.dtype))
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape).mul(0.1).to(parameter.dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`save_model`, for tests that change the configuration."""
    return save_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of a float32 model. Do not write into it."""
    return cache(lambda family: save_model(tmp_path_factory.mktemp(family) / "dense", family))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 60 kB."""
    draw = torch.Generator().manual_seed(0)
    words = TEXT.split()
    picks = torch.randint(len(words), (12000,), generator=draw).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(words[i] for i in picks[k : k + 12]) for k in range(0, len(picks), 12)))
    return path
