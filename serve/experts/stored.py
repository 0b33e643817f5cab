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
class ExpertPermutations:
    """The permutations of the channels of a layer's experts, by expert.

    Attributes:
        rows: of the rows of gate and up, so that down finds its input as stored; None: they are not permuted.
        input: int32 [H], of a token's channels, for gate (if there is one) and up of all experts; None: they are not
            permuted.
    """

    rows: tuple[np.ndarray | None, ...]
    input: np.ndarray | None

    @classmethod
    def of(
        cls, experts: LayerExperts, permutations: Mapping[str, np.ndarray], folding: Folding
    ) -> "ExpertPermutations":
        """Read them off the checkpoint's permutations.

        An expert's linears belong to one layer of vLLM, and only an activation lies between. So the rows of gate and up
        absorb the permutation of down even without a fold.

        Raises:
            RiaError: a fold of the checkpoint permutes these rows otherwise, or experts take a token's channels under
                different permutations.
        """
        rows = []
        for expert in range(experts.num_experts):
            p = permutations.get(experts.linear("down", expert))
            for kind in experts.patterns:
                linear = experts.linear(kind, expert)
                for wanted in folding.row_permutations.get(linear, ()):
                    if kind == "down" or not wanted.for_all or not np.array_equal(wanted.p, p):
                        raise RiaError(
                            f"{linear}: a fold permutes its rows for another linear than the expert's own down "
                            f"projection, which is not served. {WAY_OUT}"
                        )
            rows.append(p)
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
        return sum(p is not None for p in self.rows)

    def check(self, experts: LayerExperts, hidden: int, intermediate: int) -> None:
        """Check the lengths of all of them.

        Raises:
            RiaError: one does not have as many channels as its linear's input.
        """
        for p, size in ((self.input, hidden), *((rows, intermediate) for rows in self.rows)):
            if p is not None and len(p) != size:
                raise RiaError(
                    f"{experts.name}: a permutation has {len(p)} channels, its input {size}. Get the files again."
                )
