"""How a consumer's input permutation becomes its producers' row order.

A consumer whose columns are stored in order p needs x[..., p]. If x comes from other linears through an operation on
each channel alone (an activation, a product), or through one that only mixes tokens (attention), those linears can
compute their rows in that order. Then the permutation costs nothing. `permutation.head_rows` says what attention
allows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from ria_vllm import permutation
from ria_vllm.errors import RiaError
from ria_vllm.schema import RiaSchema


@dataclass(frozen=True)
class RowOrder:
    """The order in which rows [start, start + len(order)) of a producer are taken; `for_all`: they are all its rows.

    A numpy array, because vLLM pickles its configuration for the worker processes. Each torch tensor would travel as
    shared memory, with a file descriptor of its own.
    """

    order: np.ndarray
    start: int = 0
    for_all: bool = True

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` [out, ...] with its rows reordered.

        Raises:
            ValueError: the tensor does not have these rows.
        """
        rows, end = tensor.shape[0], self.start + len(self.order)
        if end > rows or (self.for_all and end != rows):
            raise ValueError(f"an order of rows {self.start} to {end} for a tensor of {rows} rows")
        order = torch.from_numpy(self.order).to(tensor.device)
        if self.for_all:
            return tensor.index_select(0, order)
        return torch.cat([tensor[: self.start], tensor[self.start : end].index_select(0, order), tensor[end:]])


@dataclass
class Folding:
    """The consumers whose permutation is folded away, and the row orders that absorb it, by producer."""

    folded: set[str] = field(default_factory=set)
    row_orders: dict[str, list[RowOrder]] = field(default_factory=dict)


def fold(
    schema: RiaSchema, permutations: Mapping[str, np.ndarray], is_pruned: Callable[[str], bool], where: str
) -> Folding:
    """Compute the row orders of all producers.

    Args:
        permutations: consumer's name -> int32 [in], checked to be permutations.
        is_pruned: whether a linear is stored compressed. A consumer with a dense producer permutes its input itself.
        where: the folder or repository, for errors.

    Raises:
        RiaError: a permutation that does not keep to attention's heads, or two orders for the same rows of a producer.
    """
    result = Folding()
    rules = [(name, rule) for name in permutations for rule in schema.folds if rule.numbers(name) is not None]
    pruned = {p.name for name, rule in rules for p in rule.producers_of(name) if is_pruned(p.name)}
    for consumer, rule, producers in schema.active_folds(permutations, pruned):
        order = torch.from_numpy(permutations[consumer]).long()
        if rule.coupling == "heads":
            rows = permutation.head_rows(order, rule.num_heads or 0, rule.num_kv_heads or 0)
            if isinstance(rows, str):
                raise RiaError(f"{where}: {consumer}: its permutation cannot be folded into attention heads: {rows}.")
            order = rows
        for producer in producers:
            start, end = producer.rows or (0, len(order))
            if start < 0 or end - start != len(order):
                raise RiaError(
                    f"{where}: {consumer}: its fold reorders {len(order)} rows, but takes {end - start} of "
                    f"{producer.name}."
                )
            others = result.row_orders.setdefault(producer.name, [])
            if any(start < o.start + len(o.order) and o.start < end for o in others):
                raise RiaError(f"{where}: two folds reorder the same rows of {producer.name}.")
            others.append(RowOrder(order.numpy(), start, producer.rows is None))
        result.folded.add(consumer)
    return result
