"""Prune the routed experts of one layer, one by one: no more than one of them is in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ria_vllm import permutation
from ria_vllm.offline.calibration.routing import RoutedTokens
from ria_vllm.offline.calibration.statistics import Statistics, StatisticsSum
from ria_vllm.offline.model.experts import DOWN, ExpertsLayout
from ria_vllm.offline.model.run_experts import Weights, inner
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruned import Pruned
from ria_vllm.offline.pruning import permute
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.solve import find_orders, score, solve
from ria_vllm.offline.train_experts import MixtureTrainer
from ria_vllm.progress import Monitor

# The rows of all experts together have more scores than the search of one order needs, or memory should hold. This many
# are taken, evenly spread over the linears.
SEARCHED_ROWS = 8192
# As many experts as a warning names.
NAMED = 8


@dataclass(frozen=True)
class ExpertsPruner:
    """Prunes the experts of one module.

    experts: the module.
    dense: the weights of its experts, on the device in the dtype of the computations.
    tokens: that they read.
    dtype: of the checkpoint.
    place: a linear's name relative to the layer -> what an error about it begins with.
    passes: of rounding to integers.
    """

    experts: nn.Module
    dense: Weights
    tokens: RoutedTokens
    recipe: Recipe
    ranks: Ranks
    dtype: torch.dtype
    device: torch.device
    compute_dtype: torch.dtype
    place: Callable[[str], str]
    passes: int

    @property
    def layout(self) -> ExpertsLayout:
        return self.experts.layout

    def order(self, weights: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics]) -> torch.Tensor | None:
        """The order of the residual stream that the gate and up projections of all experts share.

        Args:
            weights, statistics: of other linears that share it, those of the shared expert; by their names.

        Returns:
            int64 [width] on the CPU; None for the model's own order.
        """
        recipe, layout = self.recipe, self.layout
        if not recipe.pattern.structured or recipe.permute == "none":
            return None
        rows = len(layout.first) * layout.inner * layout.num_experts + sum(map(len, weights.values()))
        step = -(-rows // SEARCHED_ROWS)
        parts = [score(weights[name], statistics[name], recipe)[::step] for name in weights]
        for expert in range(layout.num_experts):
            found = self.dense(expert)
            norms = self._reads(expert, with_gram=False)
            parts += [score(found[kind], norms, recipe)[::step].clone() for kind in layout.first]
            del found
        p = None
        if self.ranks.first:
            S = torch.cat([part.T for part in parts], dim=1).T  # by columns, as the search needs them
            p = permute.search(
                S, recipe.pattern.n, recipe.pattern.m, recipe.permute, seed=recipe.seed, dtype=recipe.matmul_dtype
            )
            p = None if permutation.is_identity(p) else p.cpu()
        return self.ranks.broadcast(p)

    def trainer(self, folder: Path | None, monitor: Monitor) -> MixtureTrainer:
        """For `prune`, while all experts are dense.

        Args:
            folder: for files that it needs; None: it takes memory.
        """
        return MixtureTrainer(
            self.experts, self.dense, self.tokens, self.recipe, self.ranks, self.device, self.place, folder, monitor
        )

    def prune(
        self, expert: int, order: torch.Tensor | None, trainer: MixtureTrainer | None = None
    ) -> dict[str, Pruned]:
        """Prune one expert: gate and up, then down, which sees what the pruned gate and up produce.

        Args:
            order: from `order`; ignored if each linear has an order of its own.
            trainer: also trains the kept weights of all three.

        Returns:
            Name relative to the layer -> pruned linear.
        """
        layout, recipe = self.layout, self.recipe
        dense = self.dense(expert)
        first = [layout.linear(expert, kind) for kind in layout.first]
        down = layout.linear(expert, DOWN)
        statistics = dict.fromkeys(first, self._reads(expert, recipe.needs_gram))
        weights = {layout.linear(expert, kind): dense[kind] for kind in layout.kinds}
        if recipe.permute_scope == "shared":
            orders = dict.fromkeys(first, order)
        else:
            orders = find_orders([Group(tuple(first))], weights, statistics, recipe, self.ranks)
        found = solve(first, weights, statistics, orders, self.dtype, recipe, self.ranks, self.place, self.passes)
        del statistics
        trim()
        pruned = {kind: found[layout.linear(expert, kind)].weight.to(self.device) for kind in layout.first}
        statistics = {down: self._reads_of_down(expert, dense, pruned | {DOWN: dense[DOWN]})}
        orders = find_orders([Group((down,))], weights, statistics, recipe, self.ranks)
        found |= solve([down], weights, statistics, orders, self.dtype, recipe, self.ranks, self.place, self.passes)
        del statistics
        trim()
        if trainer is not None:
            found = trainer.train(expert, found, dense)
        counts = {"tokens": self.tokens.counts[expert]}
        if self.tokens.missing(expert):
            borrowed = torch.tensor(self.tokens.borrowed(expert))
            self.ranks.all_reduce(borrowed)
            counts["borrowed"] = int(borrowed)
        return {name: replace(linear, record=linear.record | counts) for name, linear in found.items()}

    def _reads(self, expert: int, with_gram: bool) -> Statistics:
        """The statistics of what gate and up read."""
        total = StatisticsSum(self.layout.width, with_gram, self.device)
        for X, dense in self.tokens.of(expert):
            X = X.to(self.device)
            total.add(X)
            if dense is not None and with_gram:
                total.add_input_drift(X, dense.to(self.device))
        return self._finished(total, expert, with_gram and self.tokens.dense is not None, self.layout.first[0])

    def _reads_of_down(
        self, expert: int, dense: Mapping[str, torch.Tensor], pruned: Mapping[str, torch.Tensor]
    ) -> Statistics:
        """The statistics of what down reads, and how far that is from what it reads in the dense model.

        Args:
            dense, pruned: the expert's weights by kind.
        """
        layout = self.layout
        total = StatisticsSum(layout.inner, self.recipe.needs_gram, self.device)
        for X, in_dense in self.tokens.of(expert):
            read = inner(self.experts, expert, X.to(self.device), pruned).float()
            total.add(read)
            if in_dense is None or not self.recipe.needs_gram:
                continue
            wanted = inner(self.experts, expert, in_dense.to(self.device), dense).float()
            if layout.width < layout.inner:  # the smaller of the two drifts
                total.add_output_drift(read, (wanted - read) @ dense[DOWN].float().T)
            else:
                total.add_input_drift(read, wanted)
        return self._finished(total, expert, self.recipe.needs_gram and self.tokens.dense is not None, DOWN)

    def _finished(self, total: StatisticsSum, expert: int, drifts: bool, kind: str) -> Statistics:
        if drifts and total.cross is None:  # none of this rank's tokens: take part in the sums of the others
            nothing = torch.zeros(1, total.width, device=self.device)
            if kind == DOWN and self.layout.width < self.layout.inner:
                total.add_output_drift(nothing, torch.zeros(1, self.layout.width, device=self.device))
            else:
                total.add_input_drift(nothing, nothing)
        place = self.place(self.layout.linear(expert, kind))
        return total.finish(self.ranks, place, self.compute_dtype)


def short_of_tokens(records: Mapping[str, Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """From a report's records of the experts of one layer, the numbers of those that got too few tokens.

    Returns:
        (those that got none, those that got some and took others' besides), each in ascending order.
    """
    of_experts = [(name, record) for name, record in records.items() if "tokens" in record]
    experts = {int(name.rpartition(".")[0].rpartition(".")[2]): record for name, record in of_experts}
    unused = [number for number in sorted(experts) if experts[number]["tokens"] == 0]
    return unused, [n for n in sorted(experts) if experts[n].get("borrowed") and n not in unused]


def named(experts: Sequence[int]) -> str:
    """As "expert 3", "experts 3 and 5" or, if there are more than `NAMED`, "20 experts (0, 1, ... and 12 more)"."""
    if len(experts) == 1:
        return f"expert {experts[0]}"
    shown, more = [str(number) for number in experts[:NAMED]], len(experts) - NAMED
    if more > 0:
        return f"{len(experts)} experts ({', '.join(shown)} and {more} more)"
    return f"experts {', '.join(shown[:-1])} and {shown[-1]}"
