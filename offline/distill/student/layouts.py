"""Where the numbers that are trained lie in the dense weight that the forward pass reads."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

# Entries of a dense weight that are handled at a time; the indices have four bytes each. GPUs need more to do at once.
BLOCK, GPU_BLOCK = 1 << 20, 1 << 24

Part = Callable[[torch.Tensor], torch.Tensor]


class Kept:
    """The kept entries of a pruned weight [out, in], in the order in which a checkpoint stores them: [out, in/2].

    Positions are made from the bitmask, a block of rows at a time: it has one bit per entry of the dense weight, and
    indices would have 64 or, kept, 32.

    Args:
        bitmask: uint8 [out, in/8], columns in the stored order; it must have passed `sparse24.check_bitmask`.
        p: integers [in], the permutation of the columns; None: they are not permuted.
        part: gives a view of the weight in the tensor that holds it; None: that is the weight itself.
    """

    def __init__(self, bitmask: torch.Tensor, p: torch.Tensor | None = None, part: Part | None = None):
        self.bitmask = bitmask
        self.part: Part = part or (lambda dense: dense)
        self.p = None if p is None else p.to(bitmask.device, torch.int32)

    @property
    def shape(self) -> tuple[int, int]:
        return self.bitmask.shape[0], self.bitmask.shape[1] * 4

    def rows(self) -> Iterator[slice]:
        """Blocks of rows."""
        count, columns = self.bitmask.shape[0], self.bitmask.shape[1] * 8
        step = max(1, (BLOCK if self.bitmask.device.type == "cpu" else GPU_BLOCK) // columns)
        return (slice(first, min(first + step, count)) for first in range(0, count, step))

    def take(self, dense: torch.Tensor, rows: slice) -> torch.Tensor:
        """The kept entries of some rows, float32.

        Args:
            dense: [out, in], columns in the model's own order; or what it is a `part` of.
        """
        return self.part(dense)[rows].reshape(-1).index_select(0, self._places(rows)).view(-1, self.shape[1]).float()

    def put(self, values: torch.Tensor, dense: torch.Tensor, rows: slice) -> None:
        """Write kept entries into a dense weight, which has zeros elsewhere."""
        self.part(dense)[rows].put_(self._places(rows).long(), values.to(dense.dtype).flatten())

    def _places(self, rows: slice) -> torch.Tensor:
        """int32 [rows * in/2]: where the kept entries are in these rows of the dense weight, counted from their first
        entry, row by row."""
        bitmask = self.bitmask[rows]
        count, columns = bitmask.shape[0], bitmask.shape[1] * 8
        first = torch.arange(0, columns, 16, dtype=torch.int32, device=bitmask.device)
        row = torch.arange(0, count * columns, columns, dtype=torch.int32, device=bitmask.device)
        pairs = bitmask.int().unflatten(1, (-1, 2))
        numbers = (pairs[..., 0] | pairs[..., 1] << 8).flatten()
        bits = _kept(bitmask.device).index_select(0, numbers).view(torch.uint8)
        places = (bits.view(count, -1, 8) + first[:, None]).flatten()
        places = places if self.p is None else self.p.index_select(0, places)
        places.view(count, -1).add_(row[:, None])
        return places


@lru_cache(maxsize=8)
def _kept(device: torch.device) -> torch.Tensor:
    """int64 [65536], each eight bytes: for two bytes of a bitmask, which of their 16 columns are kept. (Zeros for
    illegal ones.)"""
    bits = torch.arange(1 << 16)[:, None] >> torch.arange(16) & 1
    places, legal = torch.zeros(1 << 16, 8, dtype=torch.uint8), bits.sum(1) == 8
    places[legal] = bits[legal].nonzero()[:, 1].view(-1, 8).to(torch.uint8)
    return places.view(torch.int64).flatten().to(device)
