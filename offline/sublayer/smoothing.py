"""SmoothQuant (Xiao et al., ICML 2023): moves outliers from the channels of a layer's inputs into the weights, where
its topology says what absorbs the scales.

X W^T = (X / s) (W s)^T for scales s of the channels. The dense function stays the same: what a norm or a producer no
longer multiplies by, the columns of all linears that read its output do. The paper's scales are
s_j = max |X_j|^a / max |W_j|^(1 - a), where a is the migration strength. Three things are different here. Scales are
chosen from what the pruned model reads. Instead of max |X_j| it is ||X_j||: a few tokens, such as a text's first one,
have maxima that say little of all others. And scales are powers of two, with which floating point multiplies and
divides exactly. Where weights are trained, scales migrate after that, because Adam's steps depend on them.
"""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace

import torch
from torch import nn

from ria_vllm.format.layer_schema import Producer
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.model.experiments.migrations import producer_rows
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Group, Migration, Topology
from ria_vllm.offline.sublayer.pruned_linear import Pruned

# Temporaries are in float64: they are those of so many rows.
ROWS_AT_ONCE = 1024


class Smoother:
    """The migrations of one loaded layer, stage by stage: `scale` before a stage is solved (after it is trained, if it
    is), then `apply`.

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
        changed: MutableMapping[str, torch.Tensor],
    ):
        self.model, self.index, self.strength = model, index, strength
        layer = model.layers[index]
        self.migrations = [
            one
            for one in topology.migrations
            if are_own(model, index, [f"{name}.weight" for name in one.consumers] + _parameters_of(layer, one.absorber))
        ]
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
        dense = [name for name in migration.consumers if name not in group.linears]
        # A gain plus one cannot be divided by a power of two: its scales have many digits, by which these were rounded.
        if migration.offset and (dense or f"{migration.norm}.bias" in _parameters_of(layer, migration.absorber)):
            return
        columns = [_largest(layer.get_submodule(name).weight.data) for name in migration.consumers]
        scales = migration_scales(
            migration.largest(read.norm.cpu()), migration.largest(torch.stack(columns).amax(0)), self.strength
        )
        changed: dict[str, torch.Tensor] = {}
        if migration.offset:
            gain = f"{migration.norm}.weight"
            changed[gain], scales = divided(self._stored(gain), scales, migration.offset)
        if bool((scales == 1).all()):
            return
        if migration.producer is not None:
            self._absorb(migration.producer, scales, pruned)
        elif not migration.offset:
            names = _parameters_of(layer, migration.absorber)
            changed = {name: times(self._stored(name), 1 / scales) for name in names}
        by_column = migration.columns(scales)
        changed |= {f"{name}.weight": times(self._stored(f"{name}.weight"), by_column) for name in dense}
        self._tensors |= changed
        of_input = by_column.float().to(read.norm.device)
        read.divide(of_input)  # which all linears of the group share
        for name in group.linears:
            self.scales[name] = of_input * self.scales.get(name, 1)
            product = weights[name].float() * of_input
            fits = torch.equal(product.to(weights[name].dtype).float(), product)
            weights[name] = product.to(weights[name].dtype) if fits else product
        self._absorbers |= dict.fromkeys(group.linears, self.model.written_linear(self.index, migration.absorber))

    def _absorb(self, producer: Producer, scales: torch.Tensor, pruned: Mapping[str, Pruned]) -> None:
        """Divide the rows of a producer by the scales, [rows]."""
        name, linear = producer.name, self.model.layers[self.index].get_submodule(producer.name)
        factors = torch.ones(linear.out_features, dtype=torch.float64)
        factors[producer_rows(linear, producer)] = 1 / scales
        # Two inputs of a stage can come from rows of one linear.
        before = self._pruned.get(name, pruned.get(name))
        if before is None:
            weight = f"{name}.weight"
            self._tensors[weight] = times(self._stored(weight), factors[:, None])
        else:
            scale = None if before.scale is None else times(before.scale, factors[:, None])
            self._pruned[name] = replace(before, weight=times(before.weight, factors[:, None]), scale=scale)
        if linear.bias is not None:
            self._tensors[f"{name}.bias"] = times(self._stored(f"{name}.bias"), factors)

    def _stored(self, parameter: str) -> torch.Tensor:
        """A parameter as it is in the file, or as it has been changed."""
        for changed in (self._tensors, self.changed):
            if parameter in changed:
                return changed[parameter]
        return self.model.read(self.model.names.direct[self.model.layer_prefix(self.index) + parameter])


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


def _parameters_of(layer: nn.Module, name: str) -> list[str]:
    found = layer.get_submodule(name).named_parameters(recurse=False)
    return [f"{name}.{leaf}" for leaf, _ in found]


def _largest(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column [in], on the CPU."""
    return torch.maximum(weight.amax(0), -weight.amin(0)).cpu()


def migration_scales(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """The scale of each channel, a power of two; their geometric mean is about 1.

    Args:
        inputs: [channels] ||X_j||, in any unit.
        weights: [channels] max |W_j|, over all linears that read X.
        strength: a, from 0 (only weights become alike) to 1 (only inputs do).

    Returns:
        float64 [channels]; 1 for channels that are always zero.
    """
    inputs, weights = inputs.double(), weights.double()
    alive = (inputs > 0) & (weights > 0)
    logs = strength * torch.where(alive, inputs, 1.0).log2() - (1 - strength) * torch.where(alive, weights, 1.0).log2()
    mean = logs[alive].mean() if bool(alive.any()) else 0.0
    return torch.where(alive, torch.exp2((logs - mean).round()), 1.0)


def divided(gain: torch.Tensor, scales: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of a norm that multiplies by gain + offset, after its outputs were divided by `scales`, and by what
    exactly it then divides them: the new gain has to be rounded, and the scales that come back make up for that.

    Args:
        gain: [channels], any floating dtype.
        scales: float64 [channels], positive.

    Returns:
        (the new gain in its dtype, float64 scales). Both are unchanged where rounding would move the gain far.
    """
    before = gain.double() + offset
    new = (before / scales - offset).to(gain.dtype)
    after = new.double() + offset
    exact = torch.where(after == 0, 1.0, before / torch.where(after == 0, 1.0, after))
    good = (before != 0) & (after != 0) & (exact > scales / 2) & (exact < scales * 2)
    return torch.where(good, new, gain), torch.where(good, exact, 1.0)


def times(tensor: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`tensor` times `factors` (float64, broadcast) in its dtype."""
    product, factors = torch.empty_like(tensor), factors.expand(tensor.shape)
    for start in range(0, len(tensor), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        product[rows] = (tensor[rows].double() * factors[rows]).to(tensor.dtype)
    return product
