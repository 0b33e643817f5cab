"""Where the scales of a linear's input channels can be moved to what comes before it, found by experiment.

Dividing the channels of an input and multiplying the columns of all linears that read it changes nothing. The division
is free where a norm's weight or the rows of another linear absorb it (SmoothQuant, Xiao et al., ICML 2023).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from ria_vllm.format import permutation
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.offline.model.experiments.experiment import SEED, Change, Experiment, Seen, key_of
from ria_vllm.offline.model.topology import Group, Heads, Migration

# What a norm multiplies by, minus its weight: most multiply by the weight, Gemma's by one more.
OFFSETS = (0, 1)


def find_migrations(
    few: Experiment, many: Experiment, seen: Sequence[Seen], groups: Sequence[Group], folds: Sequence[Fold]
) -> tuple[Migration, ...]:
    """The migrations of a layer's inputs, at most one for each.

    A migration is right if and only if random scales leave the layer's output as it is, with few and with many tokens.

    Args:
        few, many: the layer with few and with many tokens.
        seen: every call of a module within the layer.
        groups: linears that read the same tensor; none that stay dense.
        folds: whose producers may absorb scales, too.
    """
    found = []
    for group in groups:
        tried = _candidates(few.layer, seen, group, folds) if group.linears else iter(())
        first = next((one for one in tried if _change_nothing(few, [one])), None)
        found += [] if first is None else [first]
    if _change_nothing(many, found):
        return tuple(found)
    return tuple(one for one in found if _change_nothing(many, [one]))


def _into_producer(consumers: tuple[str, ...], fold: Fold, producer: Producer, layer: nn.Module) -> Migration:
    """The migration of what a fold's consumer reads into one of its producers."""
    width, heads = layer.get_submodule(fold.consumer).in_features, None
    rows = len(producer_rows(layer.get_submodule(producer.name), producer))
    if fold.num_heads and fold.num_kv_heads and rows != width:
        heads = Heads(fold.num_heads, fold.num_kv_heads, width // fold.num_heads)
    return Migration(consumers, producer=producer, heads=heads)


def producer_rows(linear: nn.Linear, producer: Producer) -> torch.Tensor:
    """Where a producer's rows are in its linear: int64, ascending."""
    start, end = producer.rows or (0, linear.out_features)
    return permutation.places(linear.out_features, start, end, producer.blocks)


def _candidates(layer: nn.Module, seen: Sequence[Seen], group: Group, folds: Sequence[Fold]) -> Iterator[Migration]:
    key = next(call.key for call in seen if call.name == group.linears[0])
    width = layer.get_submodule(group.linears[0]).in_features
    readers = dict.fromkeys(call.name for call in seen if call.key == key)
    consumers = tuple(name for name in readers if isinstance(layer.get_submodule(name), nn.Linear))
    for call in seen:
        weight = getattr(layer.get_submodule(call.name), "weight", None)
        made = call.returned is not None and key_of(call.returned) == key
        if made and isinstance(weight, nn.Parameter) and weight.shape == (width,):
            for offset in OFFSETS:
                yield Migration(consumers, norm=call.name, offset=offset)
    for fold in (fold for fold in folds if len(consumers) == 1 and fold.consumer == consumers[0]):
        for producer in fold.producers:
            yield _into_producer(consumers, fold, producer, layer)


def _change_nothing(experiment: Experiment, migrations: Sequence[Migration]) -> bool:
    """Whether the layer's output stays the same when random scales migrate, of all of them at once.

    They are powers of two, and reach far, so that a limit of what a producer returns comes into effect.
    """
    layer = experiment.layer
    parameters: dict[str, torch.Tensor] = {}
    read: list[Change] = []
    returned: list[Change] = []
    for migration in migrations:
        width = layer.get_submodule(migration.consumers[0]).in_features
        draw = torch.Generator().manual_seed(SEED)
        scales = 2.0 ** torch.randint(-10, 11, (migration.rows_of(width),), generator=draw).double()
        scales[0] = 2.0**-10
        read += [(name, _times(migration.columns(scales))) for name in migration.consumers]
        if migration.producer is not None:
            linear = layer.get_submodule(migration.producer.name)
            factors = torch.ones(linear.out_features, dtype=torch.float64)
            factors[producer_rows(linear, migration.producer)] = 1 / scales
            returned.append((migration.producer.name, _times(factors)))
            continue
        for name, offset in (("weight", migration.offset), ("bias", 0)):
            own = getattr(layer.get_submodule(migration.absorber), name, None)
            if isinstance(own, nn.Parameter):
                key = f"{migration.norm}.{name}"  # which several migrations may share
                parameters[key] = (parameters.get(key, own) + offset) / scales - offset
    with experiment.changed(read, returned):
        return experiment.unchanged(parameters)


def _times(factors: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor * factors
