"""Block reconstruction of one sublayer: train the weights that its masks keep, and then round them, if their format
has fewer bits.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from ria_vllm.format.formats import RoundedFormat
from ria_vllm.offline.calibration.activations import OnDemand
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.topology import Group
from ria_vllm.offline.pruning.admm import output_error
from ria_vllm.offline.pruning.block import LR, Training, error, train_block
from ria_vllm.offline.pruning.rounding import Objective, round_on_mask
from ria_vllm.offline.pruning.symmetric import SymmetricMatrix
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import MAPPED_BLOCK, blocks_kept, trim
from ria_vllm.offline.sublayer.pruned_linear import Pruned, stored_weight
from ria_vllm.offline.sublayer.smoothing import Smoother, set_parameter


def train_sublayer(
    sublayer_pass: SublayerPass, pruned: Mapping[str, Pruned], recipe: Recipe, share: float = 1.0
) -> dict[str, Pruned]:
    """Train the pruned linears of a sublayer towards the dense stream after it.

    Args:
        sublayer_pass: with the pruned weights in place, the pruned stream before it and the dense stream after it.
        pruned: name relative to the layer -> pruned linear whose weight is not rounded.
        share: the sublayer's weights divided by those of the layer's largest sublayer.

    Returns:
        The same linears, see `after_training`; their weights are also in the layer.
    """
    runner, streams, dense = sublayer_pass.runner, sublayer_pass.streams, sublayer_pass.streams.dense
    assert dense is not None
    # Models keep some parameters in float32, whatever the others are in: routers, for example.
    dtypes = {parameter: parameter.dtype for parameter in runner.layer.parameters()}
    # Linears are multiplied in the dtype that they are trained in; everything else computes in float32.
    others = [module for module in runner.layer.modules() if not isinstance(module, nn.Linear)]
    for parameter in (p for module in others for p in module.parameters(recurse=False)):
        parameter.data = parameter.data.float()
    chunks = recipe.schedule.chunks(len(streams.fitted), share)
    goals = OnDemand(chunks, lambda index: dense[index].to(runner.device, torch.float32))
    channels = channel_weights(goals, sublayer_pass.gains)
    trim()
    weights = {name: runner.linear(name).weight for name in pruned}
    before = {name: linear.weight[linear.mask] for name, linear in pruned.items()}  # to go back: half of a copy
    # Kept blocks lie apart, which takes memory. Only a small layer's, whose steps are short, are worth it.
    small = max(weight.nbytes for weight in weights.values()) < MAPPED_BLOCK
    kept = blocks_kept() if small else nullcontext()
    training = Training(
        passes=recipe.schedule.passes(len(chunks), share),
        lr=LR * recipe.schedule.rate(share),
        seed=recipe.seed,
        dtype=recipe.matmul_dtype,
        channels=channels,
    )
    with sublayer_pass.monitor.phase("block training"), kept, torch.enable_grad():
        losses = train_block(
            runner.run,
            weights,
            lambda name: pruned[name].mask.to(runner.device),
            OnDemand(chunks, sublayer_pass.input_and_call),
            goals,
            training,
            partial(_held_out_loss, sublayer_pass, training),
        )
    trained = {}
    for name, linear in pruned.items():
        module = runner.linear(name)
        trained[name] = after_training(linear, module.weight.data, losses)
        if not trained[name].record["trained"]:
            # The layer may have had the same tensor, which training then changed.
            trained[name].weight[linear.mask] = before[name]
        module.weight.data = trained[name].weight.to(runner.device, dtypes[module.weight])
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return trained


def _held_out_loss(sublayer_pass: SublayerPass, training: Training) -> float:
    """The loss of the sublayer as it is now, on the held-out chunks."""
    total = torch.zeros(2, dtype=torch.float64)
    with sublayer_pass.monitor.phase("held-out samples"):
        for stream, call, target in sublayer_pass.held_out():
            loss = error(sublayer_pass.runner.run, (stream, call), target, training)
            tokens = target.numel() // target.shape[-1]
            total += torch.tensor([float(loss) * tokens, tokens], dtype=torch.float64)
    return float(total[0] / total[1])


def channel_weights(targets: Sequence[torch.Tensor], gains: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What squared errors in the channels of the residual stream count: [hidden] float32; None: all the same.

    Errors count as the norms that read the stream see them. A few channels can be hundreds of times larger than the
    others (4 of 640 hold 97% of Gemma 3's stream). Norms have small gains for these, so an error relative to the stream
    as it is says little about what later layers read.

    Args:
        targets: chunks of the dense stream [..., hidden]; each token counts the same.
        gains: of the norms, [hidden] each; each norm counts the same. None: the stream is measured as it is.
    """
    if not gains:
        return None
    energy = torch.zeros(targets[0].shape[-1], dtype=torch.float64, device=targets[0].device)
    for target in targets:
        energy += functional.normalize(target.float().flatten(0, -2), dim=-1).square().sum(0)
    squares = [gain.double().square() for gain in gains]
    total = sum(square / (square * energy).sum().clamp(min=1e-12) for square in squares)
    return (total / total.mean()).float()


def after_training(linear: Pruned, weight: torch.Tensor, losses: tuple[float, float] | None) -> Pruned:
    """The linear with its trained weight [out, in], or as it was if the loss did not fall.

    Steps can be too long for a model.

    Args:
        losses: before and after; None if training diverged.
    """
    better = losses is not None and losses[1] < losses[0]
    found = replace(linear, record=linear.record | {"block_loss": losses and list(losses), "trained": better})
    return replace(found, weight=weight.to(linear.weight.dtype).cpu()) if better else found


def smooth_sublayer(
    sublayer_pass: SublayerPass, pruned: Mapping[str, Pruned], stages: Sequence[Sequence[Group]], smoother: Smoother
) -> dict[str, Pruned]:
    """Migrate scales of what the trained linears of a sublayer read, stage by stage; its function stays the same.

    Training is that of weights that are not rounded, then, whatever the scales.

    Args:
        sublayer_pass: with the trained weights in place.
        pruned: name relative to the layer -> linear whose weight is not rounded.
        stages: of the sublayer, with only the linears that are pruned.

    Returns:
        The same linears; the layer has their weights.
    """
    smoothed = dict(pruned)
    for number, stage in enumerate(stages):
        groups = [group for group in stage if group.linears]
        if not groups:
            continue
        dense = [name for name, linear in smoothed.items() if linear.is_dense]
        read = sublayer_pass.statistics(number, groups, with_gram=False, with_drift=False, rounded=dense)
        trim()
        statistics = {name: one for group, one in zip(groups, read, strict=True) for name in group.linears}
        weights = {name: sublayer_pass.runner.linear(name).weight.data for name in statistics}
        smoother.scale(groups, statistics, weights, smoothed)
        found = {name: replace(smoothed[name], weight=w.to(smoothed[name].weight)) for name, w in weights.items()}
        for name, linear in found.items():
            set_parameter(sublayer_pass.runner.layer, f"{name}.weight", linear.weight)
        smoother.apply(found, smoothed)
        smoothed |= found
    return smoothed


def round_sublayer(
    sublayer_pass: SublayerPass,
    pruned: Mapping[str, Pruned],
    stages: Sequence[Sequence[Group]],
    scales: Mapping[str, torch.Tensor],
    recipe: Recipe,
    dtype: torch.dtype,
) -> dict[str, Pruned]:
    """Round the trained linears of a sublayer to the recipe's format, so that each outputs what it did before.

    They are taken stage by stage: what a linear reads has been rounded already.

    Args:
        sublayer_pass: with the trained weights in place.
        pruned: name relative to the layer -> linear whose weight is not rounded.
        stages: of the sublayer, with only the linears that are pruned.
        scales: linear -> [in], by which what it reads was divided; without those that read their input as it was.
        dtype: of the result, the checkpoint's.

    Returns:
        The same linears. The records of pruned ones say how much the rounding changed the output: `rounding_error`,
        relative as `error_after` is. The layer has their weights; or the exact ones, and so have they, if the recipe
        continues with those.
    """
    runner = sublayer_pass.runner
    rounded: dict[str, Pruned] = {}
    for number, stage in enumerate(stages):
        groups = [group for group in stage if group.linears]
        names = [name for group in groups for name in group.linears]
        groups = [group for group in groups if not all(pruned[name].is_dense for name in group.linears)]
        found = sublayer_pass.statistics(number, groups, with_gram=True, with_drift=False) if groups else []
        trim()
        grams = {name: read.gram for group, read in zip(groups, found, strict=True) for name in group.linears}
        for name in names:
            with sublayer_pass.monitor.phase("masks and weights"):
                linear = _rounded(pruned[name], grams.get(name), scales.get(name), recipe, dtype, runner.device)
            rounded[name] = linear
            set_parameter(runner.layer, f"{name}.weight", linear.weight)
        del found, grams
        trim()
    if recipe.continues_exactly:
        for name, linear in pruned.items():
            rounded[name] = replace(rounded[name], exact=linear.weight[linear.mask])
            set_parameter(runner.layer, f"{name}.weight", linear.weight)
    return rounded


def _rounded(
    linear: Pruned,
    gram: SymmetricMatrix | None,
    divided_by: torch.Tensor | None,
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
) -> Pruned:
    exact, p = linear.weight.to(device), None if linear.p is None else linear.p.to(device)
    if linear.is_dense:
        W, scale = stored_weight(exact, None, dtype, recipe.of_dense)
        return replace(linear, weight=W, scale=scale)
    weight_format = recipe.weight_format
    assert isinstance(weight_format, RoundedFormat) and gram is not None
    start = exact.to(torch.float32, copy=True)  # whose memory the result takes
    mask = linear.mask.to(device)
    if "kept" in linear.record:  # zeros stay, see `solve`
        mask &= exact != 0
    W, scale = round_on_mask(exact, start, mask, Objective(gram, divided_by=divided_by), weight_format, p)
    W, scale = stored_weight(W, linear.p, dtype, recipe, scale)
    error = output_error(exact, W.to(device), gram)
    return replace(linear, weight=W, scale=scale, record=linear.record | {"rounding_error": error})
