"""A decoder layer in the work folder, and what is read back from it."""

from types import SimpleNamespace

import pytest
import torch

from ria_vllm.format import sparse24
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.stored_layers import layer_tensors, pruned_weights
from ria_vllm.offline.sublayer.pruned_linear import Pruned, packed, stored_weight

NAME = "layers.0.q_proj"


@pytest.fixture(params=["float", "int8", "int4-32", "int8-64"])
def recipe(request):
    weights, _, size = request.param.partition("-")
    return Recipe(weights=weights, group_size=int(size) if size else None)


@pytest.mark.parametrize("permuted", [False, True])
def test_a_pruned_weight_is_read_back_as_it_was_stored(permuted, recipe):
    """Also if scales belong to groups of columns in the stored order."""
    draw = torch.Generator().manual_seed(0)
    spread, limit = (2, 2) if getattr(recipe.weight_format, "largest_multiple", None) is None else (0.4, 4)
    stored = torch.randn(24, 192, generator=draw) * torch.logspace(-spread, spread, 192)  # by groups, different scales
    mask = sparse24.mask_from_bitmask(sparse24.compress(stored)[1])
    stored = stored * mask
    p = torch.randperm(192, generator=draw) if permuted else None
    back = slice(None) if p is None else p.argsort()
    weight, scale = stored_weight(stored[:, back], p, torch.float32, recipe)
    pruned = Pruned(weight, packed(mask[:, back]), p, {}, scale)
    model = SimpleNamespace(names_in_layer=lambda index: [f"{NAME}.weight"])

    tensors = layer_tensors(model, 0, {NAME: pruned}, recipe)
    assert torch.equal(pruned_weights(tensors, [NAME], torch.float32, recipe)[NAME], weight)
    # No group loses much more than with a scale of its own; with another's it would lose far more.
    if recipe.weights == "float":
        assert torch.equal(weight, stored[:, back])
        return
    size, again = (-1, recipe.weight_format.group_size or 192), weight if p is None else weight[:, p]
    groups, found = stored.unflatten(1, size), again.unflatten(1, size)
    step = groups.abs().amax(-1, keepdim=True) / recipe.weight_format.largest
    plain = (groups / step).round() * step
    lost, plainly = ((x - groups).square().sum(-1) for x in (found, plain))
    assert (lost <= limit * plainly).all()
