"""Models that read images or sound too: a text decoder behind a wrapper."""

from dataclasses import replace
from typing import Any

from zoo.experts import EXPERTS, FIRST_DENSE, GEMMA4_EXPERTS, KEYS_AS_VALUES, PLAIN
from zoo.hybrids import BFLOAT16, CONVOLUTION, GATED_DELTA, LFM2, UNROTATED
from zoo.text import GEMMA4, SHARED, SHARED_VALUES, WHOLE, WIDE, WINDOW
from zoo.toy import BASE, Processor, Toy

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SECTIONS = {"rope_parameters": ROPE | {"mrope_section": [4, 6, 6], "type": "default"}}
INTERLEAVED = {"rope_parameters": ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True}}
PARTIAL = {"rope_parameters": ROPE | {
    "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25,
}}  # fmt: skip
TOWER = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "head_dim": 32,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "out_hidden_size": 128, "intermediate_size": 128,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "spatial_merge_size": 2, "temporal_patch_size": 2,
    "fullatt_block_indexes": [1], "window_size": 32,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}  # fmt: skip
QWEN_IDS = {"image_token_id": 258, "video_token_id": 259, "vision_start_token_id": 260, "vision_end_token_id": 261}
# The tokenizer that transformers has for Qwen 3.5 adds <|endoftext|> before them.
QWEN3_5_IDS = {name: number + 1 for name, number in QWEN_IDS.items()}
QWEN = Processor(
    QWEN_TOKENS,
    "<|vision_start|><|image_pad|><|vision_end|>",
    {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}},
)
GLM_TOKENS = {
    "image_token": "<|image|>", "video_token": "<|video|>", "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>", "video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>",
}  # fmt: skip
GLM_IDS = {
    "image_token_id": 258, "video_token_id": 259, "image_start_token_id": 260, "image_end_token_id": 261,
    "video_start_token_id": 262, "video_end_token_id": 263,
}  # fmt: skip
GLM = Processor(
    GLM_TOKENS,
    "<|begin_of_image|><|image|><|end_of_image|>",
    {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}},
)
GLM_SECTIONS = {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}}
LINES = {f"line{n}_token": "\n" * n for n in range(1, 5)}
TOWER_NAMES = {"vision_tower.": "vision_tower.vision_model."}
INNER_TOWER_NAMES = {f"model.{old}": f"model.{new}" for old, new in TOWER_NAMES.items()}
GEMMA4_IDS = {
    "image_token_id": 258, "boi_token_id": 259, "eoi_token_id": 260, "audio_token_id": 261, "boa_token_id": 262,
    "eoa_token_index": 263, "video_token_id": 264,
}  # fmt: skip
PINPOINTS = [[32, 64], [64, 32]]
LLAVA = Processor(
    {"image_token": "<image>"},
    "<image>",
    {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
)


def behind(text: str, decoder: dict[str, Any], vision: dict[str, Any] | None, **own: Any) -> dict[str, Any]:
    """The settings of a wrapper around a text decoder of the model type `text`."""
    inner = {k: v for k, v in (BASE | decoder).items() if v is not None} | {"model_type": text}
    tower = {} if vision is None else {"vision_config": vision}
    return dict.fromkeys(BASE) | {"text_config": inner, "tie_word_embeddings": False} | tower | own


def _gemma4(decoder: dict[str, Any], gathers: dict[str, str]) -> Toy:
    tower = TOWER | {"num_key_value_heads": 2, "position_embedding_size": 256, "pooling_kernel_size": 2}
    # vLLM takes the inputs of each layer for an image from token 0, which pads in the configs on the hub.
    return Toy(
        behind("gemma4_text", decoder | {"pad_token_id": 0}, tower, **GEMMA4_IDS),
        gathers=gathers,
        edits={"vision_config": {"default_output_length": 70}},
        processor=Processor(
            {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
             "boa_token": "<|audio>", "eoa_token": "<audio|>", "video_token": "<|video|>"},
            "<|image|>", {"patch_size": 8, "max_soft_tokens": 70, "pooling_kernel_size": 2},
        ),
    )  # fmt: skip


WRAPPED = {
    "cohere2_vision": Toy(
        behind("cohere2", WIDE | {"logit_scale": 1.0}, TOWER | {"model_type": "siglip_vision_model"},
               image_token_id=258, downsample_factor=2, alignment_intermediate_size=128, tie_word_embeddings=True),
        renames=INNER_TOWER_NAMES,
        shaped=f"{WHOLE}; with a scale of 1 for the logits, which transformers leaves out, and vLLM does not",
        processor=Processor(
            {"image_token": "<image>", "boi_token": "<img>", "eoi_token": "</img>", "img_line_break_token": "<br>"},
            "<image>",
            {"size": {"height": 32, "width": 32}, "patch_size": 2},  # the square of it is the tokens for an image
        ),
    ),
    "gemma3": Toy(
        behind("gemma3_text", WINDOW | {"query_pre_attn_scalar": 32}, TOWER | {"model_type": "siglip_vision_model"},
               image_token_index=258, boi_token_index=259, eoi_token_index=260, mm_tokens_per_image=1),
        renames=TOWER_NAMES,
        shaped="with one token for an image, since vLLM's CPU attention is causal among an image's tokens",
        processor=Processor(
            {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
            | LINES,
            "<start_of_image>",
            {"size": {"height": 32, "width": 32}}, {"image_seq_length": 1},
        ),
    ),
    "gemma4": _gemma4(SHARED | {"global_head_dim": 64}, SHARED_VALUES),
    "gemma4_moe": replace(_gemma4(GEMMA4 | GEMMA4_EXPERTS, KEYS_AS_VALUES), model_type="gemma4"),
    "glm4v": Toy(behind("glm4v_text", GLM_SECTIONS, QWEN_TOWER | {"image_size": 32}, **GLM_IDS),
                 edits={"text_config": {"attention_bias": True}}, processor=GLM),
    "glm4v_moe": Toy(
        behind("glm4v_moe_text", FIRST_DENSE | GLM_SECTIONS, QWEN_TOWER | {"image_size": 32}, **GLM_IDS),
        edits={"text_config": {"use_qk_norm": False}},
        processor=replace(GLM, like="glm4v"),
    ),
    "idefics3": Toy(
        behind("llama", {}, TOWER, image_token_id=258, scale_factor=2),
        processor=Processor(
            {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
             "global_image_tag": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
            "<image>",
            {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}}, {"image_seq_len": 4},
        ),
    ),
    "internvl": Toy(
        behind("qwen2", {}, TOWER | {"image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=258,
               image_seq_length=4),
        processor=Processor(
            {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
             "video_token": "<video>"},
            "<IMG_CONTEXT>",
            {"size": {"height": 32, "width": 32}}, {"image_seq_length": 4},
        ),
    ),
    "lfm2_vl": Toy(
        behind("lfm2", LFM2,
               TOWER | {"num_patches": 16, "model_type": "siglip2_vision_model", "vision_use_head": False},
               image_token_id=258, projector_hidden_size=128, tie_word_embeddings=True),
        edits={"text_config": CONVOLUTION},
        renames=INNER_TOWER_NAMES,
        shaped=UNROTATED,
        processor=Processor({"image_token": "<image>", "image_start_token": "<|image_start|>",
                             "image_end_token": "<|image_end|>", "image_thumbnail": "<|img_thumbnail|>"},
                            "<image>",
                            {"encoder_patch_size": 8, "tile_size": 32, "max_num_patches": 16,
                             "min_image_tokens": 1, "max_image_tokens": 16}),
    ),
    "llama4": Toy(
        behind("llama4_text", PLAIN | {
            "intermediate_size_mlp": 256, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
            "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0],
            "attention_chunk_size": 128,
        }, TOWER | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
            image_token_index=258, boi_token_index=259, eoi_token_index=260),
        text_only="vLLM's vision tower needs another matrix product",
        processor=Processor({"image_token": "<|patch|>", "boi_token": "<|image_start|>", "eoi_token": "<|image_end|>",
                             "fake_image_token": "<|image|>"},
                            "<|image|>",
                            {"size": {"height": 32, "width": 32}}, {"patch_size": 8}),
    ),
    "llava": Toy(
        behind("llama", {}, TOWER | {"model_type": "clip_vision_model"}, image_token_index=258, image_seq_length=16),
        renames=TOWER_NAMES,
        processor=LLAVA,
    ),
    "llava_next": Toy(
        behind("llama", {}, TOWER | {"model_type": "clip_vision_model"}, image_token_index=258, image_seq_length=16,
               image_grid_pinpoints=PINPOINTS),
        renames=TOWER_NAMES,
        processor=replace(LLAVA, image=LLAVA.image | {"image_grid_pinpoints": PINPOINTS}),
    ),
    "llava_onevision": Toy(
        behind("qwen2", {}, TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
               image_token_index=258, video_token_index=259, image_grid_pinpoints=[[32, 32], [32, 64]]),
        renames=TOWER_NAMES,
        processor=Processor({"image_token": "<image>", "video_token": "<video>"}, "<image>",
                            {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": [[32, 32], [32, 64]]},
                            {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
    ),
    "mistral3": Toy(
        behind("mistral", {}, TOWER | {"model_type": "pixtral"}, image_token_index=258),
        processor=Processor(
            {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
            "[IMG]",
            {"size": {"longest_edge": 32}, "patch_size": {"height": 8, "width": 8}},
            {"patch_size": 8, "spatial_merge_size": 2},
        ),
    ),
    "paligemma": Toy(
        behind("gemma", {}, TOWER | {"model_type": "siglip_vision_model", "projection_dim": 128},
               image_token_index=258, projection_dim=128, hidden_size=128),
        text_only="vLLM's CPU attention is causal among an image's tokens",
        renames=TOWER_NAMES,
        processor=Processor({"image_token": "<image>", "line1_token": "\n"}, "<image>",
                            {"size": {"height": 32, "width": 32}, "image_seq_length": 16}),
    ),
    "qwen2_5_vl": Toy(behind("qwen2_5_vl_text", SECTIONS, QWEN_TOWER, **QWEN_IDS), processor=QWEN),
    "qwen2_audio": Toy(
        behind("qwen2", {}, None, audio_token_index=258, audio_config={
            "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128,
            "num_mel_bins": 16, "max_source_positions": 32,
        }),
        renames={"language_model.model.model.": "language_model.model."},
        processor=Processor(
            {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}, "",
            sound={"feature_size": 16, "chunk_length": 1},
        ),
    ),
    "qwen2_vl": Toy(
        behind("qwen2_vl_text", SECTIONS, QWEN_TOWER | {"embed_dim": 64, "hidden_size": 128}, **QWEN_IDS),
        mechanism="text and images",
        processor=QWEN,
    ),
    "qwen3_5": Toy(behind("qwen3_5_text", GATED_DELTA | PARTIAL, QWEN_TOWER | {"deepstack_visual_indexes": []},
                          **QWEN3_5_IDS), dtype="bfloat16", differs=BFLOAT16, processor=QWEN),
    "qwen3_5_moe": Toy(
        behind("qwen3_5_moe_text", GATED_DELTA | EXPERTS | PARTIAL, QWEN_TOWER | {"deepstack_visual_indexes": []},
               **QWEN3_5_IDS),
        dtype="bfloat16", differs=BFLOAT16, processor=QWEN,
    ),
    "qwen3_vl": Toy(behind("qwen3_vl_text", INTERLEAVED, QWEN_TOWER, **QWEN_IDS), processor=QWEN),
    "qwen3_vl_moe": Toy(
        behind("qwen3_vl_moe_text", EXPERTS | INTERLEAVED | {
            "shared_expert_intermediate_size": None, "moe_intermediate_size": 192,
        }, QWEN_TOWER, **QWEN_IDS),
        transposed=".experts.",
        edits={"text_config": {"norm_topk_prob": True}},
        processor=replace(QWEN, like="qwen3_vl"),
    ),
}  # fmt: skip
