"""Open safetensors files. Each opening reads the whole header, which for thousands of tensors takes longer than one."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ria_vllm.errors import RiaError

MOST_FILES = 8
# What was read stays mapped for as long as its file is open, and counts as memory of the process.
MOST_BYTES = 1 << 28


class OpenFiles:
    """The last files that tensors were read from stay open, until much was read or the file has changed."""

    def __init__(self) -> None:
        self._open: dict[Path, tuple[tuple[int, ...], Any]] = {}
        self._bytes = 0

    def tensor(self, path: Path, name: str) -> torch.Tensor:
        """One tensor, on the CPU.

        Raises:
            RiaError: the file cannot be read, or does not have it.
        """
        try:
            tensor = self._file(path).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RiaError(f"{path}: cannot read {name} ({error}). Get the file again.") from None
        self._bytes += tensor.nbytes
        if self._bytes > MOST_BYTES:
            self._open.clear()
            self._bytes = 0
        return tensor

    def _file(self, path: Path) -> Any:
        found = os.stat(path)
        state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        before, file = self._open.pop(path, (None, None))
        if before != state:
            file = safe_open(path, framework="pt")
        self._open[path] = state, file  # the last one is the one used last
        if len(self._open) > MOST_FILES:
            del self._open[next(iter(self._open))]
        return file
