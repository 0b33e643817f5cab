"""Migrates the scales of a layer's inputs while it is pruned (SmoothQuant), where its topology says what absorbs them.

The dense function stays the same: what a norm or a producer no longer multiplies by, the columns of all linears that
read its output do. Scales are chosen from what the pruned model reads.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace

import torch
from torch import nn

from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.model.experiments.migrations import producer_rows
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Migration, Topology
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.sublayer.pruned_linear import Pruned
from ria_vllm.offline.transforms.scales import divided, migration_scales, times


class Smoother:
    """The migrations of one loaded layer, stage by stage: `scale` before a stage is solved, `apply` after.

    Args:
        strength: SmoothQuant's.
        changed: parameter that is not pruned, relative to the layer -> what has to be written instead of the source's;
            added to.

    Attributes:
        scales: linear -> [in] float32, by which its input was divided.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        topology: Topology,
        strength: float,
        ranks: Ranks,
        changed: MutableMapping[str, torch.Tensor],
    ):
        self.model, self.index, self.strength, self.ranks = model, index, strength, ranks
        self.migrations = [one for one in topology.migrations if is_possible(model, index, one)]
        self.changed = changed
        self.scales: dict[str, torch.Tensor] = {}
        # What `apply` will do: the absorber of each linear, changed parameters, changed linears of earlier stages.
        self._absorbers: dict[str, str] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._pruned: dict[str, Pruned] = {}

    def scale(
        self,
        groups: Iterable[Group],
        statistics: Mapping[str, Statistics],
        weights: MutableMapping[str, torch.Tensor],
        pruned: Mapping[str, Pruned],
    ) -> None:
        """Migrate the scales of what the linears of a stage read, in their statistics and weights.

        Args:
            groups: with only the linears that are pruned.
            statistics: linear -> what its group shares; changed in place.
            weights: linear -> [out, in]; entries are replaced, because the layer has to stay dense for now.
            pruned: the linears of earlier stages.
        """
        for group in groups:
            for migration in self.migrations:
                if group.linears and group.linears[0] in migration.consumers:
                    self._scale(group, migration, statistics, weights, pruned)

    def apply(self, found: Mapping[str, Pruned], pruned: MutableMapping[str, Pruned]) -> None:
        """Change the layer accordingly, now that the stage is solved.

        Args:
            found: the stage's linears; their records say what absorbed their scales.
            pruned: the linears of earlier stages; entries are replaced.
        """
        layer = self.model.layers[self.index]
        for name, absorber in self._absorbers.items():
            found[name].record["smoothed"] = absorber
        for name, tensor in self._tensors.items():
            set_parameter(layer, name, tensor)
        for name, linear in self._pruned.items():
            pruned[name] = linear
            set_parameter(layer, f"{name}.weight", linear.weight)
        self.changed.update(self._tensors)
        self._absorbers, self._tensors, self._pruned = {}, {}, {}

    def _scale(
        self,
        group: Group,
        migration: Migration,
        statistics: Mapping[str, Statistics],
        weights: MutableMapping[str, torch.Tensor],
        pruned: Mapping[str, Pruned],
    ) -> None:
        layer, read = self.model.layers[self.index], statistics[group.linears[0]]
        columns = [_largest(layer.get_submodule(name).weight.data) for name in migration.consumers]
        scales = migration_scales(
            migration.largest(read.norm.cpu()), migration.largest(torch.stack(columns).amax(0)), self.strength
        )
        scales = self.ranks.broadcast(scales)  # logarithms may differ between machines
        # First find the channels whose scales nothing has to round, then migrate those of all others.
        dense = [name for name in migration.consumers if name not in group.linears]
        scales, _, _ = self._absorbed(migration, scales, pruned)
        for name in dense:
            exact = times(self._stored(f"{name}.weight"), migration.columns(scales))[1].all(0)
            scales = torch.where(migration.largest((~exact).float()) > 0, 1.0, scales)
        scales, tensors, replaced = self._absorbed(migration, scales, pruned)
        if bool((scales == 1).all()):
            return
        by_column = migration.columns(scales)
        tensors |= {f"{name}.weight": times(self._stored(f"{name}.weight"), by_column)[0] for name in dense}
        of_input = by_column.float().to(read.norm.device)
        read.divide(of_input)  # which all linears of the group share
        for name in group.linears:
            self.scales[name] = of_input * self.scales.get(name, 1)
            product = weights[name].float() * of_input
            fits = torch.equal(product.to(weights[name].dtype).float(), product)
            weights[name] = product.to(weights[name].dtype) if fits else product
        self._absorbers |= dict.fromkeys(group.linears, self.model.written_linear(self.index, migration.absorber))
        self._tensors |= tensors
        self._pruned |= replaced

    def _absorbed(
        self, migration: Migration, scales: torch.Tensor, pruned: Mapping[str, Pruned]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Pruned]]:
        """What the norm or the producer becomes: (the scales that it absorbs exactly, its new parameters, the producer
        if it is pruned). Where a channel cannot, its scale is 1."""
        if migration.norm is not None:
            return self._absorbed_by_norm(migration.norm, migration.offset, scales)
        assert migration.producer is not None
        name = migration.producer.name
        linear = self.model.layers[self.index].get_submodule(name)
        rows = producer_rows(linear, migration.producer)
        parts: dict[str, torch.Tensor] = {}
        # Two inputs of a stage can come from rows of one linear.
        before = self._pruned.get(name, pruned.get(name))
        if before is not None:
            parts["pruned"] = before.weight
            if before.scale is not None:
                parts["scale"] = before.scale
        else:
            parts["weight"] = self._stored(f"{name}.weight")
        if linear.bias is not None:
            parts["bias"] = self._stored(f"{name}.bias")
        exact = torch.ones(len(rows), dtype=torch.bool)
        for part in parts.values():
            good = times(part[rows].view(len(rows), -1), 1 / scales[:, None])[1]
            exact &= good.all(1)
        scales = torch.where(exact, scales, 1.0)
        for key, part in parts.items():
            factors = torch.ones(len(part), dtype=torch.float64)
            factors[rows] = 1 / scales
            parts[key] = times(part, factors.view(-1, *[1] * (part.dim() - 1)))[0]
        replaced = {}
        if before is not None:
            replaced[name] = replace(before, weight=parts.pop("pruned"), scale=parts.pop("scale", None))
        return scales, {f"{name}.{key}": part for key, part in parts.items()}, replaced

    def _absorbed_by_norm(
        self, name: str, offset: int, scales: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Pruned]]:
        gain = self._stored(f"{name}.weight")
        new, scales = divided(gain, scales, offset)
        found = {}
        if f"{name}.bias" in _parameters_of(self.model.layers[self.index], [name]):
            bias = self._stored(f"{name}.bias")
            quotient, exact = times(bias, 1 / scales)
            exact &= quotient.double() * scales == bias.double()
            scales, new = torch.where(exact, scales, 1.0), torch.where(exact, new, gain)
            found[f"{name}.bias"] = torch.where(exact, quotient, bias)
        return scales, {f"{name}.weight": new} | found, {}

    def _stored(self, parameter: str) -> torch.Tensor:
        """A parameter as it is in the file, or as it has been changed."""
        for changed in (self._tensors, self.changed):
            if parameter in changed:
                return changed[parameter]
        return self.model.read(self.model.names.direct[self.model.layer_prefix(self.index) + parameter])


def is_possible(model: StreamedModel, index: int, migration: Migration) -> bool:
    """Whether all parameters that would change are the layer's own, and are in the files as they are."""
    return are_own(model, index, _changeable(model.layers[index], migration))


def are_own(model: StreamedModel, index: int, parameters: Iterable[str]) -> bool:
    """Whether these parameters, relative to a layer, are the layer's own, and are in the files as they are."""
    tied = model.model.all_tied_weights_keys
    full = [model.layer_prefix(index) + name for name in parameters]
    return all(name in model.names.direct and name not in {*tied, *tied.values()} for name in full)


def set_parameter(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter of a loaded layer; it keeps its device and dtype."""
    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    before = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value.to(before.device, before.dtype), requires_grad=False))


def _changeable(layer: nn.Module, migration: Migration) -> list[str]:
    return [f"{name}.weight" for name in migration.consumers] + _parameters_of(layer, [migration.absorber])


def _parameters_of(layer: nn.Module, modules: Iterable[str]) -> list[str]:
    return [
        f"{name}.{leaf}"
        for name in modules
        for leaf, parameter in layer.get_submodule(name).named_parameters(recurse=False)
        if parameter is not None
    ]


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column [in], on the CPU."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).cpu()
