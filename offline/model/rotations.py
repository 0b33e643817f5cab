"""Where orthogonal matrices fit between two linears, found by experiment.

They turn the rows of the producer of a fold by heads, such as v, and the columns of its consumer, o.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ria_vllm.layer_schema import Fold
from ria_vllm.offline.model.experiment import SEED, Batch, Experiment
from ria_vllm.offline.model.migrations import producer_rows

DRAWS = 3


def find_rotations(experiment: Experiment, folds: Sequence[Fold], long: Batch) -> tuple[str, ...]:
    """The consumers of those folds by heads whose heads may be turned.

    They may if and only if random orthogonal matrices leave the layer's output as it is, with few and with many tokens.
    A gate on attention's output or a norm of the values lets permutations through, but no rotations.

    Args:
        folds: of the layer.
        long: a batch of many tokens.

    Raises:
        RiaError: the layer does not run with so many tokens.
    """
    found = [fold for fold in folds if fold.coupling == "heads" and len(fold.producers) == 1]
    found = [fold for fold in found if _turns(experiment, fold)]
    experiment = experiment.with_batch(*long) if found else experiment
    return tuple(fold.consumer for fold in found if _turns(experiment, fold))


def turn(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parameters of a layer after its heads were turned: name -> tensor in the dtype of `rotations`.

    Args:
        fold: by heads, with one producer.
        rotations: [kv heads, d, d], orthogonal, on the layer's device.
    """
    producer, consumer = layer.get_submodule(fold.producers[0].name), layer.get_submodule(fold.consumer)
    rows = producer_rows(producer, fold.producers[0]).to(rotations.device)
    kv, d = rotations.shape[:2]
    changed = {}
    for name, parameter in (("weight", producer.weight), ("bias", producer.bias)):
        if parameter is not None:
            whole = parameter.data.to(rotations.dtype, copy=True)
            whole[rows] = (rotations @ whole[rows].view(kv, d, -1)).view(whole[rows].shape)
            changed[f"{fold.producers[0].name}.{name}"] = whole
    columns = consumer.weight.data.to(rotations.dtype).unflatten(1, (-1, d))
    of_heads = rotations.repeat_interleave(columns.shape[1] // kv, 0)
    changed[f"{fold.consumer}.weight"] = torch.einsum("ohd,hed->ohe", columns, of_heads).flatten(1)
    return changed


def _turns(experiment: Experiment, fold: Fold) -> bool:
    draw = torch.Generator().manual_seed(SEED)
    size = experiment.layer.get_submodule(fold.consumer).in_features // (fold.num_heads or 1)
    for _ in range(DRAWS):
        random = torch.randn(fold.num_kv_heads or 1, size, size, dtype=torch.float64, generator=draw)
        with _turned(experiment.layer, fold, torch.linalg.qr(random).Q):
            if not experiment.unchanged():
                return False
    return True


@contextmanager
def _turned(layer: nn.Module, fold: Fold, rotations: torch.Tensor) -> Iterator[None]:
    changed = turn(layer, fold, rotations)
    kept = {name: layer.get_parameter(name).data.clone() for name in changed}
    for name, tensor in changed.items():
        layer.get_parameter(name).data.copy_(tensor)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            layer.get_parameter(name).data.copy_(tensor)
