"""A GGUF file as a Hugging Face folder. transformers converts it; what it would lose on the way is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.writer import disk_errors
from ria_vllm.errors import RiaError
from ria_vllm.offline.model.gguf.gguf_header import LONG_ROPE_FACTORS, ROPE_FACTORS, Header, read_header
from ria_vllm.offline.model.gguf.gguf_lost import lost
from ria_vllm.offline.model.run.hf import check_loaded, explained, first_line, without_quantization

INSTEAD = "Give the original Hugging Face folder instead."


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the dequantized weights of a GGUF file, in bfloat16, and its tokenizer as a Hugging Face folder.

    Raises:
        RiaError: transformers cannot read the file, or not all of it, or lacks a package for it; or the file has only a
            part of a model.
    """
    from transformers import AutoTokenizer

    with explained(f"{path}: transformers cannot read this GGUF file"):
        try:
            header = read_header(path)
            _check_one_part(header)
            model, info = _load(path)
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        except ImportError as error:
            raise RiaError(
                f"{path}: {first_line(error)}. Install what is missing: pip install gguf accelerate"
            ) from None
    info["mismatched_keys"] |= set(_misshapen(model))
    check_loaded(str(path), info, "its header", INSTEAD)
    _check_all_read(header, model)
    if changed := list(lost(header, model)):
        raise RiaError(
            f"{path}: transformers does not convert {', '.join(changed)}, so its model would compute something else. "
            f"{INSTEAD}"
        )
    without_quantization(model.config)
    model = model.to(torch.bfloat16)  # all of it: transformers keeps some parameters in float32
    with disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _check_one_part(header: Header) -> None:
    parts = int(header.number("split.count", 1))
    if parts > 1:
        raise RiaError(
            f"{header.path}: 1 of {parts} parts of a model. Join them: llama-gguf-split --merge FIRST_PART MODEL.gguf"
        )


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


def _check_all_read(header: Header, model: Any) -> None:
    """transformers drops tensors that its model of this architecture has no place for, without a word."""
    sizes = {name: size for name, size in header.tensors.items() if not _needless(name, header, model)}
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(sizes.values()) == sum(held.values()):
        return
    # Experts are stacked in files under names of their own.
    left = sorted(name for name in sizes.keys() - _mapped(header, model) if "_exps." not in name)
    what = ", ".join(left[:5]) or f"some of its {sum(sizes.values())} weights: the model has {sum(held.values())}"
    raise RiaError(f"{header.path}: transformers leaves out {what}. {INSTEAD}")


def _needless(name: str, header: Header, model: Any) -> bool:
    """Whether a tensor may be missing in the model: it is there otherwise, or predicts more than the next token."""
    if name in (ROPE_FACTORS, *LONG_ROPE_FACTORS) or (name == "output.weight" and model.config.tie_word_embeddings):
        return True
    block = re.match(r"blk\.(\d+)\.", name)
    blocks = int(header.number("block_count"))
    return block is not None and blocks - header.number("nextn_predict_layers") <= int(block[1]) < blocks


def _mapped(header: Header, model: Any) -> set[str]:
    """The names that the model's tensors have in a GGUF file."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if name == header.architecture]
    if not kinds:
        return set()
    names = get_tensor_name_map(kinds[0], int(header.number("block_count")))
    found = {names.get_name(name, (".weight", ".bias")) for name in model.state_dict()}
    return {name for name in found if name is not None}
