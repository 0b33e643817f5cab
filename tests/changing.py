"""Changes an input of a run at a chosen moment: right after it has opened a file, or read a tensor."""

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ria_vllm.files.open_files import OpenFiles

OPENERS = ("files.open_files", "checkpoint.weight_files")


class Moments:
    """The moments so far. At number `at`, `act` is called."""

    def __init__(self, at: int | None = None, act: Callable[[], Any] = lambda: None):
        self.at, self.act, self.number = at, act, 0

    def pass_by(self) -> None:
        self.number += 1
        if self.number == self.at:
            self.act()


@contextmanager
def watched(place: Path, moments: Moments) -> Iterator[None]:
    """Let moments pass as files below `place` are read."""

    def then(real: Callable[..., Any], path: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            at = path(*arguments)
            if isinstance(at, str | Path) and Path(at).is_relative_to(place):
                moments.pass_by()
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (builtins, io):
            patch.setattr(module, "open", then(open, lambda path, *_: path))
        for module in OPENERS:
            patch.setattr(f"ria_vllm.{module}.safe_open", then(safe_open, lambda path, *_: path))
        patch.setattr(OpenFiles, "read", then(OpenFiles.read, lambda files, path, *_: path))
        yield


def replace_by(other: Path) -> Callable[[Path], None]:
    """Puts a copy of another file or folder in the place of one."""

    def change(path: Path) -> None:
        if path.is_dir():
            path.rename(path.with_name(f"{path.name} before"))
            shutil.copytree(other, path)
            return
        new = path.with_name(".new")
        new.write_bytes(other.read_bytes())
        os.replace(new, path)

    return change


def truncate(path: Path) -> None:
    """In place, where what is mapped would be lost."""
    os.truncate(path, path.stat().st_size // 2)


def touch(path: Path) -> None:
    os.utime(path)
