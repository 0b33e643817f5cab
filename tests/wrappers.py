"""Tiny random models that read images or sound besides text, as Hugging Face folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tokenizer

# Token ids beyond those of the tokenizer stand for images, sound and their borders.
VOCABULARY = 272

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
# As many layers as the text decoder has: a tower must not be taken for it.
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SOUND = {
    "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 16,
    "max_source_positions": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 64,
    "intermediate_size": 64,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IMAGE = {"image_token_id": 260}
QWEN = {**IMAGE, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}


def _qwen_vision(**own: Any) -> dict[str, Any]:
    return {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 64, **own}


def _wrappers() -> dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """name -> (model_type, text, vision or audio, the rest)."""
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    linear_attention = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    mrope = {"rope_parameters": MROPE}
    llama = {"model_type": "llama"}
    deepstack = {"deepstack_visual_indexes": [0, 1], "out_hidden_size": 64, "num_position_embeddings": 16}
    siglip = {"model_type": "siglip_vision_model", **VISION}
    clip = {"model_type": "clip_vision_model", **VISION}
    gemma4 = window | {
        "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "vocab_size_per_layer_input":
        VOCABULARY, "enable_moe_block": False,
    }  # fmt: skip
    return {
        "gemma3": ("gemma3", window, VISION, {"image_token_index": 259, "boi_token_index": 260, "eoi_token_index": 261,
            "mm_tokens_per_image": 4}),
        "gemma4": ("gemma4", gemma4, VISION | {"head_dim": 32, "global_head_dim": 32, "num_key_value_heads": 2}, {**IMAGE}),
        "qwen2_vl": ("qwen2_vl", mrope, {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2,
            "mlp_ratio": 1}, QWEN),
        "qwen2_5_vl": ("qwen2_5_vl", mrope, _qwen_vision(out_hidden_size=64, fullatt_block_indexes=[1]), QWEN),
        "qwen3_vl": ("qwen3_vl", mrope, _qwen_vision(**deepstack), QWEN),
        "qwen3_5": ("qwen3_5", linear_attention, _qwen_vision(**deepstack), QWEN),
        "mistral3": ("mistral3", {"model_type": "mistral"}, {"model_type": "pixtral", **VISION}, {"image_token_index": 260}),
        "llama4": ("llama4", {"intermediate_size_mlp": 128, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
            VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
            "intermediate_size": 256, "pixel_shuffle_ratio": 0.5}, {"image_token_index": 260, "boi_token_index": 261,
            "eoi_token_index": 262}),
        "internvl": ("internvl", {"model_type": "qwen2"}, VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, IMAGE),
        "glm4v": ("glm4v", {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}, _qwen_vision(out_hidden_size=64), QWEN),
        "llava": ("llava", llama, clip, {"image_token_index": 260}),
        "llava_next": ("llava_next", llama, clip, {"image_token_index": 260, "image_grid_pinpoints": [[28, 28]]}),
        "llava_onevision": ("llava_onevision", {"model_type": "qwen2"}, siglip, {"image_token_index": 260,
            "video_token_index": 261, "image_grid_pinpoints": [[28, 28]]}),
        "idefics3": ("idefics3", llama, VISION, {**IMAGE, "scale_factor": 2}),
        "smolvlm": ("smolvlm", llama, VISION, {**IMAGE, "scale_factor": 2}),
        "paligemma": ("paligemma", {"model_type": "gemma"}, siglip, {"image_token_index": 260, "projection_dim": 64}),
        "aya_vision": ("aya_vision", {"model_type": "cohere2", "layer_types": window["layer_types"]}, siglip, {"image_token_index": 260}),
        "lfm2_vl": ("lfm2_vl", {"model_type": "lfm2", "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False}, {"model_type": "siglip2_vision_model", **VISION, "num_patches": 4}, IMAGE),
        "ovis2": ("ovis2", {"model_type": "qwen2"}, VISION | {"vocab_size": 64}, IMAGE | {"hidden_size": 64, "vocab_size": VOCABULARY}),
        "lighton_ocr": ("lighton_ocr", {"model_type": "qwen3"}, {"model_type": "pixtral", **VISION}, IMAGE),
        "qwen2_audio": ("qwen2_audio", {"model_type": "qwen2"}, SOUND, {"audio_token_index": 260}),
        "voxtral": ("voxtral", llama, SOUND, {"audio_token_id": 260}),
        "granite_speech": ("granite_speech", {"model_type": "granite"}, {"hidden_dim": 64, "num_layers": 2, "num_heads": 2,
            "dim_head": 32, "input_dim": 32, "output_dim": 16, "context_size": 20, "max_pos_emb": 32}, {"audio_token_index": 260,
            "has_lora_adapter": False}),
    }  # fmt: skip


def wrapper_config(name: str) -> Any:
    from transformers import AutoConfig

    model_type, text, other, rest = _wrappers()[name]
    tower = "audio_config" if name in ("qwen2_audio", "voxtral") else "encoder_config" if name == "granite_speech" else "vision_config"
    return AutoConfig.for_model(model_type, **{"text_config": TEXT | text, tower: other} | rest)


def save_wrapper(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Random weights with channels of different scales, and the files of a processor."""
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(wrapper_config(name)).to(dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in path:
                parameter.mul_(torch.rand(parameter.shape[1]).add(0.2).to(dtype))
            elif parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape).mul(0.1).to(dtype))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text(json.dumps({"processor_class": name}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    return folder
