"""A decoder layer as the work folder keeps it."""

from collections.abc import Mapping

import torch

from ria_vllm import permutation, sparse24
from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.solve import Pruned


def layer_key(index: int) -> str:
    return f"layer-{index:05d}"


def layer_tensors(
    model: StreamedModel, index: int, pruned: Mapping[str, Pruned], recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Everything the checkpoint has of a layer; `pruned` by written names. Dense tensors are as the source has them."""
    replaced = {f"{name}.weight" for name in pruned}
    tensors = {name: model.read(name) for name in model.names_in_layer(index) if name not in replaced}
    for name, linear in pruned.items():
        if not recipe.served:
            tensors[f"{name}.weight"] = linear.weight
            continue
        if linear.p is not None:
            tensors[f"{name}.input_permutation"] = linear.p.to(torch.int32)
        order = slice(None) if linear.p is None else linear.p
        compressed, bitmask = sparse24.compress(linear.weight[:, order], linear.mask[:, order])
        if linear.scale is not None:
            # Exact: the dtype's rounding has moved no weight by as much as half a step.
            compressed = (compressed.float() / linear.scale).round().to(torch.int8)
            tensors[f"{name}.weight_scale"] = linear.scale
        tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"] = compressed, bitmask
        tensors[f"{name}.shape"] = torch.tensor(linear.weight.shape, dtype=torch.int64).view(2, 1)
    return tensors


def pruned_weights(
    tensors: Mapping[str, torch.Tensor], names: list[str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """linear -> [out, in] in the model's own order and dtype, from a finished layer's tensors."""
    weights = {}
    for name in names:
        if f"{name}.weight" in tensors:
            weights[name] = tensors[f"{name}.weight"]
            continue
        stored = sparse24.decompress(tensors[f"{name}.compressed"], tensors[f"{name}.bitmask"])
        if f"{name}.weight_scale" in tensors:
            stored = (stored.float() * tensors[f"{name}.weight_scale"]).to(dtype)
        p = tensors.get(f"{name}.input_permutation")
        weights[name] = stored if p is None else stored[:, permutation.invert(p).long()]
    return weights
