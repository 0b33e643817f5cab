"""Tiny random MoE models, as Hugging Face folders with a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import torch
from families import save_tokenizer

BASE = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "moe_intermediate_size": 128, "first_k_dense_replace": 0,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 64,
}  # fmt: skip
GEMMA_4 = {
    "enable_moe_block": True, "top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"],
    "attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
    "qwen3_moe": {},
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "olmoe": {},
    "phimoe": {},
    "granitemoe": {},
    "glm4_moe": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma4_text": GEMMA_4,
    "nemotron_h": {"layers_block_type": ["moe", "moe"], "n_groups": 2, "moe_shared_expert_intermediate_size": 64},
    "gpt_oss": {"layer_types": ["full_attention", "full_attention"], "intermediate_size": 64},
    "llama4_text": {
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 128,
        "intermediate_size": 128,
    },
}


def save_moe(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Random weights with channels of different scales, so that permutations have something to gain."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **BASE | KINDS.get(kind, {}) | changes)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.normal_(0, 0.1).mul_(torch.rand(parameter.shape[-1]).add(0.2).to(dtype))
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape).mul(0.1).to(dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def gpt_oss_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What the down projection of an expert of gpt-oss reads."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)
