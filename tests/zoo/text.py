"""Text models whose layers are all attention and a dense MLP."""

from zoo.toy import VOCABULARY, Toy

MHA = {"num_key_value_heads": 4}
WIDE = {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}
WHOLE = "with a window as wide as all of a prompt, since vLLM's window is one token wider than transformers'"
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
# The last two layers read the keys and values of the first two.
SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
GEMMA4 = WINDOW | {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
# The only latent that vLLM's CPU attention takes has 512 + 64 channels.
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
SHARED_VALUES = {"self_attn.o_proj": "the last layers read the values of earlier ones"}

TEXT = {
    "apertus": Toy(differs="vLLM keeps the two parameters of xIELU in bfloat16"),
    "arcee": Toy(),
    "bloom": Toy(
        {"n_layer": 2, "n_head": 4},
        mechanism="fused qkv by head",
        differs="vLLM computes GELU exactly, transformers approximates it with tanh",
    ),
    "cohere": Toy({"logit_scale": 0.5}),
    "cohere2": Toy(WIDE | {"logit_scale": 0.5}, mechanism="parallel attention and MLP", shaped=WHOLE),
    "cwm": Toy(WINDOW),
    "ernie4_5": Toy(),
    "exaone4": Toy(WINDOW | {"sliding_window_pattern": 2}),
    "falcon": Toy({"head_dim": None, "num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 512}),
    "gemma": Toy(),
    "gemma2": Toy(WINDOW | {"query_pre_attn_scalar": 32}),
    "gemma3_text": Toy(WINDOW | {"query_pre_attn_scalar": 32}),
    "gemma4_text": Toy(GEMMA4),
    "gemma4_text_e2b": Toy(
        SHARED | {"global_head_dim": 64, "use_double_wide_mlp": True},
        model_type="gemma4_text",
        gathers=SHARED_VALUES,
        mechanism="keys and values of earlier layers, and inputs of each layer",
    ),
    "gemma3n_text": Toy(
        SHARED
        | {
            "intermediate_size": [256] * 4,
            "laurel_rank": 64,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
        zeros=("embed_tokens_per_layer.weight",),
        shaped="without the embeddings of each layer, which vLLM's text model leaves out",
        gathers=SHARED_VALUES,
    ),
    "glm": Toy(),
    "glm4": Toy(),
    "gpt_bigcode": Toy(
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 256, "num_key_value_heads": None}
    ),
    "gpt_neox": Toy(MHA),
    "gptj": Toy({"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 16, "n_inner": 256}),
    "granite": Toy({"attention_multiplier": 0.18, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "granite_swa": Toy(WINDOW | {"layer_rope_theta": [10000.0, 10000.0], "attention_multiplier": 0.18}),
    "helium": Toy(),
    "hunyuan_v1_dense": Toy(),
    "hyperclovax": Toy(),
    "jais2": Toy(),
    "llama": Toy(),
    "minicpm3": Toy(
        LATENT | {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
    "ministral": Toy(WINDOW),
    "ministral3": Toy(),
    "mistral": Toy(),
    "nemotron": Toy(),
    "olmo": Toy(),
    "olmo2": Toy(mechanism="norms behind attention and MLP"),
    "olmo3": Toy(WINDOW),
    "opt": Toy({"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "phi": Toy(MHA),
    "phi3": Toy({"original_max_position_embeddings": 128}),
    "qwen2": Toy(),
    "qwen3": Toy(),
    "seed_oss": Toy(),
    "smollm3": Toy(),
    "stablelm": Toy(),
    "starcoder2": Toy(),
    "vaultgemma": Toy(WINDOW | {"query_pre_attn_scalar": 32}),
    "youtu": Toy(LATENT, not_served="vLLM's CPU attention has no such latent"),
}
