"""Where activations live: the residual streams, in chunks of calibration samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


class Activations:
    """The residual stream between two layers: for each chunk one tensor [samples, tokens, hidden].

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
    held_out: to so many of the chunks, the last ones, nothing is fitted.
    """

    pruned: Activations
    dense: Activations | None
    held_out: int = 0

    @property
    def fitted(self) -> range:
        """The numbers of the chunks to which weights are fitted."""
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


T = TypeVar("T")


@dataclass(frozen=True)
class OnDemand(Sequence[T]):
    """What is made of some chunks, each when it is asked for: no more than one is in memory.

    chunks: their numbers.
    """

    chunks: Sequence[int]
    make: Callable[[int], T]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> T:  # type: ignore[override]
        return self.make(self.chunks[index])
