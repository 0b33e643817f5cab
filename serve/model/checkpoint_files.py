"""What must be known about a checkpoint before its weights stream in: a local folder, or on the hub."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import vllm.envs as envs

from ria_vllm.checkpoint.consistency import check_digests
from ria_vllm.checkpoint.side_files import checked_proofs, load_permutations
from ria_vllm.checkpoint.weight_files import INDEX_FILE, read_index, tensor_names, unindexed_files, weight_files
from ria_vllm.errors import RiaError
from ria_vllm.files.fetching import hub_errors
from ria_vllm.format.schema import PERMUTATIONS_FILE, PROOFS_FILE, RiaSchema

# Of a repository on the hub. Some hold the same weights a second time, in Mistral's or Meta's own format.
FILES, OTHERS = ["*.json", "*.safetensors"], ["original/*", "*consolidated*"]


def folder_of(model: str, revision: str | None, files: Sequence[str] = FILES) -> Path:
    """The folder of a model: its own, or where the hub's library keeps a repository, which is downloaded now. vLLM then
    finds it there, too.

    Args:
        files: patterns of what is downloaded.

    Raises:
        RiaError: there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if envs.VLLM_USE_MODELSCOPE:
        raise RiaError(f"{model}: download it from ModelScope first, and give the local folder.")
    from huggingface_hub import snapshot_download

    with hub_errors(model, f"{model}: no such folder here"):
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, ignore_patterns=OTHERS))


def files_of(folder: Path) -> dict[str, Path]:
    """Tensor -> its file, of those that vLLM loads, which are all where there is no index; empty without weight files.

    Raises:
        RiaError: a file is missing or damaged.
    """
    if not (folder / INDEX_FILE).is_file():
        files = unindexed_files(folder)
        named = [
            found.groups() for file in files if (found := re.fullmatch(r"(.*)-\d+-of-(\d{1,6})\.safetensors", file))
        ]
        for (stem, total), count in Counter(named).items():
            if count != int(total):  # norms in a missing one would stay as they are made
                raise RiaError(
                    f"{folder}: {count} of the {int(total)} files {stem}-*-of-{total}.safetensors, and no "
                    f"{INDEX_FILE}. Get the others and the index, or remove these if they are of another model."
                )
        return {name: folder / file for file in files for name in tensor_names(folder / file)}
    shards = set(read_index(folder / INDEX_FILE, folder).values())
    return weight_files(folder) if any((folder / file).is_file() for file in shards) else {}


def permutations_of(folder: Path, schema: RiaSchema, files: dict[str, Path]) -> dict[str, np.ndarray]:
    """Linear -> int32 [in], the permutations of a checkpoint.

    Args:
        files: see `files_of`.

    Raises:
        RiaError: they are missing or damaged; or they, weight files and config.json are not of one run.
    """
    path, permutations = folder / PERMUTATIONS_FILE, {}
    if schema.permutes:  # else a stray file does no harm here, because it is not read; `verify` reports it
        if not path.is_file():
            raise RiaError(
                f"{folder}: {PERMUTATIONS_FILE} is missing, though the model was compressed with permutations. Get the "
                "file again. A model on an object store has to be served from a local copy."
            )
        permutations = load_permutations(path)
    check_digests(schema, permutations, files.values(), folder)
    return {name: p.int().numpy() for name, p in permutations.items()}


def proofs_of(schema: RiaSchema, where: str, revision: str | None) -> dict[str, torch.Tensor]:
    """The proof of each matrix of a checkpoint; none if it has none.

    Raises:
        RiaError: they are missing, damaged or of another run.
    """
    if schema.proofs is None:
        return {}
    path = folder_of(where, revision) / PROOFS_FILE
    return checked_proofs(path if path.is_file() else None, schema, where)
