"""What decoder layers look like: which linears share an input, in what order they run, and what can be folded.

`ria_vllm.offline.model.experiments.describe` finds it out by experiment.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.vllm_quirks import fused_sets

Unit = tuple[int, str]
"""Layer, and the name of its sublayer."""


@dataclass(frozen=True)
class Heads:
    """The attention heads that an output projection's input channels come from."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Group:
    """Linears of a layer that read the same input and so may share a permutation. Names are relative to the layer.

    heads: the input is the output of these attention heads, so the permutation must stay within them.
    experts: the module of routed experts whose gate and up projections belong to the group, too. Their down
        projections are pruned in the same stage, expert by expert.
    within_ranks: no fold absorbs the permutation, so each rank of tensor parallelism must be able to gather from its
        own part of the input.
    """

    linears: tuple[str, ...]
    heads: Heads | None = None
    experts: str | None = None
    within_ranks: bool = False


@dataclass(frozen=True)
class Migration:
    """A tensor whose channels can be divided by scales in what makes it, and multiplied in what reads it.

    Names are relative to the layer. Either a norm or a producer absorbs the scales.

    consumers: all linears that read the tensor, those that stay dense, too.
    norm: the module that makes it. Its weight plus `offset` is divided by the scales, and so is its bias.
    producer: the rows of a linear that are divided by the scales, with their biases.
    heads: there is one row for each channel of a key-value head, and all query heads that share it have its scale.
    """

    consumers: tuple[str, ...]
    norm: str | None = None
    offset: int = 0
    producer: Producer | None = None
    heads: Heads | None = None

    @property
    def absorber(self) -> str:
        """The module that absorbs the scales."""
        return self.norm or (self.producer.name if self.producer is not None else "")

    def rows_of(self, width: int) -> int:
        """How many scales there are for an input with `width` channels."""
        return width if self.heads is None else width // self.heads.num_heads * self.heads.num_kv_heads

    def columns(self, scales: torch.Tensor) -> torch.Tensor:
        """The scale of each input channel [width], from those of the rows."""
        return scales if self.heads is None else self._shared(scales).flatten()

    def largest(self, channels: torch.Tensor) -> torch.Tensor:
        """For each row, the largest entry of `channels` [width] over those that have its scale."""
        if self.heads is None:
            return channels
        kv, size = self.heads.num_kv_heads, self.heads.head_dim
        return channels.view(kv, -1, size).amax(1).flatten()

    def _shared(self, scales: torch.Tensor) -> torch.Tensor:
        assert self.heads is not None
        kv, share = self.heads.num_kv_heads, self.heads.num_heads // self.heads.num_kv_heads
        return scales.view(kv, 1, -1).expand(kv, share, self.heads.head_dim)


@dataclass(frozen=True)
class StandIn:
    """What a module returns while a later part of its layer is run by itself.

    module: its name, relative to the layer; usually attention.
    returns: the length of the tuple that it returns, in which everything else is None; 0: it returns a bare tensor.
    passes_stream: it returns the residual stream, because it adds that itself; otherwise zeros.
    """

    module: str
    returns: int = 0
    passes_stream: bool = False


@dataclass(frozen=True)
class Sublayer:
    """A part of a layer that maps the residual stream to the residual stream: attention, MLP, or the whole layer.

    stages: groups whose statistics are gathered together; a later stage sees what the earlier ones pruned.
    ends_before: the submodule whose input is the stream after this sublayer; None: the layer's output is.
    stand_ins: for modules that come before this sublayer in the layer, when this sublayer is run by itself.
    factor: the stream after the sublayer is the one before it plus `factor` times the output of the last stage's only
        linear; 0: it is something else.
    norm: the RMS norm through which this output goes first; None: there is none.
    """

    name: str
    stages: tuple[tuple[Group, ...], ...]
    ends_before: str | None = None
    stand_ins: tuple[StandIn, ...] = ()
    factor: float = 0.0
    norm: str | None = None

    @property
    def linears(self) -> list[str]:
        return [name for stage in self.stages for group in stage for name in group.linears]


@dataclass(frozen=True)
class Topology:
    """What all layers of one kind have in common; names are relative to the layer.

    folds: names of single experts have `{e}` for the expert's number.
    dense: linears that must stay dense -> why.
    together: sets of linears, besides those in `vllm_quirks.FUSED`, of which all are pruned or none.
    migrations: where the scales of inputs can be moved to.
    rotations: the consumers of folds whose heads can be rotated.
    norms: the RMS norms that read the residual stream.
    """

    sublayers: tuple[Sublayer, ...]
    folds: tuple[Fold, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    together: tuple[frozenset[str], ...] = ()
    migrations: tuple[Migration, ...] = ()
    rotations: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        return [name for sublayer in self.sublayers for name in sublayer.linears]

    def fused_with(self, name: str, linears: Iterable[str]) -> list[str]:
        """Those of a layer's `linears` that have to be pruned or dense together with `name`, in their order."""
        linears = list(linears)
        sets = [*self.together, *fused_sets(linears)]
        found, grown = {name}, True
        while grown:
            wider = found.union(*(names for names in sets if found & names))
            found, grown = wider, wider != found
        return [linear for linear in linears if linear in found]

    def folds_experts(self, path: str) -> bool:
        """Whether the down projection of each expert of the module at `path` folds into its own gate and up."""
        return any(fold.consumer.startswith(f"{path}.{{e}}.") for fold in self.folds)

    def dump(self) -> dict[str, Any]:
        """As JSON, for the recipe: the same text, whether found in this run or kept by an earlier one."""
        sublayers = [asdict(sublayer) for sublayer in self.sublayers]
        folds = [fold.model_dump(mode="json", exclude_none=True) for fold in self.folds]
        migrations = [{"from": list(one.consumers), "to": one.absorber} for one in self.migrations]
        return {
            "sublayers": sublayers, "folds": folds, "dense": dict(sorted(self.dense.items())),
            "migrations": migrations, "rotations": list(self.rotations),
        }  # fmt: skip


@dataclass(frozen=True)
class Topologies:
    """The topology of each decoder layer.

    kinds: of layers, in the order of the first layer of each.
    layers: the kind of each layer.
    """

    kinds: tuple[Topology, ...]
    layers: tuple[int, ...]

    @classmethod
    def of_kinds(cls, found: Sequence[Topology], layers: Iterable[int]) -> "Topologies":
        """From the topology found for each kind; kinds with the same one become one."""
        kinds: list[Topology] = []
        for topology in found:
            if topology not in kinds:
                kinds.append(topology)
        return cls(tuple(kinds), tuple(kinds.index(found[kind]) for kind in layers))

    def of(self, index: int) -> Topology:
        """The topology of layer `index`."""
        return self.kinds[self.layers[index]]

    def dump(self) -> list[dict[str, Any]]:
        """As JSON, for the recipe: each kind, and its layers."""
        numbers = range(len(self.layers))
        return [
            {"layers": [index for index in numbers if self.layers[index] == kind], **topology.dump()}
            for kind, topology in enumerate(self.kinds)
        ]

    def kept(self) -> dict[str, Any]:
        """All of it as JSON, for `restored`."""
        return TypeAdapter(Topologies).dump_python(self, mode="json")

    @classmethod
    def restored(cls, kept: dict[str, Any]) -> "Topologies":
        """What `kept` returned."""
        return TypeAdapter(Topologies).validate_python(kept)

    def absolute_folds(self, written: Callable[[int, str], str]) -> list[Fold]:
        """The folds under the names in the checkpoint, without those of experts.

        One with `{i}` stands for all layers that have it, where no other layer has its consumer. Where one has, and
        where names follow no pattern, each layer gets a fold of its own.

        Args:
            written: (layer number, name relative to the layer) -> name in the checkpoint.
        """
        found: list[Fold] = []
        for fold in self._distinct():
            holders = [index for index in range(len(self.layers)) if fold in self.of(index).folds]
            others = [index for index in range(len(self.layers)) if index not in holders]
            names = (fold.consumer, *(producer.name for producer in fold.producers))
            in_layer = {index: {name: written(index, name) for name in names} for index in holders}
            patterns = {name: _pattern({index: in_layer[index][name] for index in holders}) for name in names}
            same_name = any(fold.consumer in self.of(index).linears for index in others)
            if None in patterns.values() or same_name:
                found += [_renamed(fold, in_layer[index]) for index in holders]
            else:
                found.append(_renamed(fold, patterns))
        return found

    def _distinct(self) -> list[Fold]:
        folds: list[Fold] = []
        for topology in self.kinds:
            folds += [fold for fold in topology.folds if fold not in folds and "{e}" not in fold.consumer]
        return folds


def _renamed(fold: Fold, names: Mapping[str, Any]) -> Fold:
    producers = [producer.model_copy(update={"name": names[producer.name]}) for producer in fold.producers]
    return fold.model_copy(update={"consumer": names[fold.consumer], "producers": producers})


def _pattern(names: Mapping[int, str]) -> str | None:
    """The one name with `{i}` for the layer's number that gives `names`, one per layer; None if there is none."""
    first, name = next(iter(names.items()))
    parts = name.split(".")
    for position in [position for position, part in enumerate(parts) if part == str(first)]:
        pattern = ".".join([*parts[:position], "{i}", *parts[position + 1 :]])
        if all(pattern.replace("{i}", str(index)) == name for index, name in names.items()):
            return pattern
    return None


def linears_of(module: nn.Module) -> list[str]:
    """The names of the linears in a module, relative to it."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
