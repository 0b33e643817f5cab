"""In the place of the library `datasets`: one data set of the hub, which moves on from commit to commit."""

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


class HubTexts:
    """commits: commit -> the texts of the rows. now: the commit that is read. asked: by what names, and how it was
    loaded. read: how many rows have been."""

    def __init__(self, **commits: list[str]):
        self.commits = commits
        self.now: str = next(iter(commits))
        self.asked: list[tuple[str | None, ...]] = []
        self.read = 0

    def load_dataset_builder(self, repository: str, configuration: str | None) -> SimpleNamespace:
        self.asked.append((repository, configuration))
        return SimpleNamespace(
            hash=self.now,
            as_streaming_dataset=self.rows,
            download_and_prepare=lambda: self.asked.append(("download",)),
            as_dataset=self.rows,
        )

    def rows(self, split: str) -> Iterator[dict[str, str]]:
        assert split == "train"
        for text in self.commits[self.now]:
            self.read += 1
            yield {"text": text}


def install(patch: pytest.MonkeyPatch, **commits: list[str]) -> HubTexts:
    """Let it be imported as `datasets`."""
    found = HubTexts(**commits)
    patch.setitem(sys.modules, "datasets", found)
    return found
