"""Text models with experts (MoE)."""

from families import LATENT_ATTENTION
from zoo.text import GEMMA4, LATENT, WHOLE, WIDE, WINDOW
from zoo.toy import Toy

# Each config reads the keys it knows.
EXPERTS = {
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "num_experts_per_token": 2,
    "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
}  # fmt: skip
# Beside the dense MLP; keys serve as values in layers of full attention.
GEMMA4_EXPERTS = EXPERTS | {
    "enable_moe_block": True, "top_k_experts": 2, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
}  # fmt: skip
KEYS_AS_VALUES = {"self_attn.o_proj": "where keys serve as values, rotary embeddings pair their channels"}
FIRST_DENSE = EXPERTS | {
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 1,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
PLAIN = EXPERTS | {"intermediate_size": 128}
GROUPS = {"n_group": 2, "topk_group": 1}
# In the configs on the hub. transformers takes them for granted, vLLM does not.
NOAUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}

CORRECTION = ("e_score_correction_bias", "expert_bias")
UNCORRECTED = "without a correction in the router, which vLLM's CPU build ignores"
LATENT_RUN = (
    "run with the attention `CPU_MLA`, since vLLM's for AMX takes no float32, and with the custom operators `all` but "
    "`-rotary_embedding`, since vLLM's own kernel of that is wrong for these queries"
)
NO_SIGMOID = "vLLM's CPU router takes sigmoids only with groups"

MOES = {
    "afmoe": Toy(FIRST_DENSE | WINDOW | {"global_attn_every_n_layers": 2},
                 edits={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
    "axk1": Toy(FIRST_DENSE | LATENT | GROUPS | NOAUX,
                not_served="vLLM expects another norm"),
    "cohere2_moe": Toy(EXPERTS | WIDE | {"logit_scale": 0.5, "mlp_layer_types": ["sparse", "sparse"]}, shaped=WHOLE),
    "dbrx": Toy({
        "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 128},
    }, not_served="vLLM's loader does not know the names of its experts",
       stays_dense={".experts.": "transformers runs these experts with code of their own"}),
    "deepseek_v2": Toy(FIRST_DENSE | LATENT | {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
                       engine=LATENT_ATTENTION, run=LATENT_RUN),
    "deepseek_v3": Toy(FIRST_DENSE | LATENT | GROUPS | NOAUX, engine=LATENT_ATTENTION, run=LATENT_RUN),
    "dots1": Toy(FIRST_DENSE | {"layer_types": ["full_attention", "full_attention"]}),
    "ernie4_5_moe": Toy(FIRST_DENSE, zeros=CORRECTION, shaped=UNCORRECTED),
    "exaone_moe": Toy(FIRST_DENSE | WINDOW | {"sliding_window_pattern": 2}),
    "flex_olmo": Toy(PLAIN),
    "gemma4_text_moe": Toy(GEMMA4 | GEMMA4_EXPERTS, model_type="gemma4_text", gathers=KEYS_AS_VALUES,
                           mechanism="experts beside the dense MLP, with a router of the model's own"),
    "glm4_moe": Toy(FIRST_DENSE),
    "glm4_moe_lite": Toy(FIRST_DENSE | LATENT | NOAUX, engine=LATENT_ATTENTION, run=LATENT_RUN),
    "gpt_oss": Toy(PLAIN | WINDOW, mechanism="interleaved experts with biases"),
    "granitemoe": Toy(PLAIN | {"attention_multiplier": 0.18}, mechanism="experts stacked on disk"),
    "granitemoe_swa": Toy(PLAIN | WINDOW | {
        "layer_rope_theta": [10000.0, 10000.0], "attention_multiplier": 0.18, "shared_intermediate_size": 128,
    }),
    "granitemoeshared": Toy(PLAIN | {"attention_multiplier": 0.18, "shared_intermediate_size": 128}),
    "hunyuan_v1_moe": Toy(PLAIN),
    "hy_v3": Toy(FIRST_DENSE, edits={
        "expert_hidden_dim": 128, "first_k_dense_replace": 1, "route_norm": True, "qk_norm": True,
    }),
    "laguna": Toy(FIRST_DENSE | {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16,
        "num_attention_heads_per_layer": [4, 4],
    }, not_served=NO_SIGMOID),
    "llama4_text": Toy(PLAIN | {
        "intermediate_size_mlp": 256, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "attention_chunk_size": 128,
    }, mechanism="experts that read weighted tokens"),
    "mellum": Toy(EXPERTS | {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16,
        "mlp_layer_types": ["sparse", "sparse"],
    }),
    "mimo_v2_flash": Toy(FIRST_DENSE | {
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16, "v_head_dim": 32,
    }, edits={
        "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "layernorm_epsilon": 1e-5, "swa_head_dim": 32,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_v_head_dim": 32, "sliding_window_size": 16,
        "swa_rope_theta": 10000.0, "rope_theta": 5000000.0, "partial_rotary_factor": 0.334,
        "add_swa_attention_sink_bias": True,
    }),
    "minimax_m2": Toy(PLAIN, edits={"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
                      not_served=NO_SIGMOID),
    "mixtral": Toy(PLAIN),
    "olmoe": Toy(PLAIN),
    "phimoe": Toy(PLAIN | {"lm_head_bias": True, "attention_bias": True},
                  edits={"architectures": ["PhiMoEForCausalLM"]},
                  zeros=("lm_head.bias",), shaped="without the bias of lm_head, which vLLM leaves out of the logits"),
    "qwen2_moe": Toy(EXPERTS),
    "qwen3_moe": Toy(EXPERTS | {"shared_expert_intermediate_size": None}),
    "solar_open": Toy(EXPERTS),
}  # fmt: skip
