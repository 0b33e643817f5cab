"""How a decoder layer is stored in the work folder: its pruned experts one by one, then everything else as one unit."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.format import int8_rows, permutation
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.sublayer.pruned_linear import Pruned


def layer_key(index: int) -> str:
    """The key under which the work folder holds layer `index`."""
    return f"layer-{index:05d}"


def exact_key(index: int) -> str:
    """The key of the linears of layer `index` before they were rounded, which a resumed run needs; no part of the
    result."""
    return f"exact-{index:05d}"


def layer_tensors(
    model: StreamedModel,
    index: int,
    pruned: Mapping[str, Pruned],
    recipe: Recipe,
    experts: Iterable[str] = (),
    changed: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """All tensors of a layer in the checkpoint but its pruned experts. Dense tensors are as in the source.

    Args:
        pruned: written name -> pruned linear.
        experts: paths of the experts that are pruned.
        changed: written name of a tensor that is not pruned -> what is written instead of the source's.
    """
    replaced = {f"{name}.weight" for name in pruned}
    replaced.update(name for path in experts for name in model.experts[index][path].sources)
    kept = [name for name in model.names_in_layer(index) if name not in replaced]
    tensors = {name: changed[name] if name in changed else model.read(name) for name in kept}
    return tensors | linear_tensors(pruned, recipe)


def linear_tensors(pruned: Mapping[str, Pruned], recipe: Recipe) -> dict[str, torch.Tensor]:
    """All tensors of pruned linears in the checkpoint, and of rounded ones.

    Args:
        pruned: written name -> pruned linear.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, linear in pruned.items():
        if linear.is_dense:
            exact = linear.scale is None
            parts = {"weight": linear.weight} if exact else int8_rows.encode(linear.weight, linear.scale)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            continue
        order = slice(None) if linear.p is None else linear.p
        parts = recipe.weight_format.encode(
            linear.weight[:, order], linear.mask[:, order], linear.scale, recipe.pattern
        )
        dtype = linear.weight.dtype
        tensors |= SparseLinear(name, recipe.weight_format, parts, linear.p, dtype).tensors()
    return tensors


def exact_tensors(pruned: Mapping[str, Pruned], recipe: Recipe) -> dict[str, torch.Tensor]:
    """The tensors of `exact_key`, in the format of float weights. One linear at a time is dense.

    Args:
        pruned: written name -> pruned linear with its exact weight.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, linear in pruned.items():
        tensors |= linear_tensors({name: linear.before_rounding}, recipe.before_rounding)
    return tensors


def pruned_weights(
    tensors: Mapping[str, torch.Tensor], names: list[str], dtype: torch.dtype, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Linear -> [out, in] in the model's own order and dtype, from the tensors of a finished layer."""
    weights = {}
    for name in names:
        if f"{name}.weight" in tensors:
            weights[name] = tensors[f"{name}.weight"]
            continue
        if f"{name}.{int8_rows.INTEGERS}" in tensors:
            weights[name] = int8_rows.decode({part: tensors[f"{name}.{part}"] for part in int8_rows.TENSORS}, dtype)
            continue
        parts = {part.name: tensors[f"{name}.{part.name}"] for part in recipe.weight_format.parts}
        stored = recipe.weight_format.decode(parts, dtype)
        p = tensors.get(f"{name}.input_permutation")
        weights[name] = stored if p is None else stored[:, permutation.invert(p).long()]
    return weights
