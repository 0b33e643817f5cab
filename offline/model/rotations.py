"""Where orthogonal matrices fit between two linears, found by experiment.

They turn the rows of the producer of a fold by heads, such as v, and the columns of its consumer, o.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ria_vllm import rotation
from ria_vllm.errors import RiaError
from ria_vllm.layer_schema import Fold
from ria_vllm.offline.model.experiment import SEED, Batch, Experiment
from ria_vllm.offline.model.migrations import producer_rows

DRAWS = 3
# Values are also tried this many times larger, so that a limit of what the producer returns comes into effect.
FAR = 2.0**10


def find_rotations(experiment: Experiment, folds: Sequence[Fold], long: Batch) -> tuple[str, ...]:
    """The consumers of those folds by heads whose heads may be turned.

    They may if and only if random orthogonal matrices leave the layer's output as it is, with few and with many tokens.
    A gate on attention's output lets permutations through, but no rotations.

    Args:
        folds: of the layer.
        long: a batch of many tokens.

    Raises:
        RiaError: the layer does not run with so many tokens.
    """
    found = [fold for fold in folds if fold.coupling == "heads" and len(fold.producers) == 1]
    found = [fold for fold in found if turns(experiment, fold)]
    experiment = experiment.with_batch(*long) if found else experiment
    return tuple(fold.consumer for fold in found if turns(experiment, fold))


def turns(experiment: Experiment, fold: Fold) -> bool:
    """Whether random orthogonal matrices leave the layer's output as it is, with values of any size.

    A light experiment tries no large values: limits do not depend on widths, and its runs take long.

    Args:
        fold: by heads, with one producer.
    """
    stays = _stays(experiment, fold)
    if not stays or experiment.is_light:
        return stays
    with _values_changed(experiment.layer, fold, lambda values: values * FAR):
        try:
            experiment = experiment.with_batch(experiment.call, experiment.stream)  # what this layer computes
        except RiaError:  # no finite numbers
            return False
        return _stays(experiment, fold)


def turned_parameters(layer: nn.Module, fold: Fold) -> list[str]:
    """The parameters that `turn` changes."""
    producer = fold.producers[0].name
    bias = [] if layer.get_submodule(producer).bias is None else [f"{producer}.bias"]
    return [f"{producer}.weight", *bias, f"{fold.consumer}.weight"]


def turn(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> None:
    """Turn the heads of a layer, in place.

    Args:
        fold: by heads, with one producer.
        rotations: [kv heads, d, d], orthogonal, on the layer's device; their dtype is that of the products.
    """
    producer, consumer = layer.get_submodule(fold.producers[0].name), layer.get_submodule(fold.consumer)
    rows = producer_rows(producer, fold.producers[0]).to(rotations.device)
    for parameter in (producer.weight, producer.bias):
        if parameter is not None:
            rotation.turn_rows(parameter.data, rotations, rows)
    rotation.turn_columns(consumer.weight.data, rotations)


def _stays(experiment: Experiment, fold: Fold) -> bool:
    draw = torch.Generator().manual_seed(SEED)
    change = _turned_calls if experiment.is_light else _turned
    size = experiment.layer.get_submodule(fold.consumer).in_features // (fold.num_heads or 1)
    for _ in range(1 if experiment.is_light else DRAWS):
        random = torch.randn(fold.num_kv_heads or 1, size, size, dtype=torch.float64, generator=draw)
        with change(experiment.layer, fold, torch.linalg.qr(random).Q):
            if not experiment.unchanged():
                return False
    return True


@contextmanager
def _turned(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> Iterator[None]:
    kept = {name: layer.get_parameter(name).data.clone() for name in turned_parameters(layer, fold)}
    turn(layer, fold, rotations)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            layer.get_parameter(name).data.copy_(tensor)


@contextmanager
def _turned_calls(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> Iterator[None]:
    """The same for weights that cannot be changed: turn what the producer returns, and what the consumer reads."""
    of_heads = rotations.repeat_interleave((fold.num_heads or 1) // len(rotations), 0)

    def turned(values: torch.Tensor) -> torch.Tensor:
        heads = values.unflatten(-1, (len(rotations), -1))
        return torch.einsum("...hd,hed->...he", heads, rotations.to(values.dtype)).flatten(-2)

    def read(_: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        heads = args[0].unflatten(-1, (len(of_heads), -1))
        return (torch.einsum("...he,hed->...hd", heads, of_heads.to(heads.dtype)).flatten(-2),)

    handle = layer.get_submodule(fold.consumer).register_forward_pre_hook(read)
    try:
        with _values_changed(layer, fold, turned):
            yield
    finally:
        handle.remove()


@contextmanager
def _values_changed(layer: nn.Module, fold: Fold, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Change what the producer returns, in its rows only."""
    producer = layer.get_submodule(fold.producers[0].name)
    rows = producer_rows(producer, fold.producers[0])

    def returned(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_copy(-1, rows, change(output[..., rows]))

    handle = producer.register_forward_hook(returned)
    try:
        yield
    finally:
        handle.remove()
