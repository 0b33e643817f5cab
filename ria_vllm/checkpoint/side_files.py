"""The files beside the weights: permutations and proofs."""

from collections.abc import Callable
from pathlib import Path

import torch

from ria_vllm.checkpoint.weight_files import tensor_names
from ria_vllm.errors import RiaError
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.format import permutation, proofs
from ria_vllm.format.schema import PERMUTATION_SUFFIX, PROOFS_FILE, RiaSchema


def load_permutations(path: Path) -> dict[str, torch.Tensor]:
    """Linear's name -> the permutation of its input channels, integers [in].

    Raises:
        RiaError: file and layer named.
    """
    return _load_named(path, PERMUTATION_SUFFIX, lambda p: permutation.check(p, p.numel()), "a permutation")


def checked_proofs(path: Path | None, schema: RiaSchema, where: str | Path) -> dict[str, torch.Tensor]:
    """Matrix -> its proof, float32 [out, 2], see `ria_vllm.format.proofs`. Empty for a folder that has none.

    Args:
        path: None if the file is not there.
        where: the folder or repository, for messages.

    Raises:
        RiaError: the file is missing, damaged or of another run.
    """
    if schema.proofs is None:
        return {}
    again = "Get all files of one run, or compress the model again."
    if path is None:
        raise RiaError(f"{where}: {PROOFS_FILE} is missing, though config.json names it. {again}")
    found = _load_named(path, proofs.PROOF_SUFFIX, proofs.check, "a proof")
    if proofs.digest(found) != schema.proofs.digest:
        raise RiaError(f"{where}: {PROOFS_FILE} is from another run than config.json. {again}")
    return found


def _load_named(
    path: Path, suffix: str, check: Callable[[torch.Tensor], str | None], what: str
) -> dict[str, torch.Tensor]:
    """Linear's name -> its tensor, from a file in which all names end with `suffix`.

    Args:
        check: why a tensor is not what it should be; None if it is.
        what: it should be.

    Raises:
        RiaError: file and layer named.
    """
    found: dict[str, torch.Tensor] = {}
    files = OpenFiles()
    for stored in tensor_names(path):
        name = stored.removesuffix(suffix)
        if name == stored:
            raise RiaError(f"{path}: {stored}: unknown name. Get the file again.")
        found[name] = files.tensor(path, stored)
        wrong = check(found[name])
        if wrong:
            raise RiaError(f"{path}: {name}: not {what}: {wrong}. Get the file again.")
    return found
