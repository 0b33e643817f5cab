"""Where activations live: the residual streams of this rank, and the chunks of all ranks.

Calibration samples are grouped into chunks. Each rank holds a consecutive share of them (`Ranks.share`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ria_vllm.offline.runtime.ranks import Ranks


class Activations:
    """The residual stream between two layers, for this rank's chunks: one tensor [samples, tokens, hidden] each.

    Args:
        dtype: of the tensors that it returns; None: as they are stored.
        stored_dtype: of the tensors that it stores; None: as they come.
    """

    def __init__(self, dtype: torch.dtype | None = None, stored_dtype: torch.dtype | None = None):
        self.dtype, self.stored_dtype = dtype, stored_dtype
        self.chunks: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.chunks[index].to(self.dtype or self.chunks[index].dtype)

    def __setitem__(self, index: int, stream: torch.Tensor) -> None:
        self.chunks[index] = self._stored(stream)

    def add(self, index: int, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Add float32 values [n, ...] to rows (int64 [n]) of a float32 chunk, in place."""
        self.chunks[index][rows] += values

    def append(self, stream: torch.Tensor) -> None:
        self.chunks.append(self._stored(stream))

    def copy(self) -> "Activations":
        """The same chunks, each of which can be replaced without changing this."""
        found = Activations(self.dtype, self.stored_dtype)
        found.chunks = list(self.chunks)
        return found

    def remove(self) -> None:
        """Free the memory of all chunks."""
        self.chunks.clear()

    def _stored(self, stream: torch.Tensor) -> torch.Tensor:
        return stream.to("cpu", self.stored_dtype or stream.dtype).contiguous()


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
