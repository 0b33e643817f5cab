"""Digests of the local files that a recipe names by the last part of their paths, so that a reader can tell them from
others of that name. Data sets on the hub have their commit instead."""

import hashlib
from pathlib import Path

from ria_vllm.checkpoint.shards import tensor_entries, weights_digest
from ria_vllm.checkpoint.weight_files import weight_files
from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.hub import HubText


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in 64 lowercase hexadecimal digits.

    Raises:
        RiaError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RiaError(f"{path}: cannot be read ({error.strerror or error}).") from error


def of_text(text: str | HubText, name: str) -> dict[str, str]:
    """What tells a text from others: NAME_sha256 of a file, NAME_revision of a data set on the hub, nothing of what
    the dense model writes ("self").

    Args:
        name: what the recipe calls the text.
    """
    if isinstance(text, HubText):
        return {f"{name}_revision": text.revision} if text.revision else {}
    return {} if text == "self" else {f"{name}_sha256": sha256(text)}


def of_weights(folder: Path) -> str:
    """The `weights_digest` of a folder, ours or anybody's: see docs/reference.md. No weight is read in full.

    Raises:
        RiaError: no safetensors, or damaged ones.
    """
    files = weight_files(folder)
    entries = [entry for path in sorted(set(files.values())) for entry in tensor_entries(path)]
    return weights_digest([entry for entry in entries if files.get(entry[0]) == entry[2]])
