"""Which weights of a dense model's folder are meant. Where the programs that read it could disagree, it is refused."""

import itertools
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE, tensor_names, unindexed_files, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json

ADAPTER_CONFIG = "adapter_config.json"
PICKLED = "pytorch_model*.bin"
NAMED_WEIGHTS = "transformers_weights"  # in config.json: the file that transformers reads
CONVERT = (
    "load the model with transformers and save it (model.save_pretrained); or, on the hub, let "
    "https://huggingface.co/spaces/safetensors/convert do it"
)
# Old Llama checkpoints contain it, though it follows from the configuration. It is not written.
LEFT_OUT = "rotary_emb.inv_freq"


def meant_weights(folder: Path, model: str) -> dict[str, Path]:
    """Tensor name -> file, for all tensors of the one model that a folder holds.

    Args:
        model: what the user called it, the folder or a hub id, for errors.

    Raises:
        RiaError: see `find_tensors`; or all weights are pickled, an adapter lies beside them, or config.json names
            others.
    """
    _refuse_named(model, read_json(folder / "config.json").get(NAMED_WEIGHTS))
    if not (folder / INDEX_FILE).is_file() and not unindexed_files(folder):
        refuse_pickled(model, (path.name for path in folder.iterdir()))
    files = find_tensors(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        raise RiaError(
            f"{model}/{ADAPTER_CONFIG}: an adapter lies beside the weights. transformers adds it to them where PEFT is "
            "installed, and vLLM does not, so it is unknown which model is meant. Merge it into the weights (PEFT's "
            "merge_and_unload); or, if they hold it already or should be used without it, move it out of the folder. "
            'From the hub, download the model without it (`hf download --exclude "adapter_*"`).'
        )
    return files


def _refuse_named(model: str, file: Any) -> None:
    """Refuse a model whose config.json tells transformers to read weights that no other program would look for."""
    if file not in (None, SINGLE_FILE, INDEX_FILE):
        raise RiaError(
            f"{model}: {NAMED_WEIGHTS} in config.json names {str(file)[:80]!r}. transformers would read that file, and "
            f"vLLM {SINGLE_FILE} or the shards of {INDEX_FILE}, so it is unknown which model is meant. Load the right "
            "one with transformers, and save it with save_pretrained."
        )


def refuse_pickled(model: str, files: Iterable[str]) -> None:
    """Refuse a model without safetensors that has pickled weights.

    Args:
        model: the folder or hub id, for errors.
        files: paths of its files.

    Raises:
        RiaError: one of them holds pickled weights.
    """
    pickled = sorted(file for file in files if fnmatchcase(file, PICKLED))
    if pickled:
        raise RiaError(
            f"{model}: only {pickled[0]} here. Pickled weights are not opened, because they can run code. Convert them "
            f"to safetensors: {CONVERT}."
        )


def find_tensors(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, for all tensors in the weight files, whether or not the index names them.

    Raises:
        RiaError: see `weight_files`; or two files hold different tensors under one name.
    """
    files = weight_files(folder)
    for path in sorted(set(files.values())):
        for name in tensor_names(path):
            first = files.setdefault(name, path)
            if first != path and not _same(name, first, path):
                raise RiaError(
                    f"{path}: {name} differs from the tensor of that name in {first.name}, and nothing says which is "
                    "right. Get the model again."
                )
    _check_single(folder, files)
    return files


def _check_single(folder: Path, files: Mapping[str, Path]) -> None:
    """Refuse a single file with other tensors than those that an index names: vLLM and we read the latter, transformers
    the former.

    What only one of them has may be a copy of what both have: some programs write a tied head, and others do not.
    """
    single = folder / SINGLE_FILE
    if single in files.values() or not single.is_file():
        return
    there = dict.fromkeys(tensor_names(single), single)
    shared = sorted(there.keys() & files.keys())
    needed = [name for name in sorted(there.keys() ^ files.keys()) if not name.endswith(LEFT_OUT)]
    alone = (name for name in needed if not _is_copy(name, there if name in there else files, shared))
    changed = (name for name in shared if not _same(name, files[name], single))
    for name in itertools.chain(alone, changed):
        raise RiaError(
            f"{single}: its {name} is not that of the shards that {INDEX_FILE} names. transformers would read this "
            "file and vLLM the shards, so it is unknown which model is meant. Remove this file, or the index and its "
            f"shards. Of a model on the hub, download one of the two (`hf download --exclude {SINGLE_FILE}`)."
        )


def _is_copy(name: str, files: Mapping[str, Path], others: Iterable[str]) -> bool:
    """Whether a matrix is equal to another one."""
    with safe_open(files[name], framework="pt") as file:
        tensor = file.get_tensor(name)
    return tensor.dim() > 1 and any(_holds(files[other], other, tensor) for other in others)


def _same(name: str, *paths: Path) -> bool:
    one, other = paths
    with safe_open(one, framework="pt") as file:
        return _holds(other, name, file.get_tensor(name))


def _holds(path: Path, name: str, wanted: torch.Tensor) -> bool:
    with safe_open(path, framework="pt") as file:
        if file.get_slice(name).get_shape() != list(wanted.shape):
            return False
        found = file.get_tensor(name)
    one, other = found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8)
    return found.dtype == wanted.dtype and torch.equal(one, other)
