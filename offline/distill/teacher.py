"""The teacher: a folder, or one commit of a repository on the hub; and what it says of a text."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline.model.run.hf import commit_of, from_hub
from ria_vllm.progress import Monitor


@dataclass(frozen=True)
class Origin:
    """The files of the dense model.

    name: what the user calls it, without a revision.
    folder: with its files, here or in the hub's cache.
    revision: the commit of a repository on the hub; None: a folder.
    """

    name: str
    folder: Path
    revision: str | None = None


def located(teacher: str, recipes: list[Mapping[str, Any]], monitor: Monitor) -> Origin:
    """Find the teacher, or fetch it.

    Args:
        teacher: a folder, or a hub id, perhaps with @ and a branch, tag or commit. Where none is named, it is the
            commit in the first of `recipes` that names one, otherwise that of the main branch.
        recipes: the fingerprint of the interrupted run, if there is one, and what `compress` wrote into the student's
            folder.

    Raises:
        RiaError: it cannot be fetched, or the hub's cache does not say which commit it is.
    """
    if os.path.exists(teacher):
        return Origin(teacher, Path(teacher))
    name, _, revision = teacher.partition("@")
    with monitor.phase("fetching the teacher from the hub"):
        recorded = (_recorded(name, recipe) for recipe in recipes)
        folder = from_hub(name, revision or next(filter(None, recorded), None))
    commit = commit_of(folder)
    if commit is None:
        raise RiaError(
            f"{teacher}: {folder} is not named after a commit, so it would not be known which one the student has "
            "learned from. Give this folder as --teacher."
        )
    return Origin(name, folder, commit)


def _recorded(teacher: str, recipe: Mapping[str, Any]) -> str | None:
    """The commit of a hub id in a recipe, which may be another program's."""
    for name, commit in (("teacher", "teacher_revision"), ("source", "source_revision")):
        found = recipe.get(commit)
        if recipe.get(name) == teacher and isinstance(found, str) and re.fullmatch("[0-9a-f]{40}", found):
            return found
    return None


@torch.no_grad()
def asked(teacher: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The teacher's logits [tokens of all sequences, vocabulary], for int64 [sequences, tokens].

    Raises:
        RiaError: one is NaN: training would seem to diverge.
    """
    logits = teacher(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    if bool(logits.isnan().any()):
        raise RiaError(
            f"the teacher itself computes NaN in {name_of(logits.dtype)}. Check that it works without pruning, or give "
            "--compute-dtype float32."
        )
    return logits
