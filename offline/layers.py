"""One pass over the decoder layers: calibration activations go in at the bottom, pruned layers come out one by one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.offline.calibration.capture import Activations, advance, gather, run_component
from ria_vllm.offline.model.embedding import Embedder, LayerCall
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.model.topology import Component, Group, describe
from ria_vllm.offline.plan import Plan
from ria_vllm.offline.pruning.block import train_block
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.solve import Pruned, find_orders, solve, stored_weight
from ria_vllm.progress import Monitor

T = TypeVar("T")
# Tokens in one forward pass of a layer. Chunks do not depend on the number of ranks, so neither do results.
CHUNK_TOKENS = 2048
# Steps of block training, one a chunk: in 8 passes over little data, in fewer over more, but never in less than 2.
TRAINING_STEPS = 128


class LayerPass:
    """This rank's calibration activations, on their way through the layers.

    Args:
        tokens: int64 [samples, seq_len], all of them; this rank takes its share.
        cache: a folder for activations, or None to keep them in memory.
        follow: whether to take the dense model's stream along on its own path, if the recipe asks for it.

    Raises:
        RiaError: fewer chunks than ranks, or a model whose layers cannot be run one by one.
    """

    def __init__(
        self,
        model: StreamedModel,
        tokens: torch.Tensor,
        cache: Path | None,
        recipe: Recipe,
        team: Ranks,
        monitor: Monitor,
        follow: bool = True,
    ):
        self.model, self.recipe, self.team, self.monitor = model, recipe, team, monitor
        chunks = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
        if len(chunks) < team.size:
            raise RiaError(
                f"{len(tokens)} samples of {tokens.shape[1]} tokens make {len(chunks)} pieces of work, too few for "
                f"{team.size} processes. Use fewer processes, or more samples."
            )
        self.chunks = len(chunks)
        # A bf16 model's stream has no more than bf16 to say, and takes half the room in it.
        kept = torch.bfloat16 if model.stored_dtype == torch.bfloat16 else model.dtype
        self.pruned = Activations(None if cache is None else cache / f"pruned-{team.rank}", model.dtype, kept)
        # Reconstruction aims at the stream of the dense model on its own path.
        self.dense: Activations | None = None
        if follow and recipe.follows_dense:
            self.dense = Activations(None if cache is None else cache / f"dense-{team.rank}", model.dtype, kept)
        self.calls: dict[torch.Size, list[LayerCall]] = {}
        with monitor.phase("embedding"):
            self._embed(chunks)

    def _embed(self, chunks: Sequence[torch.Tensor]) -> None:
        embedder = Embedder(self.model)
        inputs = embedder.inputs_of_first_layer(chunks[0][:1])
        self.topology = describe(self.model.config.get_text_config(), self.model.layers[0], inputs)
        # The last chunk may be shorter; every rank has to know how layers are called for it.
        for tokens in (chunks[0], chunks[-1]):
            stream, calls = embedder(tokens)
            self.calls[stream.shape] = calls
        share = self.team.share(len(chunks))
        for index in self.monitor.steps(share, "embedding", len(share)):
            stream, calls = embedder(chunks[index])
            if not all(one.same_as(other) for one, other in zip(self.calls[stream.shape], calls, strict=True)):
                raise RiaError(
                    f"{self.model.folder}: {type(self.model.model).__name__} gives its layers more than the residual "
                    "stream for each text, so they cannot be pruned one by one."
                )
            self.pruned.append(stream)
            if self.dense is not None:
                self.dense.append(stream)
        embedder.close()

    def prune(self, index: int, plan: Plan, last: bool) -> dict[str, Pruned]:
        """Prune layer `index` and take the activations through it (unless it is the last). Keys are written names."""
        layer = self.model.load_layer(index)
        pruned: dict[str, Pruned] = {}
        for component in self.topology.components:
            part: dict[str, Pruned] = {}
            for number, stage in enumerate(component.stages):
                found = self._solve_stage(index, layer, component, plan.groups(index, stage), number)
                if number == 0 and self.dense is not None:  # while nothing of the component is pruned
                    advance(layer, component, self._calls(index), self.dense, self.monitor)
                for name, linear in found.items():
                    _set_weight(layer, name, linear.weight)
                part |= found
            if self.recipe.trains and part:
                part = self._train(index, layer, component, part)
            if not last or component is not self.topology.components[-1]:
                advance(layer, component, self._calls(index), self.pruned, self.monitor)
            pruned |= part
        self.model.free_layer(index)
        return self._named(index, pruned)

    def measure(self, index: int, plan: Plan) -> dict[str, dict[str, Any]]:
        """What pruning would do to each linear of layer `index`, which is left as it is. Written names -> records."""
        layer = self.model.load_layer(index)
        records: dict[str, dict[str, Any]] = {}
        for component in self.topology.components:
            for number, stage in enumerate(component.stages):
                found = self._solve_stage(index, layer, component, plan.groups(index, stage), number)
                records |= {name: linear.record for name, linear in found.items()}
            advance(layer, component, self._calls(index), self.pruned, self.monitor)
        self.model.free_layer(index)
        return self._named(index, records)

    def replay(self, index: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take the activations through a layer that was pruned before; `weights` by names relative to it."""
        layer = self.model.load_layer(index)
        if self.dense is not None:
            for component in self.topology.components:
                advance(layer, component, self._calls(index), self.dense, self.monitor)
        for name, weight in weights.items():
            _set_weight(layer, name, weight)
        for component in self.topology.components:
            advance(layer, component, self._calls(index), self.pruned, self.monitor)
        self.model.free_layer(index)

    def _train(
        self, index: int, layer: nn.Module, component: Component, pruned: Mapping[str, Pruned]
    ) -> dict[str, Pruned]:
        """Block reconstruction of one component; all ranks train alike, on the chunks of all."""
        # Linears are multiplied in the dtype that they are trained in; what else there is computes in float32.
        others = [module for module in layer.modules() if not isinstance(module, nn.Linear)]
        for parameter in (p for module in others for p in module.parameters(recurse=False)):
            parameter.data = parameter.data.float()
        calls = self._calls(index)
        masks = _Masks(pruned, self.model.device)
        trim()
        with self.monitor.phase("block training"), torch.enable_grad():
            losses = train_block(
                lambda stream: run_component(layer, component, calls[stream.shape], stream),
                {name: layer.get_submodule(name).weight for name in pruned},
                masks,
                _Everywhere(self.pruned, self.chunks, self.team, self.model.device),
                _Everywhere(self.dense, self.chunks, self.team, self.model.device),
                passes=min(8, max(2, TRAINING_STEPS // self.chunks)),
                seed=self.recipe.seed,
                dtype=self.recipe.product_dtype,
                where=f"{self._place(index, next(iter(pruned)))} and what is trained with it: ",
            )
        trained = {}
        for name, linear in pruned.items():
            module = layer.get_submodule(name)
            weight, scale = stored_weight(module.weight.data, linear.p, linear.weight.dtype, self.recipe)
            module.weight.data = weight.to(self.model.device, self.model.dtype)
            record = linear.record | {"block_loss": [losses[0], losses[-1]]}
            trained[name] = replace(linear, weight=weight, scale=scale, record=record)
        for parameter in layer.parameters():
            parameter.data = parameter.data.to(self.model.dtype)
        return trained

    def _solve_stage(
        self, index: int, layer: nn.Module, component: Component, groups: Sequence[Group], number: int
    ) -> dict[str, Pruned]:
        if not groups:
            return {}
        calls, with_gram = self._calls(index), self.recipe.needs_gram
        named = partial(self._place, index)
        before = self.dense if number == 0 else None
        after = self.dense if component.additive and number == len(component.stages) - 1 else None
        found = gather(
            layer, component, groups, calls, self.pruned, with_gram, self.team, self.monitor, named, before, after
        )
        trim()
        names = [name for group in groups for name in group.linears]
        statistics = {name: stats for group, stats in zip(groups, found, strict=True) for name in group.linears}
        weights = {name: layer.get_submodule(name).weight.data for name in names}
        with self.monitor.phase("permutations"):
            orders = find_orders(groups, weights, statistics, self.recipe, self.team)
        with self.monitor.phase("masks and weights"):
            trim()
            solved = solve(names, weights, statistics, orders, self.model.stored_dtype, self.recipe, self.team, named)
        del found, statistics
        trim()
        return solved

    def _place(self, index: int, name: str) -> str:
        """What an error says of a linear: the model's folder, and the name that it has there."""
        return f"{self.model.folder}: {self.model.written_linear(index, name)}"

    def _calls(self, index: int) -> dict[torch.Size, LayerCall]:
        return {shape: calls[index] for shape, calls in self.calls.items()}

    def _named(self, index: int, found: Mapping[str, T]) -> dict[str, T]:
        return {self.model.written_linear(index, name): value for name, value in found.items()}


class _Masks(Mapping[str, torch.Tensor]):
    """The linears' masks on the device, each only while it is looked at."""

    def __init__(self, pruned: Mapping[str, Pruned], device: torch.device):
        self.pruned, self.device = pruned, device

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.pruned[name].mask.to(self.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pruned)

    def __len__(self) -> int:
        return len(self.pruned)


class _Everywhere(Sequence[torch.Tensor]):
    """The chunks of all ranks, float32 on the device; one that lies elsewhere is fetched, on all ranks at once."""

    def __init__(self, mine: Activations, total: int, team: Ranks, device: torch.device):
        self.mine, self.total, self.team, self.device = mine, total, team, device

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> torch.Tensor:
        owner = next(rank for rank in range(self.team.size) if index in self.team.share(self.total, rank))
        chunk = self.mine[index - self.team.share(self.total).start] if owner == self.team.rank else None
        return self.team.from_owner(chunk, owner).to(self.device, torch.float32)


def _set_weight(layer: nn.Module, name: str, weight: torch.Tensor) -> None:
    module = layer.get_submodule(name)
    module.weight = nn.Parameter(weight.to(module.weight.device, module.weight.dtype), requires_grad=False)
