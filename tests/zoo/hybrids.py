"""Text models whose layers are of several kinds: linear attention, Mamba or convolutions beside attention."""

from zoo.experts import CORRECTION, EXPERTS, FIRST_DENSE, PLAIN, UNCORRECTED
from zoo.text import LATENT
from zoo.toy import Toy

BFLOAT16 = "in bfloat16, the only dtype of vLLM's linear attention on CPUs"
# vLLM's CPU code takes heads of 128 channels only.
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_head_dim": 128, "linear_num_heads": 4,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
STEPS = {"time_step_min": 1e-8}
ANY_STEPS = "without a least time step, to which transformers raises Mamba's, and vLLM does not"
NEMOTRON = EXPERTS | STEPS | {
    "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16,
    "moe_shared_expert_intermediate_size": 128,
}  # fmt: skip
# In the configs on the hub. transformers does without.
CONVOLUTION = {"conv_dim": 128, "block_dim": 128}

# In the configs on the hub, as vLLM reads them: layers are counted from 1.
KIMI = {
    "mla_use_nope": True, "moe_router_activation_func": "sigmoid",
    "linear_attn_config": {
        "kda_layers": [1], "full_attn_layers": [2], "head_dim": 128, "num_heads": 4, "short_conv_kernel_size": 4,
    },
}  # fmt: skip

# So slow that positions make no difference to attention.
NO_ROTATION = {"rope_parameters": {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 1e9, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1,
}}  # fmt: skip
UNROTATED = (
    "without positions in attention: given [tokens, heads, width], vLLM's CPU kernel, which serves without "
    "compilation, rotates only as many heads as there are tokens"
)
LFM2 = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False} | NO_ROTATION

HYBRIDS = {
    "bamba": Toy(MAMBA | {"attn_layer_indices": [1]}, not_served="vLLM has dropped it"),
    "falcon_h1": Toy(MAMBA | {"mamba_d_ssm": 256}),
    "granitemoehybrid": Toy(PLAIN | MAMBA | {
        "layer_types": ["mamba", "attention"], "attention_multiplier": 0.18, "shared_intermediate_size": 128,
    }, mechanism="Mamba-2 and attention, and experts"),
    "jamba": Toy(PLAIN | {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 16, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    }, not_served="vLLM's CPU build has no selective scan",
                 stays_dense={".mamba.": "vLLM serves a Mamba-1 mixer dense only"}),
    "kimi_linear": Toy(FIRST_DENSE | LATENT | GATED_DELTA | {"q_lora_rank": None}, dtype="bfloat16",
                       edits=KIMI, renames={"model.layers.0.block_sparse_moe.": "model.layers.0.mlp."},
                       gathers={"self_attn.o_proj": "a norm of linear attention has a weight for each channel"},
                       not_served="vLLM has it for GPUs only"),
    "lfm2": Toy(LFM2, edits=CONVOLUTION, shaped=UNROTATED),
    "lfm2_moe": Toy(FIRST_DENSE | NO_ROTATION | {
        "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    }, zeros=CORRECTION, shaped=f"{UNROTATED}; {UNCORRECTED}"),
    "mamba2": Toy({"state_size": 16, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
                  no_fold="each consumer has a convolution and a norm before it"),
    "nemotron_h": Toy(NEMOTRON | {"layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
                      shaped=ANY_STEPS),
    "nemotron_h_moe": Toy(NEMOTRON | {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4,
    }, model_type="nemotron_h", not_served="vLLM's CPU build has no experts without a gate"),
    "olmo_hybrid": Toy(GATED_DELTA | {"linear_num_key_heads": 4}, dtype="bfloat16",
                       not_served="vLLM's kernel of it needs Triton"),
    "qwen3_5_text": Toy(GATED_DELTA, dtype="bfloat16", differs=BFLOAT16),
    "qwen3_5_moe_text": Toy(GATED_DELTA | EXPERTS, dtype="bfloat16", differs=BFLOAT16),
    "qwen3_next": Toy(GATED_DELTA | EXPERTS, dtype="bfloat16", differs=BFLOAT16),
    "zamba2": Toy(STEPS | {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_d_state": 16,
        "n_mamba_heads": 8, "mamba_headdim": 32, "num_key_value_heads": 4, "num_mem_blocks": 1, "head_dim": None,
    }, stays_dense={".shared_transformer.": "several layers share its weights"},
                  gathers={"linear": "the linears before it are shared by layers, and stay dense"},
                  no_fold="each consumer that is pruned has a convolution and a norm before it", shaped=ANY_STEPS),
}  # fmt: skip
