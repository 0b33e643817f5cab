"""Where the teacher is: a folder, or one commit of a repository on the hub."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.hf import commit_of, from_hub
from ria_vllm.offline.runtime.ranks import Ranks
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

    def check_resumed(self, begun: Mapping[str, Any]) -> None:
        """Refuse another commit than the interrupted run's.

        Args:
            begun: the fingerprint of that run.

        Raises:
            RiaError: the user has named another revision.
        """
        before = begun.get("teacher_revision")
        if begun.get("teacher") == self.name and before and before != self.revision:
            raise RiaError(
                f"--resume: the interrupted run learns from {self.name} at commit {before}, this one would learn from "
                f"{self.revision}. Give --teacher {self.name}@{before}, or leave out --resume to start again."
            )


def recorded_commit(teacher: str, begun: Mapping[str, Any], recipe: Mapping[str, Any]) -> str | None:
    """The commit of a hub id that an interrupted run learns from, or else that the student was pruned from.

    Args:
        begun: the fingerprint of that run; empty if there is none.
        recipe: what `compress` wrote into the student's folder.
    """
    for story, name, commit in ((begun, "teacher", "teacher_revision"), (recipe, "source", "source_revision")):
        found = story.get(commit)
        if story.get(name) == teacher and isinstance(found, str) and re.fullmatch("[0-9a-f]{40}", found):
            return found
    return None


def located(teacher: str, recorded: str | None, ranks: Ranks, monitor: Monitor) -> Origin:
    """Find the teacher, or fetch it. All processes get the same commit, each into the cache of its own machine.

    Args:
        teacher: a folder, or a hub id, perhaps with @ and a branch, tag or commit.
        recorded: the commit to take where none is named; None: that of the main branch.

    Raises:
        RiaError: it cannot be fetched, or the hub's cache does not say which commit it is.
    """
    if os.path.exists(teacher):
        return Origin(teacher, Path(teacher))
    name, _, revision = teacher.partition("@")
    with monitor.phase("fetching the teacher from the hub"):
        commit = None
        if ranks.first:
            folder = from_hub(name, revision or recorded)
            commit = commit_of(folder)
            if commit is None:
                raise RiaError(
                    f"{teacher}: {folder} is not named after a commit, so it would not be known which one the student "
                    "has learned from. Give this folder as --teacher."
                )
        commit = ranks.broadcast(commit)
        return Origin(name, from_hub(name, commit), commit)
