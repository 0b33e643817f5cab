"""Where activations live: the residual streams of this rank, in memory or in files, and the chunks of all ranks.

Calibration samples are grouped into chunks. Each rank holds a consecutive share of them (`Ranks.share`).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.writer import disk_errors
from ria_vllm.offline.runtime.ranks import Ranks


class Activations:
    """The residual stream between two layers, for this rank's chunks: one tensor [samples, tokens, hidden] each.

    Args:
        folder: where chunks are written; None: they stay in memory.
        dtype: of the tensors that it returns; None: as they are stored.
        stored_dtype: of the tensors that it stores; None: as they come.
    """

    def __init__(
        self,
        folder: Path | None = None,
        dtype: torch.dtype | None = None,
        stored_dtype: torch.dtype | None = None,
    ):
        self.folder, self.dtype, self.stored_dtype = folder, dtype, stored_dtype
        self.chunks: list[torch.Tensor | Path] = []
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        chunk = self.chunks[index]
        stream = chunk if isinstance(chunk, torch.Tensor) else load_file(chunk)["stream"]
        return stream.to(self.dtype or stream.dtype)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        self.chunks[index] = self._store(index, stream)

    def add(self, index: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add float32 values [n, ...] to rows (int64 [n]) of a float32 chunk, in place; no others are written."""
        chunk = self.chunks[index]
        if isinstance(chunk, torch.Tensor):
            chunk[rows] += values
            return
        with disk_errors(chunk), chunk.open("rb") as file, safe_open(chunk, framework="np") as header:
            start = 8 + int.from_bytes(file.read(8), "little")  # the file's one tensor comes right after its header
            shape = header.get_slice("stream").get_shape()
            stored = np.memmap(chunk, np.float32, "r+", start, tuple(shape))
            stored[rows.numpy()] += values.numpy()

    def append(self, stream: torch.Tensor) -> None:
        self.chunks.append(self._store(len(self.chunks), stream))

    def copy(self) -> "Activations":
        """The same chunks, in memory."""
        found = Activations(None, self.dtype, self.stored_dtype)
        found.chunks = list(self.chunks)
        return found

    def remove(self) -> None:
        """Free the memory or the files of all chunks."""
        self.chunks.clear()
        if self.folder is not None:
            with disk_errors(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _store(self, index: int, stream: torch.Tensor) -> torch.Tensor | Path:
        stream = stream.to("cpu", self.stored_dtype or stream.dtype).contiguous()
        if self.folder is None:
            return stream
        path = self.folder / f"{index}.safetensors"
        with disk_errors(path):
            path.unlink(missing_ok=True)  # the old content may still be mapped
            save_file({"stream": stream}, path)
        return path


@dataclass(frozen=True)
class Streams:
    """The residual streams at one point of the model.

    pruned: of the pruned model.
    dense: of the dense model on its own path; None if reconstruction does not aim at it.
    total: the number of chunks of all ranks to which weights are fitted.
    held_out: how many chunks of this rank follow those, to which nothing is.
    """

    pruned: Activations
    dense: Activations | None
    total: int
    held_out: int = 0

    @property
    def fitted(self) -> range:
        """The numbers of this rank's chunks to which weights are fitted."""
        return range(len(self.pruned) - self.held_out)

    @property
    def measured(self) -> range:
        """Those of the held-out ones."""
        return range(len(self.pruned))[len(self.fitted) :]

    def append(self, stream: torch.Tensor) -> None:
        """Add a chunk of the embedding's output, where both models are still the same."""
        self.pruned.append(stream)
        if self.dense is not None:
            self.dense.append(stream)


class AllChunks(Sequence[torch.Tensor]):
    """The chunks of all ranks, float32 on the device.

    All ranks have to ask for the same chunk at the same time: the one that holds it broadcasts it.

    Args:
        own: this rank's chunks.
        total: the number of chunks of all ranks.
    """

    def __init__(self, own: Activations, total: int, ranks: Ranks, device: torch.device):
        self.own, self.total, self.ranks, self.device = own, total, ranks, device

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.total:
            raise IndexError(index)
        owner, own = self.place(index)
        chunk = None if own is None else self.own[own]
        return self.ranks.broadcast(chunk, owner).to(self.device, torch.float32)

    def place(self, index: int) -> tuple[int, int | None]:
        """The rank that holds a chunk, and its number among those of this rank if that is the one."""
        owner = next(rank for rank in range(self.ranks.size) if index in self.ranks.share(self.total, rank))
        return owner, index - self.ranks.share(self.total).start if owner == self.ranks.rank else None
