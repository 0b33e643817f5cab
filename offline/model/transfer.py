"""From what was found out about a smaller copy of a layer to what this says about the layer itself.

All names are the same. A fold of the copy stands for the one of the layer that comes into question for the same reason:
the same producers, a whole linear or the same part of one, and numbers of heads that the same module or configuration
names. Nothing else has numbers that depend on widths, but for the structure of permutations, which the layer's own
linears tell.

The copy and the layer are computed by the same code with the same switches, so widths can make a difference only where
that code compares one with a number. This is why folds and rotations are also tried on the layer's own widths, in
float32, if there is memory for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.layer_schema import Fold
from ria_vllm.offline.model.candidates import candidates, head_counts
from ria_vllm.offline.model.describe import constrained
from ria_vllm.offline.model.folds import is_free, take
from ria_vllm.offline.model.migrations import into_producer
from ria_vllm.offline.model.topology import Group, Migration, Sublayer, Topology


@dataclass(frozen=True)
class Sized:
    """A layer, on any device, and its text model's configuration."""

    layer: nn.Module
    config: Any


def transferred(found: Topology, small: Sized, real: Sized, hidden: int) -> Topology:
    """The topology of a layer.

    Args:
        found: the topology of a smaller copy, `small`.
        hidden: the width of the layer's residual stream.

    Raises:
        RiaError: a fold of the copy stands for none of the layer's, or for more than one.
    """
    folds = [_transferred(fold, small, real) for fold in found.folds]
    _check_apart(folds, real.layer)
    sublayers = tuple(constrained(_free(sublayer), real.layer, folds, hidden) for sublayer in found.sublayers)
    pairs = list(zip(found.folds, folds, strict=True))
    migrations = tuple(_migration(one, pairs, real.layer) for one in found.migrations)
    return replace(found, sublayers=sublayers, folds=tuple(folds), migrations=migrations)


def _migration(found: Migration, folds: Sequence[tuple[Fold, Fold]], layer: nn.Module) -> Migration:
    """A migration of the layer. One into a norm has no numbers that depend on widths; one into a producer is that of a
    fold.

    Args:
        folds: the copy's, and the layer's that they stand for.
    """
    if found.producer is None:
        return found
    (consumer,) = found.consumers
    own, fold = next(pair for pair in folds if pair[0].consumer == consumer)
    producer = fold.producers[own.producers.index(found.producer)]
    return into_producer(found.consumers, fold, producer, layer)


def _free(sublayer: Sublayer) -> Sublayer:
    """The same without the structure of permutations."""

    def free(group: Group) -> Group:
        return replace(group, heads=None, blocks=1)

    return replace(sublayer, stages=tuple(tuple(map(free, stage)) for stage in sublayer.stages))


def _transferred(fold: Fold, small: Sized, real: Sized) -> Fold:
    if "{e}" in fold.consumer:  # whole linears of one expert
        return fold
    own = next((reason for one, reason in _possible(fold, small) if one == fold), None)
    found = [one for one, reason in _possible(fold, real) if own is not None and _alike(reason, own)]
    if len(found) != 1:
        raise RiaError(
            f"{fold.consumer}: a fold of a smaller copy of the layer stands for {len(found)} folds of the layer. Run "
            "the experiment on the layer's own size."
        )
    return found[0]


# The producers, whole or in parts, and who says how many heads there are.
Reason = tuple[tuple, set[tuple[int, str]]]


def _possible(fold: Fold, sized: Sized) -> list[tuple[Fold, Reason]]:
    """The folds of the same consumer that come into question with the same producers, and why they do."""
    layer = sized.layer
    names = list(dict.fromkeys(producer.name for producer in fold.producers))
    width = layer.get_submodule(fold.consumer).in_features
    heads = head_counts(width, layer.get_submodule(fold.consumer.rpartition(".")[0]), sized.config)
    producers = [(name, layer.get_submodule(name).out_features) for name in reversed(names)]
    found = candidates(fold.consumer, width, producers, [set(names)], list(heads))
    return [(one, (_form(one), heads.get(one.num_heads or 0, set()))) for one in found]


def _alike(one: Reason, other: Reason) -> bool:
    return one[0] == other[0] and (one[1] == other[1] or bool(one[1] & other[1]))


def _form(fold: Fold) -> tuple:
    """A fold without its numbers."""
    producers = [
        (producer.name, producer.rows and producer.rows[0] > 0, producer.blocks > 1) for producer in fold.producers
    ]
    return fold.coupling, fold.num_heads == fold.num_kv_heads, fold.num_kv_heads == 1, tuple(producers)


def _check_apart(folds: Sequence[Fold], layer: nn.Module) -> None:
    taken: dict[str, torch.Tensor] = {}
    for number, fold in enumerate(folds):
        if "{e}" in fold.consumer:
            continue
        if not is_free(layer, fold, taken, folds[:number]):
            raise RiaError(f"{fold.consumer}: its fold reorders rows that another one does.")
        take(layer, fold, taken)
