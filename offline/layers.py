"""One pass over the decoder layers: calibration activations go in at the bottom, pruned layers come out one by one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.capture import Activations, Embedder, LayerCall, advance, gather
from ria_vllm.offline.plan import Plan
from ria_vllm.offline.progress import Monitor
from ria_vllm.offline.ranks import Ranks
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.solve import Pruned, find_orders, solve
from ria_vllm.offline.streaming import StreamedModel
from ria_vllm.offline.topology import Component, Topology, describe

# Tokens in one forward pass of a layer. Chunks do not depend on the number of ranks, so neither do results.
CHUNK_TOKENS = 2048


class LayerPass:
    """This rank's calibration activations, on their way through the layers.

    Args:
        tokens: int64 [samples, seq_len], all of them; this rank takes its share.
        cache: a folder for activations, or None to keep them in memory.

    Raises:
        RiaError: fewer chunks than ranks, or a model whose layers cannot be run one by one.
    """

    def __init__(
        self, model: StreamedModel, tokens: torch.Tensor, cache: Path | None, recipe: Recipe, team: Ranks, monitor: Monitor
    ):
        self.model, self.recipe, self.team, self.monitor = model, recipe, team, monitor
        chunks = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
        if len(chunks) < team.size:
            raise RiaError(
                f"{len(tokens)} samples of {tokens.shape[1]} tokens make {len(chunks)} pieces of work, too few for "
                f"{team.size} processes. Use fewer processes, or more samples."
            )
        folder = None if cache is None else cache / f"rank-{team.rank}"
        self.streams = Activations(folder)
        self.calls: list[list[LayerCall]] = []
        embedder = Embedder(model)
        self.topology = self._describe(embedder, chunks[0])
        by_shape: dict[torch.Size, list[LayerCall]] = {}
        for index in monitor.steps(team.share(len(chunks)), "embedding", len(team.share(len(chunks)))):
            stream, calls = embedder(chunks[index])
            known = by_shape.setdefault(stream.shape, calls)
            if not all(one.same_as(other) for one, other in zip(known, calls, strict=True)):
                raise RiaError(
                    f"{type(model.model).__name__} gives its layers more than the residual stream for each text: not supported."
                )
            self.streams.append(stream)
            self.calls.append(known)
        embedder.close()

    def _describe(self, embedder: Embedder, tokens: torch.Tensor) -> Topology:
        inputs = embedder.inputs_of_first_layer(tokens[:1])
        return describe(self.model.config.get_text_config(), self.model.layers[0], inputs)

    def prune(self, index: int, plan: Plan, last: bool) -> dict[str, Pruned]:
        """Prune layer `index` and take the activations through it (unless it is the last). Keys are full names."""
        layer = self.model.load_layer(index)
        pruned: dict[str, Pruned] = {}
        for component in self.topology.components:
            for stage in component.stages:
                pruned |= self._prune_stage(index, layer, component, plan.groups(index, stage))
            if not last or component is not self.topology.components[-1]:
                advance(layer, component, self._calls(index), self.streams, self.monitor)
        self.model.free_layer(index)
        prefix = self.model.layer_prefix(index)
        return {prefix + name: linear for name, linear in pruned.items()}

    def replay(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the activations through a layer that was pruned before; `weights` by full names."""
        layer = self.model.load_layer(index)
        prefix = self.model.layer_prefix(index)
        for name, weight in weights.items():
            _set_weight(layer, name.removeprefix(prefix), weight)
        for component in self.topology.components:
            advance(layer, component, self._calls(index), self.streams, self.monitor)
        self.model.free_layer(index)

    def _prune_stage(
        self, index: int, layer: nn.Module, component: Component, groups: Sequence[Any]
    ) -> dict[str, Pruned]:
        if not groups:
            return {}
        prefix = self.model.layer_prefix(index)
        found = gather(
            layer, component, groups, self._calls(index), self.streams, self.recipe.needs_gram, self.team, self.monitor, prefix
        )
        names = [name for group in groups for name in group.linears]
        statistics = {name: stats for group, stats in zip(groups, found, strict=True) for name in group.linears}
        weights = {name: layer.get_submodule(name).weight.data for name in names}
        with self.monitor.phase("permutations"):
            orders = find_orders(groups, weights, statistics, self.recipe, self.team)
        with self.monitor.phase("masks and weights"):
            pruned = solve(
                names, weights, statistics, orders, self.model.stored_dtype, self.recipe, self.team, prefix
            )
        for name, linear in pruned.items():
            _set_weight(layer, name, linear.weight)
        return pruned

    def _calls(self, index: int) -> list[LayerCall]:
        return [calls[index] for calls in self.calls]


def _set_weight(layer: nn.Module, name: str, weight: torch.Tensor) -> None:
    module = layer.get_submodule(name)
    module.weight = nn.Parameter(weight.to(module.weight.device, module.weight.dtype), requires_grad=False)
