"""How a consumer's input permutation becomes one of its producers' rows.

A consumer whose columns are permuted by p needs x[..., p]. If x comes from other linears through an operation on
each channel alone (an activation, a product), or through one that only mixes tokens (attention), those linears can
permute their rows instead. Then the permutation costs nothing. `permutation.head_rows` says what attention
allows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import permutation
from ria_vllm.format.schema import RiaSchema


@dataclass(frozen=True)
class RowPermutation:
    """A permutation of some rows of a producer: [start, start + len(p) / blocks) of each block.

    `for_all`: they are all its rows; `blocks`: how many equal blocks its rows make.

    `p` is a numpy array, because vLLM pickles its configuration for the worker processes. Each torch tensor would
    travel as shared memory, with a file descriptor of its own.
    """

    p: np.ndarray
    start: int = 0
    for_all: bool = True
    blocks: int = 1

    def places(self, rows: int) -> torch.Tensor:
        """Where these rows are among the `rows` of a producer: int64, ascending.

        Raises:
            ValueError: it does not have them.
        """
        end = self.start + len(self.p) // self.blocks
        if self.for_all and end != rows:
            raise ValueError(f"a permutation of rows {self.start} to {end} for a tensor of {rows} rows")
        return permutation.places(rows, self.start, end, self.blocks)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` [out, ...] with its rows permuted.

        Raises:
            ValueError: the tensor does not have these rows.
        """
        rows, p = tensor.shape[0], torch.from_numpy(self.p)
        places = self.places(rows)
        if self.for_all:
            return tensor.index_select(0, p.to(tensor.device))
        index = torch.arange(rows)
        index[places] = places[p]
        return tensor.index_select(0, index.to(tensor.device))

    def overlaps(self, other: "RowPermutation") -> bool:
        """Whether both may move the same row. With other blocks, that is assumed."""
        if self.blocks != other.blocks:
            return True
        one, two = (o.start + len(o.p) // o.blocks for o in (self, other))
        return self.start < two and other.start < one


@dataclass
class Folding:
    """The consumers whose permutation is folded away, and the row permutations that absorb it, by producer."""

    folded: set[str] = field(default_factory=set)
    row_permutations: dict[str, list[RowPermutation]] = field(default_factory=dict)


def fold(
    schema: RiaSchema, permutations: permutation.Permutations, is_pruned: Callable[[str], bool], where: str | Path
) -> Folding:
    """Compute the row permutations of all producers.

    Args:
        permutations: consumer's name -> integers [in], checked to be permutations.
        is_pruned: whether a linear is stored compressed. A consumer with a dense producer permutes its input itself.
        where: the folder or repository, for errors.

    Raises:
        RiaError: a permutation that does not keep to attention's heads, or two of the same rows of a producer.
    """
    result = Folding()
    rules = [(name, rule) for name in permutations for rule in schema.folds if rule.numbers(name) is not None]
    pruned = {p.name for name, rule in rules for p in rule.producers_of(name) if is_pruned(p.name)}
    for consumer, rule, producers in schema.active_folds(permutations, pruned):
        try:
            permuted = rule.row_permutations(torch.as_tensor(permutations[consumer]))
        except ValueError as error:
            raise RiaError(
                f"{where}: {consumer}: its permutation cannot be folded into attention heads: {error}."
            ) from None
        for producer, rows in zip(producers, permuted, strict=True):
            start, end = producer.rows or (0, len(rows))
            if start < 0 or (end - start) * producer.blocks != len(rows):
                of_each = f" (rows {start} to {end} of each of {producer.blocks} blocks)" if producer.blocks > 1 else ""
                raise RiaError(
                    f"{where}: {consumer}: its fold permutes {len(rows)} rows, but takes "
                    f"{(end - start) * producer.blocks} of {producer.name}{of_each}."
                )
            own = RowPermutation(rows.numpy(), start, producer.rows is None, producer.blocks)
            others = result.row_permutations.setdefault(producer.name, [])
            if any(own.overlaps(other) for other in others):
                raise RiaError(f"{where}: two folds permute the same rows of {producer.name}.")
            others.append(own)
        result.folded.add(consumer)
    return result
