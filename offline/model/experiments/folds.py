"""Which folds a layer has. A fold holds if and only if random permutations change nothing but rounding."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import nn

from ria_vllm.format import permutation
from ria_vllm.format.layer_schema import Fold, Producer
from ria_vllm.hf.experts_layout import DOWN, ExpertsLayout, experts_modules
from ria_vllm.offline.model.experiments.candidates import candidates, head_counts
from ria_vllm.offline.model.experiments.experiment import SEED, Experiment
from ria_vllm.offline.model.experiments.migrations import producer_rows

DRAWS = 3


def find_folds(experiment: Experiment, order: Sequence[str], groups: Sequence[set[str]], config: object) -> list[Fold]:
    """The folds of the layer's linears, and of its routed experts.

    Args:
        order: its linears without those that stay dense, in the order of their first calls.
        groups: the same, in sets that read the same tensor.
        config: the text model's configuration, for the numbers of heads.
    """
    found: list[Fold] = []
    taken: dict[str, torch.Tensor] = {}
    for number, consumer in enumerate(order):
        linear = experiment.layer.get_submodule(consumer)
        own = next(group for group in groups if consumer in group)
        if len(own) > 1 or not _matters(experiment, consumer, linear.in_features):
            continue  # several linears that share a permutation have a fold in common, or none
        before = reversed(order[:number])
        producers = [(name, experiment.layer.get_submodule(name).out_features) for name in before]
        around = experiment.layer.get_submodule(consumer.rpartition(".")[0])
        heads = head_counts(linear.in_features, around, config)
        for fold in candidates(consumer, linear.in_features, producers, groups, heads):
            if _is_free(experiment.layer, fold, taken, found) and holds(experiment, fold):
                found.append(fold)
                _take(experiment.layer, fold, taken)
                break
    return found + [
        fold for layout in experts_modules(experiment.layer).values() for fold in _experts(experiment, layout)
    ]


def confirmed(experiment: Experiment, folds: Sequence[Fold]) -> list[Fold]:
    """Those that hold, all of them at once.

    Attention may do something else once there are more tokens than its window, block or chunk has.

    Args:
        experiment: with many tokens.
        folds: found with few.
    """
    if _hold_together(experiment, folds):
        return list(folds)
    kept: list[Fold] = []
    for fold in folds:
        if _hold_together(experiment, [*kept, fold]):
            kept.append(fold)
    return kept


def _hold_together(experiment: Experiment, folds: Iterable[Fold]) -> bool:
    """Whether the layer's output stays the same when all of them are permuted at once."""
    layer, draw = experiment.layer, torch.Generator().manual_seed(SEED)
    layouts = experts_modules(layer)
    parameters: dict[str, torch.Tensor] = {}
    with ExitStack() as changes:
        for fold in folds:
            path, _, of_expert = fold.consumer.partition(".{e}.")
            if of_expert:
                parameters |= _permuted_experts(layer, layouts[path], layouts[path].kinds, draw)
            else:
                changes.enter_context(_permuted(experiment, fold, draw))
        return experiment.unchanged(parameters)


def holds(experiment: Experiment, fold: Fold) -> bool:
    """Whether the layer's output stays the same when its consumer's columns and its producers' rows are permuted."""
    draw = torch.Generator().manual_seed(SEED)
    for _ in range(DRAWS):
        with _permuted(experiment, fold, draw):
            if not experiment.unchanged():
                return False
    return True


def _random_permutation(fold: Fold, width: int, draw: torch.Generator) -> torch.Tensor:
    """A random permutation int64 [width] of a consumer's input, with the structure that its fold needs."""
    if fold.coupling == "elementwise":
        return torch.randperm(width, generator=draw)
    num_heads, num_kv_heads = fold.num_heads or 1, fold.num_kv_heads or 1
    size, share = width // num_heads, num_heads // num_kv_heads
    inner = [torch.randperm(size, generator=draw) for _ in range(num_kv_heads)]
    return torch.cat([head * size + inner[head // share] for head in range(num_heads)])


def _permuted(experiment: Experiment, fold: Fold, draw: torch.Generator) -> AbstractContextManager[None]:
    """Permute the consumer's columns at random, and the producers' rows as the fold says."""
    layer = experiment.layer
    p = _random_permutation(fold, layer.get_submodule(fold.consumer).in_features, draw)
    returned = []
    for producer, rows in zip(fold.producers, fold.row_permutations(p), strict=True):
        linear = layer.get_submodule(producer.name)
        index, places = torch.arange(linear.out_features), producer_rows(linear, producer)
        index[places] = places[rows]
        returned.append((producer.name, _gathering(index)))
    return experiment.changed([(fold.consumer, _gathering(permutation.invert(p)))], returned)


def _gathering(index: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_select(-1, index)


def _matters(experiment: Experiment, consumer: str, width: int) -> bool:
    """Whether the output depends on the order of the consumer's columns at all."""
    p = torch.randperm(width, generator=torch.Generator().manual_seed(SEED))
    with experiment.changed([(consumer, _gathering(p))]):
        return not experiment.unchanged()


def _masks(layer: nn.Module, fold: Fold) -> Iterator[tuple[str, torch.Tensor]]:
    for producer in fold.producers:
        linear = layer.get_submodule(producer.name)
        mask = torch.zeros(linear.out_features, dtype=torch.bool)
        mask[producer_rows(linear, producer)] = True
        yield producer.name, mask


def _is_free(layer: nn.Module, fold: Fold, taken: dict[str, torch.Tensor], found: Sequence[Fold]) -> bool:
    """Whether no other fold permutes the same rows, or divides the same producer into other blocks.

    Serving knows no numbers of rows when it reads folds, so it takes other blocks for an overlap.
    """
    blocks = {producer.name: producer.blocks for other in found for producer in other.producers}
    if any(blocks.get(producer.name, producer.blocks) != producer.blocks for producer in fold.producers):
        return False
    return not any(name in taken and bool((taken[name] & mask).any()) for name, mask in _masks(layer, fold))


def _take(layer: nn.Module, fold: Fold, taken: dict[str, torch.Tensor]) -> None:
    """Add the rows that a fold permutes to those that others do."""
    for name, mask in _masks(layer, fold):
        taken[name] = taken[name] | mask if name in taken else mask


def _experts(experiment: Experiment, layout: ExpertsLayout) -> list[Fold]:
    """The fold of each expert's down projection into its own gate and up projections, if it holds."""
    draw = torch.Generator().manual_seed(SEED)
    for kinds, holds_for in [((DOWN,), False), *[(layout.kinds, True)] * DRAWS]:
        if experiment.unchanged(_permuted_experts(experiment.layer, layout, kinds, draw)) != holds_for:
            return []
    producers = [Producer(name=f"{layout.path}.{{e}}.{kind}_proj") for kind in layout.first]
    return [Fold(consumer=f"{layout.path}.{{e}}.{DOWN}_proj", producers=producers, coupling="elementwise")]


def _permuted_experts(
    layer: nn.Module, layout: ExpertsLayout, kinds: Iterable[str], draw: torch.Generator
) -> dict[str, torch.Tensor]:
    """The parameters of experts with the inner channels of these linears permuted, each expert's in another way."""
    names = [*layout.parameters, *(f"{name}_bias" for name in layout.parameters if layout.has_bias)]
    own = {name: layer.get_parameter(f"{layout.path}.{name}").data for name in names}
    alike = any(own[name].stride(0) == 0 for name in layout.parameters)  # one expert, many times
    permutations = [torch.randperm(layout.inner, generator=draw) for _ in range(1 if alike else layout.num_experts)]
    found = {}
    for name, stacked in own.items():
        copies = stacked[: None if stacked.stride(0) else 1].clone()
        for expert, part in enumerate(copies):
            rows_from = permutations[expert % len(permutations)]
            for kind, rows in layout.parted(part, name.removesuffix("_bias")).items():
                if kind in kinds and kind != DOWN:
                    rows.copy_(rows[rows_from])
                elif kind in kinds and name in layout.parameters:
                    rows.copy_(rows[:, rows_from])
        found[f"{layout.path}.{name}"] = copies.expand(stacked.shape)
    return found
