"""A GGUF file as a Hugging Face folder. transformers converts it; what it would lose on the way is refused.

transformers ignores most of what the header of a GGUF file may say, and without a word computes another model then. So
only plain decoders are converted, and only if the header has no key besides those that transformers reads.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.writer import disk_errors
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.run.hf import check_loaded, explained, first_line, without_quantization

# llama.cpp's names -> transformers'.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# The keys of such a model that transformers reads, and that mean the same to it.
READ = (
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "block_count",
    "context_length", "embedding_length", "feed_forward_length", "vocab_size",
)  # fmt: skip
LAYERS_OF_27B = 62  # by which llama.cpp knows it
ROPE_BASE = 10000.0  # where a file names none
INSTEAD = "Give the original Hugging Face folder instead."


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the dequantized weights of a GGUF file, in bfloat16, and its tokenizer as a Hugging Face folder.

    Raises:
        RiaError: the architecture is none of `ARCHITECTURES`; or transformers cannot read the file, or not all of it,
            or lacks a package for it.
    """
    from transformers import AutoTokenizer

    with explained(f"{path}: transformers cannot read this GGUF file"):
        try:
            architecture, keys, tensors = _header(path)
            if architecture not in ARCHITECTURES:
                raise RiaError(f"{path}: GGUF files of {architecture!r} are not read, only of "
                               f"{', '.join(ARCHITECTURES)}. {INSTEAD}")  # fmt: skip
            model, info = _load(path)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        except ImportError as error:
            raise RiaError(
                f"{path}: {first_line(error)}. Install what is missing: pip install gguf accelerate"
            ) from None
    info["mismatched_keys"] |= set(_misshapen(model))
    check_loaded(str(path), info, "its header", INSTEAD)
    lost = [f"{architecture}.{key} ({value})" for key, value in _ignored(architecture, keys, model.config)]
    lost += sorted(tensors - _mapped(architecture, model))[:5]
    if lost:
        raise RiaError(
            f"{path}: transformers does not convert {', '.join(lost)}, so its model would compute something else. "
            f"{INSTEAD}"
        )
    without_quantization(model.config)
    model = model.to(torch.bfloat16)  # all of it: transformers keeps some parameters in float32
    with disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _header(path: Path) -> tuple[str, dict[str, Any], set[str]]:
    """(architecture, its keys without its name in front -> values, the names of the tensors)."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    architecture = str(fields.get("general.architecture", ""))
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    return architecture, keys, {tensor.name for tensor in reader.tensors}


def _load(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in bfloat16, and what transformers says about loading it."""
    from transformers import AutoModelForCausalLM

    try:
        from transformers import GgufConfig
    except ImportError:
        options: dict[str, Any] = {}
    else:
        options = {"quantization_config": GgufConfig(dequantize=True)}
    model, info = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.bfloat16, trust_remote_code=False,
        output_loading_info=True, ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    return model, info


def _misshapen(model: Any) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(name, shape, shape that the configuration asks for). transformers takes any shape from what it dequantizes."""
    with torch.device("meta"):
        wanted = type(model)._from_config(model.config).state_dict()
    for name, tensor in model.state_dict().items():
        if name in wanted and tensor.shape != wanted[name].shape:
            yield name, tuple(tensor.shape), tuple(wanted[name].shape)


def _ignored(architecture: str, keys: Mapping[str, Any], config: Any) -> Iterator[tuple[str, Any]]:
    """The keys, with their values, of which the model knows nothing, or something else."""
    if config.model_type != ARCHITECTURES[architecture]:
        yield "architecture", config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    right: dict[str, tuple[Any, ...]] = {
        "attention.key_length": (head_dim,), "attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,),
        "rope.freq_base": (rope["rope_theta"],),
        "rope.scaling.factor": (0, 1), "rope.scaling.type": ("none",),
    }  # fmt: skip
    if architecture == "gemma3":  # 27B has another scale of attention; all have every sixth layer without a window
        right["attention.sliding_window"] = (config.sliding_window,)
        right["attention.scale"] = (config.query_pre_attn_scalar**-0.5,)
        kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config.num_hidden_layers)]
        if config.layer_types != kinds or config.query_pre_attn_scalar != head_dim or len(kinds) == LAYERS_OF_27B:
            yield "block_count", len(kinds)
    for key, value in {"rope.freq_base": ROPE_BASE, **keys}.items():
        if key not in READ and value not in right.get(key, ()):
            yield key, value


def _mapped(architecture: str, model: Any) -> set[str]:
    """The names that the model's tensors have in a GGUF file."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], model.config.num_hidden_layers)
    found = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    return {name for name in found if name is not None}
