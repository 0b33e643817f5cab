"""Where orthogonal matrices fit between two linears, found by experiment.

They rotate the rows of the producer of a fold by heads, such as v, and the columns of its consumer, o.
"""

from collections.abc import Sequence

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
    producer = fold.producers[0]
    rows = producer_rows(experiment.layer.get_submodule(producer.name), producer)
    with experiment.changed(returned=[(producer.name, lambda X: X.index_copy(-1, rows, X[..., rows] * FAR))]):
        try:
            experiment = experiment.with_batch(experiment.call, experiment.stream)  # what this layer computes
        except RiaError:  # no finite numbers
            return False
        return _stays(experiment, fold, draws)


def rotated_parameters(layer: nn.Module, fold: Fold) -> list[str]:
    """The names of the parameters in `rotated`."""
    producer = fold.producers[0].name
    bias = [] if layer.get_submodule(producer).bias is None else [f"{producer}.bias"]
    return [f"{producer}.weight", *bias, f"{fold.consumer}.weight"]


def rotated(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> dict[str, torch.Tensor]:
    """Parameters of the layer: the rows of v of each key-value head multiplied by that head's matrix, and the columns
    of o that read this head by its transpose. With all of them, the layer computes the same.

    Args:
        fold: by heads, with one producer.
        rotations: [kv heads, d, d], orthogonal, on the layer's device; their dtype is that of the products.
    """
    found = {name: layer.get_parameter(name).data.clone() for name in rotated_parameters(layer, fold)}
    *of_producer, consumer = found.values()
    linear = layer.get_submodule(fold.producers[0].name)
    rows = producer_rows(linear, fold.producers[0]).to(rotations.device).view(len(rotations), -1)
    for tensor in of_producer:
        for own, matrix in zip(rows, rotations, strict=True):
            tensor[own] = (matrix @ tensor[own].to(matrix.dtype)).to(tensor.dtype)
    columns = consumer.split(rotations.shape[1], 1)
    for head, part in enumerate(columns):
        matrix = rotations[head * len(rotations) // len(columns)]
        part.copy_(part.to(matrix.dtype) @ matrix.T)
    return found


def _stays(experiment: Experiment, fold: Fold, draws: int) -> bool:
    draw = torch.Generator().manual_seed(SEED)
    size = experiment.layer.get_submodule(fold.consumer).in_features // (fold.num_heads or 1)
    for _ in range(draws):
        random = torch.randn(fold.num_kv_heads or 1, size, size, dtype=torch.float64, generator=draw)
        if not experiment.unchanged(rotated(experiment.layer, fold, torch.linalg.qr(random).Q)):
            return False
    return True
