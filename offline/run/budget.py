"""A budget: which sublayers stay dense, so that the model loses no more than it may (`--max-loss`), or is as fast as it
should be and loses as little as that allows (`--min-speed`).

While everything is pruned, the held-out samples also go through the dense model with a single pruned sublayer, for each
one. So it is known what each loses by itself. Sublayers are then taken in the order of loss for each weight, which is
that of loss for each second: the most whose loss the model can bear, as a bisection measures it, or the fewest that
make it fast enough by the estimate of `ria-vllm plan`. These are pruned once more, in a run of their own, which makes
up for what they lose and for no more. If the result loses more than it may, that happens again with fewer, once.

Sublayers are taken as a whole, because permutations fold, scales migrate and weights are trained inside of them.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.offline.calibration.activations import Activations
from ria_vllm.offline.experts.plan import experts_to_prune
from ria_vllm.offline.model.run.architecture import output_head
from ria_vllm.offline.model.run.embedding import Embedder
from ria_vllm.offline.model.run.sharing import find_sharing
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.model.topology import Topologies, Unit
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.held_out import held_out_loss
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.offline.run.plan import Plan, make_plan
from ria_vllm.speed import measured_here, steps

TEXT = 8  # tokens with which layers are called, to see what they are passed
USERS = 1  # at once, of whom `--min-speed` speaks


def check_budget(model: StreamedModel, recipe: Recipe) -> None:
    """Refuse a model for which this does not work, before hours of work.

    Raises:
        RiaError: such a model.
    """
    reason = None
    if any(experts_to_prune(model, index, recipe) for index in range(len(model.layers))):
        reason = "layers with experts have to be pruned alike"
    elif output_head(model.model) is None:
        reason = "this model predicts no tokens, so what is lost cannot be measured"
    elif _reads_more(model):
        reason = "layers of this model read what others have left, or the text itself"
    elif recipe.min_speed and (recipe.pattern != TWO_OF_FOUR or _instructions(model, recipe) is None):
        reason = f"how fast {recipe.pattern} is in {recipe.scheme} on this {model.device.type} was not measured"
    if reason:
        raise RiaError(f"{recipe.budget}: {reason}. Leave it out; --ignore keeps linears dense.")


def check_reachable(layers: LayerPass, plan: Plan) -> None:
    """Refuse a speed that the model does not have with everything pruned.

    Raises:
        RiaError: it is slower.
    """
    least = layers.recipe.min_speed
    if least is not None and (most := speed(layers, plan, None)) < least:
        raise RiaError(
            f"--min-speed {least:g}: with everything pruned, a step of decoding is {most:.2f} times as fast as with "
            f"everything dense in {layers.recipe.scheme}, estimated for {USERS} user. Ask for less."
        )


def speed(layers: LayerPass, plan: Plan, units: frozenset[Unit] | None) -> float:
    """How many times as fast a step of decoding is with these sublayers pruned (None: all) as with everything dense as
    the scheme stores what stays dense, estimated.

    Args:
        plan: of what is pruned if everything is.
    """
    model, recipe = layers.model, layers.recipe
    plan = make_plan(model, layers.topologies, recipe, plan.kept, units)
    sizes = forecast.sizes_of(model, plan, recipe)[0]
    instructions = _instructions(model, recipe)
    dense, pruned = (
        steps(one, instructions, USERS)[recipe.scheme] for one in (sizes.unpruned(recipe.has_integers), sizes)
    )
    return dense / pruned


def _instructions(model: StreamedModel, recipe: Recipe) -> str | None:
    return measured_here(recipe.scheme, recipe.pattern, model.stored_dtype, model.device)


def _reads_more(model: StreamedModel) -> bool:
    """Whether layers read something of a text besides the residual stream."""
    embedder, text = Embedder(model), torch.arange(TEXT)[None]
    embedder.learn_form(text)
    embedder.learn_varying(text, text.flip(1))
    stream, calls = embedder(text)
    embedder.close()
    return any(call.varying for call in calls) or any(find_sharing(model.layers, calls, stream).read)


def spend(layers: LayerPass, plan: Plan, finished: Callable[[int], Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Find out what to leave dense.

    Args:
        layers: through which everything was pruned, with `alone`.
        plan: what was pruned.
        finished: layer -> the parameters that pruning has changed, as they are written.

    Returns:
        As JSON: "pruned", the chosen units; "sublayers" and "measured", for the report, and for `--min-speed` "speed".

    Raises:
        RiaError: every sublayer loses more than `--max-loss`, or the loss cannot be measured.
    """
    model, alone, recipe = layers.model, layers.alone, layers.recipe
    assert alone is not None

    def measure(stream: Activations, held_out: int) -> dict[str, Any]:
        streams, tokens = replace(layers.streams, pruned=stream, held_out=held_out), layers.embedded.held_out
        found = held_out_loss(model, streams, tokens[-held_out:], layers.monitor)
        if found is None:
            raise RiaError(f"{recipe.budget}: the loss of this model cannot be measured. Leave the option out.")
        return found

    def with_pruned(units: frozenset[Unit]) -> dict[str, Any]:
        stream = alone.start.copy()
        layers.mixed(stream, finished, plan, units)
        return measure(stream, layers.streams.held_out)

    with layers.monitor.phase(str(recipe.budget)):
        sizes = {unit: _pruned_weights(model, unit, layers.topologies, plan) for unit in alone.found}
        weights = {unit: size for unit, size in sizes.items() if size}
        losses = {unit: measure(alone.found[unit], alone.streams.held_out) for unit in weights}
        if recipe.max_loss is not None:
            choice = choose(losses, weights, with_pruned, recipe.max_loss)
        else:
            assert recipe.min_speed is not None
            choice = reach(losses, weights, with_pruned, lambda units: speed(layers, plan, units), recipe.min_speed)
    if not choice.pruned and not recipe.has_integers:
        least = choice.measured[1]["perplexity"] / choice.measured[1]["perplexity_dense"] - 1
        raise RiaError(f"--max-loss: every sublayer loses more; the one that costs least, {least:.1%}. Allow more.")
    found, why = {}, "the others would lose too much"
    if recipe.min_speed is not None:
        found["speed"] = round(speed(layers, plan, choice.pruned), 3)
        why = f"a step of decoding is {found['speed']} times as fast, estimated for {USERS} user"
    layers.monitor.say(f"{recipe.budget}: {len(choice.pruned)} of {len(losses)} sublayers are pruned; {why}")
    sublayers = {
        _named(model, unit): {
            "kl": losses[unit]["kl"], "weights": weights[unit], "pruned": unit in choice.pruned,
        }
        for unit in losses
    }  # fmt: skip
    return {"pruned": sorted(choice.pruned), "sublayers": sublayers, "measured": choice.measured} | found


def corrected(
    model: StreamedModel, recipe: Recipe, record: Mapping[str, Any], loss: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What to choose instead if the result loses more than `--max-loss`: without the last sublayers in the order, as if
    the loss were in proportion to the sum of what each loses by itself. None: it does not, or this is the second.

    Args:
        record: as `spend` returns it.
        loss: of the result, as `held_out_loss` returns it.

    Returns:
        The record with other sublayers, and with "corrected", what was lost.
    """
    assert recipe.max_loss is not None
    lost = loss["perplexity"] / loss["perplexity_dense"] - 1
    if "corrected" in record or lost <= recipe.max_loss:
        return None
    found = {(index, name): record["sublayers"][_named(model, (index, name))] for index, name in record["pruned"]}
    order = _in_order(found, {unit: one["weights"] for unit, one in found.items()})
    share, least = math.log1p(recipe.max_loss) / math.log1p(lost), 0 if recipe.has_integers else 1
    bearable = share * sum(one["kl"] for one in found.values())
    while len(order) > least and sum(found[unit]["kl"] for unit in order) > bearable:
        order.pop()
    if len(order) == len(found):
        return None
    left = {_named(model, unit): found[unit] | {"pruned": False} for unit in found.keys() - set(order)}
    return {**record, "pruned": sorted(order), "sublayers": record["sublayers"] | left, "corrected": round(lost, 6)}


def _named(model: StreamedModel, unit: Unit) -> str:
    return f"{model.layer_prefix(unit[0])}{unit[1]}"


def _pruned_weights(model: StreamedModel, unit: Unit, topologies: Topologies, plan: Plan) -> int:
    index, name = unit
    (sublayer,) = [one for one in topologies.of(index).sublayers if one.name == name]
    names = plan.pruned[index].intersection(sublayer.linears)
    return sum(model.layers[index].get_submodule(linear).weight.numel() for linear in names)


@dataclass(frozen=True)
class Choice:
    """What a budget buys.

    pruned: the sublayers that are pruned; all others stay dense.
    measured: how many are pruned -> perplexity and KL of the model.
    """

    pruned: frozenset[Unit]
    measured: Mapping[int, Mapping[str, Any]]


def choose(
    alone: Mapping[Unit, Mapping[str, Any]],
    weights: Mapping[Unit, int],
    measure: Callable[[frozenset[Unit]], Mapping[str, Any]],
    max_loss: float,
) -> Choice:
    """The most sublayers whose pruning multiplies the dense model's perplexity by at most 1 + `max_loss`.

    Args:
        alone: sublayer -> the loss of the model with only this one pruned.
        weights: how many are pruned: a step of decoding takes as long as it takes to read them.
        measure: the loss of the model with these pruned, as `held_out_loss` returns it.
    """
    order = _in_order(alone, weights)
    measured: dict[int, Mapping[str, Any]] = {}
    most, too_many = 0, len(order) + 1
    count = len(order)
    while most + 1 < too_many:
        found = measured[count] = measure(frozenset(order[:count]))
        if found["perplexity"] <= found["perplexity_dense"] * (1 + max_loss):
            most = count
        else:
            too_many = count
        count = (most + too_many) // 2
    return Choice(frozenset(order[:most]), measured)


def reach(
    alone: Mapping[Unit, Mapping[str, Any]],
    weights: Mapping[Unit, int],
    measure: Callable[[frozenset[Unit]], Mapping[str, Any]],
    speed_of: Callable[[frozenset[Unit]], float],
    min_speed: float,
) -> Choice:
    """The fewest sublayers whose pruning makes the model `min_speed` times as fast. All of them do.

    Args:
        alone, weights, measure: as in `choose`.
        speed_of: how many times as fast the model is with these pruned.
    """
    order = _in_order(alone, weights)
    counts, most = range(len(order) + 1), len(order)
    count = bisect_left(counts, min_speed, lo=1, hi=most, key=lambda number: speed_of(frozenset(order[:number])))
    pruned = frozenset(order[:count])
    return Choice(pruned, {count: measure(pruned)})


def _in_order(alone: Mapping[Unit, Mapping[str, Any]], weights: Mapping[Unit, int]) -> list[Unit]:
    return sorted(alone, key=lambda unit: (alone[unit]["kl"] / weights[unit], unit))
