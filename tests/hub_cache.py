"""The hub's cache of one repository, from which huggingface_hub reads while it is offline."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

NAME, COMMIT = "org/model", "0" * 40


class Cache:
    """The cache of `NAME`. Each commit is a copy of the folder `model`; the main branch is at the first one."""

    def __init__(self, folder: Path, model: Path, patch: pytest.MonkeyPatch, commits: Sequence[str] = (COMMIT,)):
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
        self.folder = folder / "models--org--model"
        (self.folder / "refs").mkdir(parents=True)
        for commit in commits:
            shutil.copytree(model, self.commit(commit))
        self.move_to(commits[0])

    def commit(self, commit: str = COMMIT) -> Path:
        return self.folder / "snapshots" / commit

    def move_to(self, commit: str) -> None:
        """Let the main branch be at a commit."""
        (self.folder / "refs" / "main").write_text(commit)
