"""The routed experts of one MoE layer, as a checkpoint stores them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ria_vllm.checkpoint.folding import Folding
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema
from ria_vllm.format.stacks import LayerExperts, layers_of_experts

# Where they cannot be served.
WAY_OUT = "`ria-vllm export` makes a dense folder."


def stored_experts(schema: RiaSchema, pruned: Iterable[str], where: str) -> dict[str, LayerExperts]:
    """The layers whose experts are pruned, by the name of their experts.

    Args:
        pruned: linears that are stored compressed.
        where: the folder or repository, for errors.

    Raises:
        RiaError: only some linears of a layer's experts are pruned, or an expert has a number that is too large.
    """
    pruned, found = set(pruned), {}
    for layer in layers_of_experts(schema, pruned):
        found[layer.name] = layer
        problem = layer.problem(pruned)
        if problem is not None:
            raise RiaError(
                f"{where}: {problem}. Get the files again, or compress the model with all of these experts in --ignore."
            )
    return found


@dataclass(frozen=True)
class ExpertOrders:
    """The orders in which the channels of a layer's experts are stored, by expert.

    Attributes:
        rows: in which the rows of gate and up are taken, so that down finds its input as stored; None: as they are.
        input: int32 [H], in which gate (if there is one) and up of all experts take the channels of a token; None: the
            model's own.
    """

    rows: tuple[np.ndarray | None, ...]
    input: np.ndarray | None

    @classmethod
    def of(cls, experts: LayerExperts, permutations: Mapping[str, np.ndarray], folding: Folding) -> "ExpertOrders":
        """Read them off the checkpoint's permutations.

        An expert's linears belong to one layer of vLLM, and only an activation lies between. So the rows of gate and up
        absorb the order of down even without a fold.

        Raises:
            RiaError: a fold of the checkpoint wants these rows in another order, or experts take a token's channels in
                different ones.
        """
        rows = []
        for expert in range(experts.num_experts):
            order = permutations.get(experts.linear("down", expert))
            for kind in experts.patterns:
                linear = experts.linear(kind, expert)
                for wanted in folding.row_orders.get(linear, ()):
                    if kind == "down" or not wanted.for_all or not np.array_equal(wanted.order, order):
                        raise RiaError(
                            f"{linear}: a fold reorders its rows for another linear than the expert's own down "
                            f"projection, which is not served. {WAY_OUT}"
                        )
            rows.append(order)
        first = [linear for linear, kind, _ in experts.linears() if kind != "down"]
        inputs = [None if name in folding.folded else permutations.get(name) for name in first]
        if not all(np.array_equal(one, inputs[0]) for one in inputs):
            raise RiaError(
                f"{experts.name}: its experts take their input in different permutations. Compress the model again; "
                + WAY_OUT
            )
        return cls(tuple(rows), inputs[0])

    @property
    def folded(self) -> int:
        """Permutations that cost nothing."""
        return sum(order is not None for order in self.rows)

    def check(self, experts: LayerExperts, hidden: int, intermediate: int) -> None:
        """Check the lengths of all orders.

        Raises:
            RiaError: one does not have as many channels as its linear's input.
        """
        for order, size in ((self.input, hidden), *((order, intermediate) for order in self.rows)):
            if order is not None and len(order) != size:
                raise RiaError(
                    f"{experts.name}: a permutation has {len(order)} channels, its input {size}. Get the files again."
                )
