"""Where the numbers that are trained lie in the dense weight that the forward pass reads."""

from collections.abc import Iterator
from functools import lru_cache

import torch

# Entries of a dense weight that are handled at a time; the indices have eight bytes each. GPUs need more to do at once.
BLOCK, GPU_BLOCK = 1 << 20, 1 << 24


class Kept:
    """The kept entries of a 2:4 weight [out, in], in the order in which a checkpoint stores them: [out, in/2].

    Positions are made from the bitmask, a block of rows at a time: it has one bit per entry of the dense weight, and
    indices would have 64 or, kept, 32.

    Args:
        bitmask: uint8 [out, in/8], columns in the stored order; it must have passed `sparse24.check_bitmask`.
        order: integers [in], the stored order of the columns; None: the model's own.
    """

    def __init__(self, bitmask: torch.Tensor, order: torch.Tensor | None = None):
        self.bitmask = bitmask
        self.order = None if order is None else order.to(bitmask.device)

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
            dense: [out, in], columns in the model's own order.
        """
        return dense[rows].gather(1, self._columns(rows)).float()

    def put(self, values: torch.Tensor, dense: torch.Tensor, rows: slice) -> None:
        """Write kept entries into a dense weight, which has zeros elsewhere."""
        dense[rows].scatter_(1, self._columns(rows), values.to(dense.dtype))

    def _columns(self, rows: slice) -> torch.Tensor:
        """int64 [rows, in/2]: the columns of the kept entries, in the model's own order."""
        bitmask = self.bitmask[rows]
        first = torch.arange(0, bitmask.shape[1] * 8, 8, device=bitmask.device)
        columns = (_places(bitmask.device)[bitmask.int()] + first[:, None]).flatten(1)
        return columns if self.order is None else self.order[columns].long()


class Whole:
    """All entries of a dense tensor, such as a norm's weight or a bias."""

    def __init__(self, shape: torch.Size):
        self.shape = tuple(shape)

    def rows(self) -> Iterator[slice]:
        return iter([slice(None)])

    def take(self, dense: torch.Tensor, rows: slice) -> torch.Tensor:
        return dense[rows].float()

    def put(self, values: torch.Tensor, dense: torch.Tensor, rows: slice) -> None:
        dense[rows].copy_(values)


@lru_cache(maxsize=8)
def _places(device: torch.device) -> torch.Tensor:
    """int64 [256, 4]: for each byte of a bitmask, which of its eight columns are kept. (Zeros for illegal bytes.)"""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    places = [row.nonzero().flatten() if int(row.sum()) == 4 else torch.zeros(4, dtype=torch.int64) for row in bits]
    return torch.stack(places).to(device)
