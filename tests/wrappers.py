"""Tiny random models that read images or sound besides text, as Hugging Face folders."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressing import run_small
from families import TEXT as SENTENCE
from families import save_scaled

# Token ids beyond those of the tokenizer stand for images, sound and their borders.
VOCABULARY = 272

PROCESSOR = {
    "processor_config.json": '{"processor_class": "A"}',
    "preprocessor_config.json": '{"do_resize": true}',
    "video_preprocessor_config.json": '{"do_resize": false}',
    "chat_template.jinja": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "additional_chat_templates/short.jinja": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}
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
WRAPPERS = (
    "aya_vision", "gemma3", "gemma4", "glm4v", "granite_speech", "idefics3", "internvl", "lfm2_vl", "lighton_ocr",
    "llama4", "llava", "llava_next", "llava_onevision", "mistral3", "ovis2", "paligemma", "qwen2_5_vl", "qwen2_audio",
    "qwen2_vl", "qwen3_5", "qwen3_vl", "smolvlm", "voxtral",
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}


def wrapper_parts(name: str) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(model_type, text, other tower, everything else), each as its configuration takes it."""
    window = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    mrope, llama, qwen2 = {"rope_parameters": MROPE}, {"model_type": "llama"}, {"model_type": "qwen2"}
    gated_delta = {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    gemma4 = window | {"global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    deepstack = {"deepstack_visual_indexes": [0, 1], "out_hidden_size": 64, "num_position_embeddings": 16}
    siglip, clip = {"model_type": "siglip_vision_model", **VISION}, {"model_type": "clip_vision_model", **VISION}
    pixtral, siglip2 = {"model_type": "pixtral", **VISION}, {"model_type": "siglip2_vision_model", **VISION}
    qwen_vision = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "intermediate_size": 64}
    conformer = {
        "hidden_dim": 64, "num_layers": 2, "num_heads": 2, "dim_head": 32, "input_dim": 32, "output_dim": 16,
        "context_size": 20, "max_pos_emb": 32,
    }  # fmt: skip
    image, grid = {"image_token_index": 260}, {"image_token_index": 260, "image_grid_pinpoints": [[28, 28]]}
    named = {"image_token_id": 260}
    families = {
        "aya_vision": ({"model_type": "cohere2", "layer_types": window["layer_types"]}, siglip, image),
        "gemma3": (window, VISION, image | {"boi_token_index": 261, "eoi_token_index": 262, "mm_tokens_per_image": 4}),
        "gemma4": (gemma4, VISION | {"head_dim": 32, "global_head_dim": 32, "num_key_value_heads": 2}, named),
        "glm4v": ({"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
                  qwen_vision | {"out_hidden_size": 64}, QWEN),
        "granite_speech": ({"model_type": "granite"}, conformer, {"audio_token_index": 260, "has_lora_adapter": False}),
        "idefics3": (llama, VISION, named | {"scale_factor": 2}),
        "internvl": (qwen2, VISION | {"image_size": [28, 28], "patch_size": [14, 14]}, named),
        "lfm2_vl": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim":
                     False}, siglip2 | {"num_patches": 4}, named),
        "lighton_ocr": ({"model_type": "qwen3"}, pixtral, named),
        "llama4": ({"intermediate_size_mlp": 128, "num_local_experts": 2, "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
                   VISION | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
                             "intermediate_size": 256, "pixel_shuffle_ratio": 0.5},
                   image | {"boi_token_index": 261, "eoi_token_index": 262}),
        "llava": (llama, clip, image),
        "llava_next": (llama, clip, grid),
        "llava_onevision": (qwen2, siglip, grid | {"video_token_index": 261}),
        "mistral3": ({"model_type": "mistral"}, pixtral, image),
        "ovis2": (qwen2, VISION | {"vocab_size": 64}, named | {"hidden_size": 64, "vocab_size": VOCABULARY}),
        "paligemma": ({"model_type": "gemma"}, siglip, image | {"projection_dim": 64}),
        "qwen2_5_vl": (mrope, qwen_vision | {"out_hidden_size": 64, "fullatt_block_indexes": [1]}, QWEN),
        "qwen2_audio": (qwen2, SOUND, {"audio_token_index": 260}),
        "qwen2_vl": (mrope, {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 1}, QWEN),
        "qwen3_5": (gated_delta, qwen_vision | deepstack, QWEN),
        "qwen3_vl": (mrope, qwen_vision | deepstack, QWEN),
        "smolvlm": (llama, VISION, named | {"scale_factor": 2}),
        "voxtral": (llama, SOUND, {"audio_token_id": 260}),
    }  # fmt: skip
    text, tower, rest = families[name]
    return name, TEXT | text, tower, rest


def wrapper_config(name: str, **text: Any) -> Any:
    """The configuration of a family; `text` changes that of its text decoder."""
    from transformers import AutoConfig

    model_type, own, tower, rest = wrapper_parts(name)
    key = {"qwen2_audio": "audio_config", "voxtral": "audio_config", "granite_speech": "encoder_config"}.get(name)
    return AutoConfig.for_model(model_type, **{"text_config": own | text, key or "vision_config": tower} | rest)


def save_wrapper(folder: Path, name: str, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """Random weights with channels of different scales, and the files of a processor."""
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    save_scaled(AutoModelForMultimodalLM.from_config(wrapper_config(name, **text)).to(dtype), folder)
    for file, content in PROCESSOR.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content)
    return folder


def compressed_wrapper(place: Path, name: str) -> Path:
    """A folder in `place` with a model whose text decoder is pruned."""
    (place / "words.txt").write_text(SENTENCE * 40)
    run_small(save_wrapper(place / "wrapper", name), place / "out", place / "words.txt")
    return place / "out"


@pytest.fixture(scope="session")
def tiny_wrapper(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> folder of a float32 model. Do not write into it."""
    return cache(lambda name: save_wrapper(tmp_path_factory.mktemp(name) / "dense", name))
