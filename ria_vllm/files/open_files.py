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
    """The last files that tensors were read from stay open, until much was read or the file has changed.

    Args:
        most_bytes: that stay mapped.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._open: dict[Path, tuple[tuple[int, ...], Any]] = {}
        self._bytes, self._most_bytes = 0, most_bytes

    def tensor(self, path: Path, name: str) -> torch.Tensor:
        """One tensor, on the CPU. It is not mapped from its file: what others write there leaves it as it is.

        Raises:
            RiaError: the file cannot be read, or does not have it.
        """
        try:
            return self.read(path, name)
        except (SafetensorError, OSError) as error:
            raise RiaError(f"{path}: cannot read {name} ({error}). Get the file again.") from None

    def read(self, path: Path, name: str, index: int | slice | None = None) -> torch.Tensor:
        """`tensor`, or this part of it in the first dimension, with the errors of safetensors and the system.

        Raises:
            SafetensorError, OSError: the file cannot be read, or does not have it.
        """
        file = self._file(path)
        tensor = (file.get_tensor(name) if index is None else file.get_slice(name)[index]).clone()
        self._bytes += tensor.nbytes
        if self._bytes > self._most_bytes:
            self.close()
        return tensor

    def shape(self, path: Path, name: str) -> tuple[int, ...]:
        """That of a tensor, which is not read.

        Raises:
            RiaError: see `tensor`.
        """
        try:
            return tuple(self._file(path).get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise RiaError(f"{path}: cannot read {name} ({error}). Get the file again.") from None

    def close(self) -> None:
        """Close all files, so that what was read of them is no longer mapped."""
        self._open.clear()
        self._bytes = 0

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
