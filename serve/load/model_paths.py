"""Where vLLM's model puts the tensors of a checkpoint, by the model's own rules for naming weights."""

from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.shards import ShardId

# vLLM puts these in the place of modules that another pipeline stage has, or that are not used.
PLACEHOLDER_MODULES = ("PPMissingLayer", "StageMissingLayer")


@dataclass(frozen=True)
class Place:
    """How far the name of a tensor leads into a model.

    Attributes:
        path: of the last module on the way.
        rest: what is left of the name; empty if all of it was a path.
        shard: under which the tensor is loaded.
    """

    path: tuple[str, ...]
    rest: str
    shard: Any


def place_of(model: torch.nn.Module, tensor: str) -> Place | None:
    """Follow the name of a tensor through the model, and its parameter's name, too, as if that were a module.

    Names may be relative to a child of the model: vLLM's pooling models and BLOOM load the names of a decoder without
    a head, such as `layers.0.mlp.up_proj.weight`, into `model` or `transformer`.

    Returns:
        None if this process does not use the tensor, because a mapper drops it or because it belongs to a part of the
        model that is elsewhere.

    Raises:
        RiaError: it leads all the way into more than one child.
    """
    place = _followed(model, tensor)
    if place is None or place.path:
        return place
    children = {id(child): name for name, child in model._modules.items()}  # one with several names has the last
    places = {
        name: _followed(model, f"{name}.{tensor}")
        for name in children.values()
        if type(model._modules[name]).__name__ not in PLACEHOLDER_MODULES
    }
    found = sorted((other for other in places.values() if other is not None), key=_how_far, reverse=True)
    complete = list(dict.fromkeys(tuple(other.path) for other in found if not other.rest))
    if len(complete) > 1:
        both = " and ".join(path[0] for path in complete)
        raise RiaError(
            f"{tensor}: vLLM's {type(model).__name__} has a place for it in {both}, and nothing says in which it "
            "belongs. `ria-vllm export` makes a dense folder."
        )
    if found and len(found[0].path) > 1:
        return found[0]
    # A child that has nothing where the name begins, such as a vision tower, has no say in whether it is used.
    first = tensor.partition(".")[0]
    gone = (name for name, other in places.items() if other is None)
    return None if any(first in getattr(model, name)._modules for name in gone) else place


def _how_far(place: Place) -> tuple[bool, int]:
    return not place.rest, len(place.path)


def _followed(model: torch.nn.Module, tensor: str) -> Place | None:
    """`place_of` a name relative to `model`.

    A module with a loader of its own applies its own mapper to the rest of the name, as vLLM's loaders do.
    """
    module, rest = model, tensor
    path: list[str] = []
    shard: Any = None
    while True:
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        if mapper is not None and hasattr(module, "load_weights"):
            mapped = mapper._map_name_with_shard(rest)
            if mapped is None:
                return None
            rest, new = mapped
            shard = shard if new is None else new
        # On to the next module that has a mapper, or to the end of the name.
        while "." in rest:
            head, _, tail = rest.partition(".")
            child = module._modules.get(head)
            if child is None:
                return Place(tuple(path), rest, shard)
            path.append(head)
            if type(child).__name__ in PLACEHOLDER_MODULES:
                return None
            module, rest = child, tail
            if hasattr(module, "hf_to_vllm_mapper") and hasattr(module, "load_weights"):
                break
        else:
            return Place(tuple(path), "", shard)


def destinations(model: torch.nn.Module, name: str) -> list[tuple[str, ShardId]] | None:
    """(path of a module, shard) of each place that vLLM loads the checkpoint's linear `name` to, by its own mappers.

    Returns:
        Empty if the path leads nowhere; None if this process does not use it, see `place_of`.
    """
    place = place_of(model, f"{name}.weight")
    if place is None:
        return None
    if place.rest:
        return []
    return [(".".join(place.path), one) for one in (place.shard if isinstance(place.shard, list) else [place.shard])]
