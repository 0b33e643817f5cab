"""One pass over the decoder layers: the embedded calibration tokens go in, pruned layers come out one by one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ria_vllm.offline.calibration.embed import embed
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.plan import Plan
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.solve import Pruned, find_orders, retained_without_blocks, solve
from ria_vllm.offline.train import train_sublayer
from ria_vllm.progress import Monitor

T = TypeVar("T")


class LayerPass:
    """Takes this rank's calibration activations through the layers, from the first one on.

    Args:
        tokens: int64 [samples, seq_len], those of all ranks.
        cache: a folder for activations; None: they stay in memory.
        follow_dense: also take the dense model's stream along, if the recipe reconstructs towards it.

    Raises:
        RiaError: fewer chunks than ranks, or a model whose layers cannot be run one by one.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: torch.Tensor,
        cache: Path | None,
        recipe: Recipe,
        ranks: Ranks,
        monitor: Monitor,
        follow_dense: bool = True,
    ):
        self.model, self.recipe, self.ranks, self.monitor = model, recipe, ranks, monitor
        self.embedded = embed(model, tokens, cache, follow_dense and recipe.follows_dense, ranks, monitor)
        self.topologies, self.streams = self.embedded.topologies, self.embedded.streams

    def prune(self, index: int, plan: Plan, last: bool) -> dict[str, Pruned]:
        """Prune layer `index` and, unless it is the last one, take the activations through it.

        Returns:
            Written name -> pruned linear.
        """
        pruned: dict[str, Pruned] = {}
        sublayer_passes = self._load(index)
        for sublayer_pass in sublayer_passes:
            pruned |= self._prune_sublayer(index, sublayer_pass, plan)
            if not last or sublayer_pass is not sublayer_passes[-1]:
                sublayer_pass.advance(self.streams.pruned)
        self.model.free_layer(index)
        return self._written(index, pruned)

    def measure(self, index: int, plan: Plan) -> dict[str, dict[str, Any]]:
        """What pruning would do to each linear of layer `index`, which stays dense.

        Returns:
            Written name -> record of the report.
        """
        records: dict[str, dict[str, Any]] = {}
        for sublayer_pass in self._load(index):
            for number, stage in enumerate(sublayer_pass.stages):
                found = self._solve_stage(sublayer_pass, number, plan.groups(index, stage))
                records |= {name: linear.record for name, linear in found.items()}
            sublayer_pass.advance(self.streams.pruned)
        self.model.free_layer(index)
        return self._written(index, records)

    def replay(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the activations through a layer that was pruned earlier.

        Args:
            weights: name relative to the layer -> pruned weight [out, in].
        """
        sublayer_passes = self._load(index)
        if self.streams.dense is not None:
            for sublayer_pass in sublayer_passes:
                sublayer_pass.advance(self.streams.dense)
        for name, weight in weights.items():
            _set_weight(self.model.layers[index], name, weight)
        for sublayer_pass in sublayer_passes:
            sublayer_pass.advance(self.streams.pruned)
        self.model.free_layer(index)

    def _load(self, index: int) -> list[SublayerPass]:
        """Load a layer; a pass for each of its sublayers, in order."""
        layer, calls = self.model.load_layer(index), self.embedded.calls_of(index)
        place = partial(self._place, index)
        return [
            SublayerPass(
                SublayerRunner(layer, sublayer, calls, self.model.dtype), self.streams, self.ranks, self.monitor, place
            )
            for sublayer in self.topologies.of(index).sublayers
        ]

    def _prune_sublayer(self, index: int, sublayer_pass: SublayerPass, plan: Plan) -> dict[str, Pruned]:
        """Prune one stage after the other, so that each sees what those before it produce; then train if asked."""
        pruned: dict[str, Pruned] = {}
        compared = self.topologies.is_first(index)  # a second search in every layer would take too long
        for number, stage in enumerate(sublayer_pass.stages):
            found = self._solve_stage(sublayer_pass, number, plan.groups(index, stage), compared)
            if number == 0 and self.streams.dense is not None:  # while the whole sublayer is still dense
                sublayer_pass.advance(self.streams.dense)
            for name, linear in found.items():
                _set_weight(sublayer_pass.runner.layer, name, linear.weight)
            pruned |= found
        return train_sublayer(sublayer_pass, pruned, self.recipe) if self.recipe.trains and pruned else pruned

    def _solve_stage(
        self, sublayer_pass: SublayerPass, number: int, groups: Sequence[Group], compared: bool = False
    ) -> dict[str, Pruned]:
        """Prune the linears of these groups.

        Args:
            compared: also record what orders without blocks would retain, where the orders have to keep to blocks.
        """
        if not groups:
            return {}
        found = sublayer_pass.statistics(number, groups, self.recipe.needs_gram)
        trim()
        names = [name for group in groups for name in group.linears]
        statistics = {name: stats for group, stats in zip(groups, found, strict=True) for name in group.linears}
        weights = {name: sublayer_pass.runner.linear(name).weight.data for name in names}
        with self.monitor.phase("permutations"):
            orders = find_orders(groups, weights, statistics, self.recipe, self.ranks)
        with self.monitor.phase("masks and weights"):
            trim()
            dtype, place = self.model.stored_dtype, sublayer_pass.place
            solved = solve(names, weights, statistics, orders, dtype, self.recipe, self.ranks, place)
        if compared and self.ranks.first:
            with self.monitor.phase("permutations"):
                for name, share in retained_without_blocks(groups, weights, statistics, self.recipe).items():
                    solved[name].record["retained_without_blocks"] = share
        del found, statistics
        trim()
        return solved

    def _place(self, index: int, name: str) -> str:
        """What an error about a linear begins with: the model's folder, and the name in its files."""
        return f"{self.model.folder}: {self.model.written_linear(index, name)}"

    def _written(self, index: int, found: Mapping[str, T]) -> dict[str, T]:
        return {self.model.written_linear(index, name): value for name, value in found.items()}


def _set_weight(layer: nn.Module, name: str, weight: torch.Tensor) -> None:
    module = layer.get_submodule(name)
    module.weight = nn.Parameter(weight.to(module.weight.device, module.weight.dtype), requires_grad=False)
