"""Symmetric matrices of which half is stored, and their inverses in the same memory.

The Gram matrix of a wide input is several times larger than its layer. It is stored as blocks of rows, each from the
diagonal on; only `dense` makes all of the other half.
"""

from collections.abc import Iterator, Sequence

import torch

# Rows of a block. With fewer, products are too thin to be fast; with more, more of the other half is stored.
BLOCK = 256


class SymmetricMatrix:
    """S [width, width]. `rows @ S`, for rows [any, width] of its dtype, is the product.

    Args:
        blocks: consecutive rows of S, each [rows, columns from the block's first row on]; not copied. The square at
            the diagonal has both halves, and both are used.
    """

    def __init__(self, blocks: Sequence[torch.Tensor]):
        self.blocks = list(blocks)

    @staticmethod
    def of(dense: torch.Tensor) -> "SymmetricMatrix":
        """The upper half of `dense` [width, width]: views, not copies."""
        return SymmetricMatrix([dense[start : start + BLOCK, start:] for start in range(0, len(dense), BLOCK)])

    @property
    def width(self) -> int:
        return self.blocks[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self.blocks[0].device

    def spans(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, row after the last, block) for each block."""
        return _spans(self.blocks)

    def diagonal(self) -> torch.Tensor:
        """[width], a copy."""
        return torch.cat([block.diagonal() for block in self.blocks])

    def __rmatmul__(self, rows: torch.Tensor) -> torch.Tensor:
        product = torch.zeros_like(rows)
        for start, stop, block in self.spans():
            product[:, start:].addmm_(rows[:, start:stop], block)
            product[:, start:stop].addmm_(rows[:, stop:], block[:, stop - start :].T)
        return product

    def dense(self, p: torch.Tensor | None = None) -> torch.Tensor:
        """S [width, width], or S[p][:, p] for a permutation of the channels (int64 [width])."""
        whole = torch.empty(self.width, self.width, dtype=self.blocks[0].dtype, device=self.device)
        positions = None if p is None else torch.argsort(p)
        for start, stop, _ in self.spans():
            rows = self.neighbours(start, stop)
            if positions is None:
                whole[start:stop] = rows
            else:
                whole.index_copy_(0, positions[start:stop], rows[:, p])
        return whole

    def rows(self, channels: torch.Tensor) -> torch.Tensor:
        """S[channels] [n, width], for channels int64 [n]."""
        found = torch.empty(len(channels), self.width, dtype=self.blocks[0].dtype, device=self.device)
        for start, stop, block in self.spans():
            inside = ((channels >= start) & (channels < stop)).nonzero()[:, 0]
            found[inside, start:] = block[channels[inside] - start]
            below = (channels >= stop).nonzero()[:, 0]  # their columns from start to stop are in this block
            found[below, start:stop] = block[:, channels[below] - start].T
        return found

    def neighbours(self, start: int, stop: int) -> torch.Tensor:
        """S[start:stop] [stop - start, width], for rows that all lie in one block."""
        parts = []
        for first, after, block in self.spans():
            if after <= start:  # the columns to the left of a block are in the blocks above it
                parts.append(block[:, start - first : stop - first].T)
                continue
            parts.append(block[start - first : stop - first])
            break
        return torch.cat(parts, dim=1)

    def copy(self, p: torch.Tensor | None = None) -> "SymmetricMatrix":
        """S, or S[p][:, p] for a permutation of the channels (int64 [width])."""
        if p is None:
            return SymmetricMatrix([block.clone() for block in self.blocks])
        return SymmetricMatrix([self.rows(p[start:stop])[:, p[start:]] for start, stop, _ in self.spans()])

    def normalised(self, scale: torch.Tensor) -> "SymmetricMatrix":
        """S_ij / (scale_i scale_j), a copy; scale is [width]."""
        return SymmetricMatrix(
            [(block / scale[start:stop, None]).div_(scale[start:]) for start, stop, block in self.spans()]
        )

    def divide(self, scale: torch.Tensor) -> None:
        """Divide S_ij by scale_i scale_j, in place; scale is [width]."""
        for start, stop, block in self.spans():
            block.div_(scale[start:stop, None]).div_(scale[start:])

    def add_to_diagonal(self, added: torch.Tensor) -> None:
        """Add `added` [width], in place."""
        for start, stop, block in self.spans():
            block.diagonal().add_(added[start:stop])

    def into_inverse(self) -> "BlockInverse":
        """S^-1, for a positive definite S. Afterwards S is empty: its blocks become the factors.

        Raises:
            torch.linalg.LinAlgError: S is not positive definite.
        """
        blocks, self.blocks = self.blocks, []
        for number, block in enumerate(blocks):
            _eliminate(block, blocks[number + 1 :])
        return BlockInverse(blocks)


class BlockInverse:
    """S^-1 [width, width] as the factors U^T D U of S; `rows @ inverse`, for rows [any, width], is the product.

    In blocks, U is upper triangular with ones on its diagonal, and D is diagonal (the block form of a Cholesky
    factorisation; Golub and Van Loan, Matrix Computations, 4.1).

    Args:
        blocks: shaped as in `SymmetricMatrix`: [a block of D^-1, the same rows of U to the right of it].
    """

    def __init__(self, blocks: Sequence[torch.Tensor]):
        self.blocks = list(blocks)

    def __rmatmul__(self, rows: torch.Tensor) -> torch.Tensor:
        solved = rows.clone()
        spans = list(_spans(self.blocks))
        for start, stop, block in spans:
            solved[:, stop:].addmm_(solved[:, start:stop], block[:, stop - start :], alpha=-1)
        for start, stop, block in reversed(spans):
            pivot, right = block[:, : stop - start], block[:, stop - start :]
            part = solved[:, start:stop] @ pivot
            solved[:, start:stop] = part.addmm_(solved[:, stop:], right.T, alpha=-1)
        return solved


def inverted_in_place(dense: torch.Tensor) -> torch.Tensor:
    """The inverse [n, n] of a dense positive definite matrix, in the memory of that matrix.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite.
    """
    # LAPACK stores matrices by columns, so it can work in place on the transpose.
    dense = dense.T
    torch.linalg.cholesky(dense, out=dense)
    return torch.cholesky_inverse(dense, out=dense)


def _eliminate(block: torch.Tensor, below: Sequence[torch.Tensor]) -> None:
    """One step of the factorisation: turn [D, D U] into [D^-1, U], and subtract its part from the blocks below."""
    pivot, right = block[:, : len(block)], block[:, len(block) :]
    pivot.copy_(torch.cholesky_inverse(torch.linalg.cholesky(pivot)))
    unscaled = right.clone()
    torch.mm(pivot, unscaled, out=right)
    for start, stop, later in _spans(below):
        later.addmm_(right[:, start:stop].T, unscaled[:, start:], alpha=-1)


def _spans(blocks: Sequence[torch.Tensor]) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first row, row after the last, block) for each block."""
    start = 0
    for block in blocks:
        yield start, start + len(block), block
        start += len(block)
