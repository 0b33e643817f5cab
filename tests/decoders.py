"""Tiny random decoders of many families, in memory, and how each of their layers is called."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ria_vllm.offline.model.experiments.describe import describe
from ria_vllm.offline.model.experiments.survey import kinds_of
from ria_vllm.offline.model.run.architecture import decoder_layers
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.topology import Topologies

BASE = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "head_dim": 16,
}  # fmt: skip
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24,
    "v_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | {
        "num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "sliding_window": 16,
        "global_attn_every_n_layers": 2,
    },
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "deepseek_v3": EXPERTS | LATENT | {"n_routed_experts": 4},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96},
    "gemma2": {"sliding_window": 16},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32, "sliding_window": 16,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    },
    "gemma3n_text": {
        "intermediate_size": [96] * 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
        "laurel_rank": 32, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 258,
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": MAMBA | {
        "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "kimi_linear": EXPERTS | LATENT | {
        "q_lora_rank": None, "num_experts": 4, "num_experts_per_token": 2, "num_expert_group": 1,
        "num_shared_experts": 1, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16,
        "linear_num_heads": 4, "mlp_layer_types": ["dense", "sparse"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "minicpm3": LATENT,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nemotron_h": EXPERTS | {
        "layers_block_type": ["moe", "attention"], "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 32,
    },
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen2_moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_next": EXPERTS | LINEAR_ATTENTION | {"num_experts": 4, "shared_expert_intermediate_size": 32},
}  # fmt: skip


class Halved(nn.Module):
    """A linear whose positive outputs are halved, if it has more than `beyond` of them."""

    def __init__(self, linear: nn.Linear, beyond: int = 0):
        super().__init__()
        self.linear, self.beyond = linear, beyond

    def forward(self, x):
        y = self.linear(x)
        return torch.where(y > 0, y / 2, y) if y.shape[-1] > self.beyond else y


def small(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny float32 model in which every parameter is random, norms and biases included."""
    own = OWN.get(model_type, {}) | changes
    known = AutoConfig.for_model(model_type).to_dict() | AutoConfig.for_model(model_type).__dict__
    base = {name: value for name, value in BASE.items() if name in known or model_type in own}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **base | own)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return model.requires_grad_(False)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_submodule(decoder_layers(model, model.config.num_hidden_layers))


def calls_of(model: PreTrainedModel, tokens: torch.Tensor) -> list[tuple[LayerCall, torch.Tensor]]:
    """How the model calls each of its layers, and the stream into it."""
    calls: list[tuple[LayerCall, torch.Tensor]] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        by_name = "hidden_states" in kwargs
        stream = kwargs["hidden_states"] if by_name else args[0]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((LayerCall(args if by_name else args[1:], others, by_name, "layer"), stream))

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers_of(model)]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for handle in hooks:
        handle.remove()
    return calls


def in_float64(model: PreTrainedModel) -> None:
    """Make a model compute in float64, as far as transformers does."""
    model.double()
    model.config._experts_implementation = "eager"  # the others do not compute in float64


def check_same(logits: torch.Tensor, before: torch.Tensor) -> None:
    """Check that a change of a model in float64 has changed nothing."""
    # transformers computes norms, softmax and some mixers in float32, whatever the model's dtype is.
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


def described(model: PreTrainedModel) -> Topologies:
    """The topologies of the model's layers, found by experiment."""
    layers = layers_of(model)
    short, long = (calls_of(model, torch.arange(2, 2 + count)[None]) for count in (8, 100))
    kinds = kinds_of(layers)
    first = [kinds.index(kind) for kind in range(max(kinds) + 1)]
    with torch.no_grad():
        return Topologies.of_kinds([describe(model.config, layers[i], short[i], long[i]) for i in first], kinds)


def lines(topologies: Topologies) -> Iterator[str]:
    """What a topology says, one kind after the other, as text that fits a table."""
    for topology in topologies.kinds:
        for part in topology.sublayers:
            ends = f" until {part.ends_before}" if part.ends_before else ""
            without = "".join(
                f" without {one.module}/{one.returns}{' but the stream' if one.passes_stream else ''}"
                for one in part.stand_ins
            )
            yield f"{part.name}{ends}{without}{_joins(part)}"
            for stage in part.stages:
                yield "  " + " | ".join(_group(group) for group in stage)
        for fold in topology.folds:
            heads = f" {fold.num_heads}/{fold.num_kv_heads}" if fold.coupling == "heads" else ""
            yield f"  {fold.consumer} <- {', '.join(map(_producer, fold.producers))}{heads}"


def _joins(part: Any) -> str:
    factor = "" if part.factor == 1 else f" {part.factor} *"
    return f" +{factor}{'' if part.norm is None else ' ' + part.norm}" if part.factor else ""


def _group(group: Any) -> str:
    heads = f" heads {group.heads.num_heads}/{group.heads.num_kv_heads}x{group.heads.head_dim}" if group.heads else ""
    within = " within ranks" if group.within_ranks else ""
    experts = f" experts {group.experts}" if group.experts else ""
    return f"{' '.join(group.linears)}{heads}{within}{experts}".strip()


def _producer(producer: Any) -> str:
    rows = "" if producer.rows is None else f"[{producer.rows[0]}:{producer.rows[1]}]"
    return f"{producer.name}{rows}{f'x{producer.blocks}' if producer.blocks > 1 else ''}"
