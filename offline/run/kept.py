"""Finds out which linears of a model have the pattern already, as recovered models do."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.pattern import PATTERNS, Pattern
from ria_vllm.offline.experts.plan import experts_to_prune
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run.plan import Kept, linears_to_prune
from ria_vllm.progress import Monitor

LEAST_SHARE = 1 / 4
FIRST_ROWS = 64  # are read first: they tell that a linear is dense


def find_kept(model: StreamedModel, recipe: Recipe, monitor: Monitor) -> Kept:
    """Look at the weights of all linears that may be pruned.

    A linear fits if no group of consecutive input channels, in the model's own order, has more values other than zero
    in any row than the pattern keeps. That proves something only if at least LEAST_SHARE of what the pattern can keep
    is not zero: a linear of zeros, or nearly so, fits any pattern. If some linear proves that the model was pruned, all
    that fit are kept; else it is a dense model. The experts of a module fit if all of their linears do.

    Raises:
        RiaError: none fits, but some linear has a wider pattern, unless the recipe prunes the rest.
    """
    fitting: dict[int, frozenset[str]] = {}
    left: dict[int, frozenset[str]] = {}
    wider: tuple[str, Pattern] | None = None
    proved, total = False, len(model.layers)
    for index in monitor.steps(range(total), "looking for zeros", total):
        weights = {name: _linear(model, index, name) for name in linears_to_prune(model, index, recipe)}
        weights |= {path: _experts(model, index, path) for path in experts_to_prune(model, index, recipe)}
        shares = {name: _share(parts, recipe.pattern) for name, parts in weights.items()}
        fitting[index] = frozenset(name for name, share in shares.items() if share is not None)
        left[index] = frozenset(shares) - fitting[index]
        proved |= any(share is not None and share >= LEAST_SHARE for share in shares.values())
        if wider is None and not proved and not recipe.prune_rest:
            wider = _wider(model, index, left[index], recipe.pattern)
    if wider is not None and not proved:
        name, pattern = wider
        raise RiaError(
            f"{name}: is {pattern} already, but not {recipe.pattern}. --pattern {pattern} keeps the zeros of this "
            f"model; --prune-rest prunes it to {recipe.pattern}."
        )
    return Kept(fitting, left) if proved else Kept()


def _wider(model: StreamedModel, index: int, names: Iterable[str], kept: Pattern) -> tuple[str, Pattern] | None:
    """The written name of a linear of a layer, or the path of experts, among `names` that has a wider pattern, and
    this pattern; None if there is none."""
    for name, pattern in product(sorted(names), PATTERNS.values()):
        is_linear = name not in model.experts[index]
        weights = _linear(model, index, name) if is_linear else _experts(model, index, name)
        share = _share(weights, pattern) if pattern.of > kept.of else None
        if share is not None and share >= LEAST_SHARE:
            return model.written_linear(index, name) if is_linear else model.layer_prefix(index) + name, pattern
    return None


def keeping(recipe: Recipe, kept: Kept, monitor: Monitor) -> Recipe:
    """The recipe for a model with these linears, and what the user is told about them.

    Raises:
        RiaError: a budget for a model that has the pattern already.
    """
    count, left = (sum(map(len, of.values())) for of in (kept.names, kept.left))
    if not count:
        if recipe.prune_rest:
            monitor.warn(f"--prune-rest: no linear is {recipe.pattern} already, so all are pruned as usual.")
        return replace(recipe, prune_rest=False)
    found = f"{count} of {count + left} linears"
    if recipe.budget is not None:
        way = "Leave it out; --ignore keeps linears dense."
        raise RiaError(f"{recipe.budget}: {found} are {recipe.pattern} already. {way}")
    monitor.say(f"{found} are {recipe.pattern} already: their zeros stay, nothing of them is searched or trained")
    if left and recipe.prune_rest:
        monitor.say(f"{left} are not, and are pruned (--prune-rest)")
        return recipe
    adapted = recipe.keeping()
    if not adapted.reads_text:
        monitor.say("no calibration text is read: nothing depends on it")
    return adapted


def _share(weights: Iterable[torch.Tensor], pattern: Pattern) -> float | None:
    """The values that are not zero, in those that the pattern can keep; None if some matrix does not fit."""
    values = size = 0
    for weight in weights:
        if sparse24.bitmask_of(weight, pattern) is None:
            return None
        values += int(weight.count_nonzero())
        size += weight.numel()
    return values / (0.5 * size)


def _linear(model: StreamedModel, index: int, name: str) -> Iterator[torch.Tensor]:
    weight = f"{model.written_linear(index, name)}.weight"
    if weight not in model.tensors.quantized:
        yield model.tensors.read(weight, slice(FIRST_ROWS))
    yield model.tensors.read(weight)


def _experts(model: StreamedModel, index: int, path: str) -> Iterator[torch.Tensor]:
    weights = model.from_files(index, path)
    for expert in range(model.experts[index][path].layout.num_experts):
        yield from weights(expert).values()
