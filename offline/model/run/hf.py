"""What we need from transformers: configurations, tokenizers and whole models, and its errors in our own words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ria_vllm.hf  # noqa: F401  (from_pretrained reads compressed folders)
from ria_vllm.checkpoint.companions import LEGAL_PATTERNS, SUFFIXES
from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.checkpoint.weight_files import unindexed_files
from ria_vllm.errors import RiaError
from ria_vllm.files.fetching import hub_errors
from ria_vllm.files.json_file import read_json
from ria_vllm.hub.model_card import CARD_FILE
from ria_vllm.offline.model.files.dequantize import scheme_of
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.model.files.which_weights import meant_weights, refuse_pickled
from ria_vllm.offline.model.run.architecture import model_class, output_head, text_config
from ria_vllm.offline.model.run.dtypes import choose_dtype

HUB_PATTERNS = ["*.safetensors", *(f"*{suffix}" for suffix in SUFFIXES), CARD_FILE, *LEGAL_PATTERNS]
# The same weights once more, in their publisher's own format: gpt-oss, Llama and Mistral have such files.
HUB_COPIES = ["original/*", "consolidated*.safetensors"]
# No file may run code: neither a model's own nor what is in pickled weights.
FROM_FILES = {"trust_remote_code": False, "use_safetensors": True}


def read_config(folder: str) -> Any:
    """The configuration of a folder or hub id.

    Raises:
        RiaError: transformers cannot read it.
    """
    from transformers import AutoConfig

    with _loading(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def configured_dtype(config: Any) -> torch.dtype | None:
    """The dtype that a configuration says the weights are stored in; None if it does not say."""
    dtype = config.dtype or text_config(config).dtype
    return getattr(torch, dtype, None) if isinstance(dtype, str) else dtype


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        RiaError: there is none, or it needs Python code of its own, which is not run.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise RiaError(f"{folder}: no tokenizer that transformers can load ({reason_of(error)}).") from error


def text_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, with the chat template that an older processor keeps in a file of its own.

    Raises:
        RiaError: see `load_tokenizer`; or that file is not JSON.
    """
    tokenizer, path = load_tokenizer(str(folder)), folder / "chat_template.json"
    if getattr(tokenizer, "chat_template", None) is None and path.is_file():
        template = read_json(path).get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def folder_of(model: str) -> Path:
    """The folder that a model is read from: itself, or that of a hub id in the hub's cache (see `from_hub`)."""
    return Path(model) if Path(model).is_dir() else from_hub(model)


def from_hub(model: str, revision: str | None = None) -> Path:
    """The folder in the hub's cache with all that is read of a model, fetched if it is not there.

    Args:
        revision: a branch, tag or commit; None: the main branch.

    Raises:
        RiaError: it cannot be fetched, or all its weights are pickled.
    """
    from huggingface_hub import snapshot_download

    shown = f"{model}@{revision}" if revision else model
    with hub_errors(model, f"{shown}: no such folder or file here"):
        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_COPIES)
        )
    if not unindexed_files(folder):
        refuse_pickled(model, _files_on_hub(model, revision))
    return folder


def _files_on_hub(model: str, revision: str | None) -> list[str]:
    """Paths of all files of a repository; none if the hub does not answer."""
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(model, revision=revision)
    except Exception:  # only what an error says depends on it
        return []


def commit_of(folder: Path) -> str | None:
    """The commit whose files a folder of the hub's cache holds, CACHE/models--USER--NAME/snapshots/COMMIT; None: it is
    no such folder."""
    in_cache = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.name if in_cache and re.fullmatch("[0-9a-f]{40}", folder.name) else None


def without_quantization(config: Any) -> None:
    """Let a configuration not say how the weights are quantized in the files."""
    for one in (config, text_config(config)):
        if hasattr(one, "quantization_config"):
            del one.quantization_config


def attention_options(config: Any) -> dict[str, Any]:
    """Options of `from_pretrained` and `_from_config` with which attention computes what a model is meant to compute.

    What transformers chooses by itself, torch's fused kernels, silently leaves out the soft cap of attention's logits
    (Gemma 2). In a wrapper whose decoder calls itself bidirectional (PaliGemma), it lets text without an image read
    later tokens; the mask that eager attention gets is causal, as vLLM's is. Models with attention sinks refuse the
    fused kernels themselves.
    """
    text = text_config(config)
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    unmasked = text is not config and getattr(text, "use_bidirectional_attention", None) is True
    return {"attn_implementation": "eager"} if capped or unmasked else {}


def load_dense(architecture: Any, folder: Path, dtype: torch.dtype | str, **options: Any) -> Any:
    """What `architecture.from_pretrained` makes of a folder; quantized weights are dequantized by us, if we read them.
    (Compressed folders are read by `ria_vllm.hf`.)

    While the model is loaded, what is dequantized is on the CPU a second time, in the model's own dtype: all weights
    where `dtype` is another one, else those that transformers merges, such as experts that are stored one by one.

    Args:
        dtype: "auto": as stored.
        options: of `from_pretrained`.

    Raises:
        RiaError: see `SourceTensors`.
    """
    config = read_config(str(folder))
    if dequantized_from(config) is None:
        return architecture.from_pretrained(folder, dtype=dtype, **FROM_FILES, **options)
    tensors = SourceTensors(folder, configured_dtype(config))
    without_quantization(config)
    state = {name: tensors.read(name) for name in tensors.files}
    kind = tensors.dtype if dtype == "auto" else dtype
    return architecture.from_pretrained(None, config=config, state_dict=state, dtype=kind, **options)


def load_model(
    model: str,
    device: torch.device,
    compute_dtype: str | None = None,
    training: bool = False,
) -> Any:
    """A transformers model that writes text, in evaluation mode. A compressed folder is decompressed in memory.

    Where the folder asks for it, pruned linears round their inputs.

    Args:
        model: a folder or hub id.
        compute_dtype: the dtype to compute in, one of `ria_vllm.offline.model.run.dtypes.CHOICES`; None: as stored.
        training: see `choose_dtype`.

    Raises:
        RiaError: not a model that writes text, a damaged compressed one, one of which it is unknown which weights are
            meant, or a `compute_dtype` that would round its weights.
    """
    folder = folder_of(model)
    if not is_compressed(folder):
        meant_weights(folder, model)
    if compute_dtype is None:
        return _load(folder, model, device, "auto")
    stored = stored_dtype(folder)
    if stored is not None:
        return _load(folder, model, device, choose_dtype(stored, device, compute_dtype, training))
    loaded = _load(folder, model, device, "auto")
    dtype = choose_dtype(loaded.dtype, device, compute_dtype, training)
    # Loaded again, not cast: what the model computes for itself during loading was rounded to the first dtype.
    return loaded if dtype == loaded.dtype else _load(folder, model, device, dtype)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that the weights of a folder are stored in, or are dequantized to; None: only loading tells."""
    config = read_config(str(folder))
    dtype = configured_dtype(config)
    if dtype is None and dequantized_from(config) is not None:
        return SourceTensors(folder, None).dtype
    return dtype


def dequantized_from(config: Any) -> str | None:
    """How the weights of a model are quantized that `load_model` dequantizes; None: it does not."""
    try:
        scheme = scheme_of(getattr(config, "quantization_config", None), "")
    except RiaError:
        return None
    return None if scheme is None else scheme.method


def _load(folder: Path, name: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    """`name` is what the user called the model, for errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_config(str(folder))
    architecture = model_class(name, config)
    # Weights that do not fit are refused below, by name; transformers' own message only says which flag ignores them.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **attention_options(config)}
    with _loading(name):
        model, info = load_dense(architecture, folder, dtype, **options)
    if output_head(model) is None:
        raise RiaError(
            f"{name}: the forward pass of a {architecture.__name__} gives no logits of tokens, so there is no "
            "perplexity to measure."
        )
    # Where weights are missing, transformers goes on with random ones.
    if info["mismatched_keys"]:
        wrong, found, wanted = min(info["mismatched_keys"])
        raise RiaError(
            f"{name}: {wrong} has shape {tuple(found)}, config.json asks for {tuple(wanted)}. Get the files again."
        )
    if info["missing_keys"]:
        raise RiaError(f"{name}: weights missing: {', '.join(sorted(info['missing_keys'])[:5])}. Get the files again.")
    return model.to(device).eval()


@contextmanager
def _loading(model: str) -> Iterator[None]:
    try:
        yield
    except (RiaError, MemoryError):
        raise
    except Exception as error:  # strict configurations have types of their own for what is wrong with a value
        raise RiaError(f"{model}: transformers cannot load it: {reason_of(error)}") from error


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any error in transformers' code into a RiaError that begins with `what`; its cause is that error.

    Errors about memory or CUDA pass through: they are not the model's fault.
    """
    try:
        yield
    except RiaError:
        raise
    except Exception as error:
        if "memory" in str(error) or "CUDA" in str(error):
            raise
        raise RiaError(f"{what} ({first_line(error)}).") from error


def reason_of(error: Exception) -> str:
    """What transformers says, but not its advice to let a model's own code run, which nothing here does."""
    if "trust_remote_code" in str(error):
        return "it needs its own Python code, which is not run here"
    return str(error)


def first_line(error: Exception) -> str:
    """The first line of `reason_of`; the error's type if it says nothing."""
    lines = reason_of(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
