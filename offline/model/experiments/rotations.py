"""Where orthogonal matrices fit between two linears, found by experiment.

They rotate the rows of the producer of a fold by heads, such as v, and the columns of its consumer, o.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Fold
from ria_vllm.offline.model.experiments.experiment import SEED, Experiment
from ria_vllm.offline.model.experiments.migrations import producer_rows

DRAWS = 3
# Values are also tried this many times larger, so that a limit of what the producer returns comes into effect.
FAR = 2.0**10


def find_rotations(few: Experiment, many: Experiment, folds: Sequence[Fold]) -> tuple[str, ...]:
    """The consumers of those folds by heads whose heads may be rotated.

    They may if and only if random orthogonal matrices leave the layer's output as it is, with few and with many tokens.
    A gate on attention's output lets permutations through, but no rotations.

    Args:
        few, many: the layer with few and with many tokens.
        folds: of the layer.
    """
    found = [fold for fold in folds if fold.coupling == "heads" and len(fold.producers) == 1]
    return tuple(fold.consumer for fold in found if _rotates(few, fold, DRAWS) and _rotates(many, fold, 1))


def _rotates(experiment: Experiment, fold: Fold, draws: int) -> bool:
    """Whether random orthogonal matrices leave the layer's output as it is, with values of any size.

    Args:
        fold: by heads, with one producer.
    """
    if not _stays(experiment, fold, draws):
        return False
    with _values_changed(experiment.layer, fold, lambda values: values * FAR):
        try:
            experiment = experiment.with_batch(experiment.call, experiment.stream)  # what this layer computes
        except RiaError:  # no finite numbers
            return False
        return _stays(experiment, fold, draws)


def rotated_parameters(layer: nn.Module, fold: Fold) -> list[str]:
    """The parameters that `rotate` changes."""
    producer = fold.producers[0].name
    bias = [] if layer.get_submodule(producer).bias is None else [f"{producer}.bias"]
    return [f"{producer}.weight", *bias, f"{fold.consumer}.weight"]


def rotate(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> None:
    """Multiply the rows of v of each key-value head by that head's matrix, and the columns of o that read this head by
    its transpose, in place. Together they compute the same as before.

    Args:
        fold: by heads, with one producer.
        rotations: [kv heads, d, d], orthogonal, on the layer's device; their dtype is that of the products.
    """
    producer, consumer = layer.get_submodule(fold.producers[0].name), layer.get_submodule(fold.consumer)
    rows = producer_rows(producer, fold.producers[0]).to(rotations.device).view(len(rotations), -1)
    for parameter in (producer.weight, producer.bias):
        for own, matrix in zip(rows, rotations, strict=True) if parameter is not None else ():
            parameter.data[own] = (matrix @ parameter.data[own].to(matrix.dtype)).to(parameter.dtype)
    columns = consumer.weight.data.split(rotations.shape[1], 1)
    for head, part in enumerate(columns):
        matrix = rotations[head * len(rotations) // len(columns)]
        part.copy_(part.to(matrix.dtype) @ matrix.T)


def _stays(experiment: Experiment, fold: Fold, draws: int) -> bool:
    draw = torch.Generator().manual_seed(SEED)
    size = experiment.layer.get_submodule(fold.consumer).in_features // (fold.num_heads or 1)
    for _ in range(draws):
        random = torch.randn(fold.num_kv_heads or 1, size, size, dtype=torch.float64, generator=draw)
        with _rotated(experiment.layer, fold, torch.linalg.qr(random).Q):
            if not experiment.unchanged():
                return False
    return True


@contextmanager
def _rotated(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> Iterator[None]:
    kept = {name: layer.get_parameter(name).data.clone() for name in rotated_parameters(layer, fold)}
    rotate(layer, fold, rotations)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            layer.get_parameter(name).data.copy_(tensor)


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
