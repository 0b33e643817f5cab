"""Tiny models that read images: a wrapper around a text decoder of `tiny`, with its processor."""

from dataclasses import replace
from pathlib import Path

import tiny
import torch
import transformers
from transformers import AutoModelForImageTextToText

SIDE, PATCH = 56, 14
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}IMAGE{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
# The tokens that stand for parts of an image come after those of the bytes.
SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<begin>",
    "eoi_token": "<end>",
    "video_token": "<video>",
    "vision_bos_token": "<vision>",
    "vision_eos_token": "</vision>",
    "llama4_image": "<|image|>",
    "llama4_begin": "<|image_start|>",
    "llama4_end": "<|image_end|>",
    "llama4_patch": "<|patch|>",
    "llama4_x": "<|tile_x_separator|>",
    "llama4_y": "<|tile_y_separator|>",
}
IDS = {name: 259 + i for i, name in enumerate(SPECIAL)}
TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
QWEN_TOWER = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH,
              "out_hidden_size": tiny.HIDDEN}  # fmt: skip
QWEN_IDS = (
    ("image_token_id", IDS["image_token"]), ("video_token_id", IDS["video_token"]),
    ("vision_start_token_id", IDS["vision_bos_token"]), ("vision_end_token_id", IDS["vision_eos_token"]),
    ("tie_word_embeddings", False),
)  # fmt: skip
SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}


OLDER = ("vision_tower.", "vision_tower.vision_model.")
# All layers are dense: their experts are a matter of their own.
LLAMA4 = (
    ("moe_layers", []), ("interleave_moe_layer_step", 9), ("intermediate_size_mlp", tiny.INNER),
    ("num_local_experts", 2), ("attention_chunk_size", 128),
)  # fmt: skip


def wrapped(family: str, wrapper: str, outer: tuple, **changes: object) -> tiny.Family:
    block = {"block": "language_model.model.layers.{i}."} | changes
    return replace(tiny.FAMILIES[family], auto=AutoModelForImageTextToText, wrapper=wrapper, outer=outer, **block)


FAMILIES = {
    "gemma3": wrapped(
        "gemma3", "gemma3",
        (
            ("vision_config", TOWER | {"model_type": "siglip_vision_model"}), ("mm_tokens_per_image", 4),
            ("image_token_index", IDS["image_token"]), ("boi_token_index", IDS["boi_token"]),
            ("eoi_token_index", IDS["eoi_token"]), ("tie_word_embeddings", False),
        ),
        older=OLDER,
    ),
    "qwen2_5_vl": wrapped(
        "qwen2", "qwen2_5_vl",
        (("vision_config", QWEN_TOWER | {"window_size": SIDE, "fullatt_block_indexes": [0]}), *QWEN_IDS),
        block="model.layers.{i}.", model_type="qwen2_5_vl_text",
        settings=(("rope_parameters", SECTIONS), ("head_dim", None)),
    ),
    "llama4": wrapped(
        "llama-gqa", "llama4",
        (
            (
                "vision_config",
                TOWER | {"intermediate_size": 256, "vision_output_dim": 64, "projector_output_dim": 64,
                         "projector_input_dim": 64, "pixel_shuffle_ratio": 0.5},
            ),
            ("image_token_index", IDS["llama4_patch"]), ("boi_token_index", IDS["llama4_begin"]),
            ("eoi_token_index", IDS["llama4_end"]), ("tie_word_embeddings", False),
        ),
        model_type="llama4_text", settings=LLAMA4,
    ),
}  # fmt: skip


def processor(name: str):
    """Images become `SIDE` x `SIDE`; text becomes bytes."""
    t = transformers
    size = {"height": SIDE, "width": SIDE}
    tokenizer = tiny.tokenizer(extra_special_tokens=SPECIAL)
    if name == "gemma3":
        tokenizer.add_tokens(["\n" * i for i in range(1, 5)])
        images = t.Gemma3ImageProcessor(size=size)
        return t.Gemma3Processor(images, tokenizer, chat_template=template("<begin>"), image_seq_length=4)
    if name == "qwen2_5_vl":
        pixels = {"size": {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}, "patch_size": PATCH}
        images = t.Qwen2VLImageProcessor(**pixels)
        videos = t.Qwen2VLVideoProcessor(**pixels)
        return t.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template("<vision><image></vision>"))
    images = t.Llama4ImageProcessor(size=size, max_patches=1)
    return t.Llama4Processor(images, tokenizer, PATCH, chat_template=template("<|image|>"))


def template(image: str) -> str:
    return TEMPLATE.replace("IMAGE", image)


def write(name: str, out: Path, **settings: object) -> torch.nn.Module:
    """A compressed folder with its processor; returns the pruned model, as `tiny.write` does."""
    model = tiny.write(FAMILIES[name], out, **settings)
    processor(name).save_pretrained(out)
    return model
