"""The teacher: a folder, or one commit of a repository on the hub; and what it says of a text."""

import os
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

    name: what the user calls it.
    folder: with its files, here or in the hub's cache.
    revision: the commit of a repository on the hub; None: a folder.
    """

    name: str
    folder: Path
    revision: str | None = None


def located(teacher: str, recipe: Mapping[str, Any], begun: Mapping[str, Any], monitor: Monitor) -> Origin:
    """Find the teacher, or fetch it.

    Args:
        teacher: a folder, or a hub id: the commit that the run began with, or that the student was pruned from;
            otherwise that of the main branch.
        recipe: what `compress` wrote into the student's folder.
        begun: the fingerprint of the run that goes on; empty: none does.

    Raises:
        RiaError: it cannot be fetched.
    """
    if os.path.exists(teacher):
        return Origin(teacher, Path(teacher))
    with monitor.phase("fetching the teacher from the hub"):
        revision = recipe.get("source_revision") if recipe.get("source") == teacher else None
        if begun.get("teacher") == teacher:
            revision = begun.get("teacher_revision")
        folder = from_hub(teacher, revision)
    return Origin(teacher, folder, commit_of(folder))


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
