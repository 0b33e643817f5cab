"""One pass over the decoder layers: the embedded calibration tokens go in, pruned layers come out one by one."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ria_vllm.format.token_rounding import FP8_DTYPE, round_tokens
from ria_vllm.offline.calibration.activations import Activations
from ria_vllm.offline.calibration.arguments import Arguments
from ria_vllm.offline.calibration.embed import embed
from ria_vllm.offline.calibration.statistics import Statistics
from ria_vllm.offline.calibration.sublayer import SublayerRunner
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.experts.layer import ExpertsPass
from ria_vllm.offline.experts.prune import shared_permutation
from ria_vllm.offline.experts.routing import Reads
from ria_vllm.offline.experts.store import ExpertStore, RoutedExperts
from ria_vllm.offline.model.experiments.norms import gains_of
from ria_vllm.offline.model.topology import Group, Topologies, Unit
from ria_vllm.offline.run.alone import EachAlone
from ria_vllm.offline.run.plan import Plan
from ria_vllm.offline.runtime.memory import trim
from ria_vllm.offline.sublayer.pruned_linear import Pruned, stored_weight
from ria_vllm.offline.sublayer.rotating import Rotator
from ria_vllm.offline.sublayer.smoothing import Smoother, set_parameter
from ria_vllm.offline.sublayer.solve import ToPrune, find_permutations, solve
from ria_vllm.offline.sublayer.train import round_sublayer, smooth_sublayer, train_sublayer
from ria_vllm.progress import Monitor


class LayerPass:
    """Takes the calibration activations through the layers, from the first one on.

    Args:
        store: where pruned experts are kept, of the model, by the recipe.
        tokens: int64 [samples, seq_len].
        topologies: found by the interrupted run that is resumed; None: they are found now.

    Raises:
        RiaError: a model whose layers cannot be run one by one.
    """

    def __init__(
        self, store: ExpertStore, tokens: torch.Tensor, monitor: Monitor, topologies: Topologies | None = None
    ):
        self.store, self.model, self.recipe, self.monitor = store, store.model, store.recipe, monitor
        self.embedded = embed(self.model, self.recipe, tokens, monitor, topologies, self.recipe.held_out)
        self.topologies, self.streams = self.embedded.topologies, self.embedded.streams
        self.experts = ExpertsPass(store, self.streams, monitor)
        self.alone: EachAlone | None = None

    def prune(self, index: int, plan: Plan) -> tuple[dict[str, Pruned], dict[str, torch.Tensor]]:
        """Prune layer `index`, and take the activations through it: the held-out ones only, if no later one is pruned.

        Returns:
            (written name -> pruned linear, without the experts: these are in the store; written name of another tensor
            -> what has to be written instead of the source's).
        """
        pruned: dict[str, Pruned] = {}
        changed: dict[str, torch.Tensor] = {}
        if index > plan.last:
            self.model.check_layer(index)
            self.replay(index, {}, chunks=self.streams.measured)
            return pruned, changed
        sublayer_passes = self._load(index)
        recipe, topology = self.recipe, self.topologies.of(index)
        strength, rotates = recipe.migration_strength, recipe.rotates_heads
        smoother = Smoother(self.model, index, topology, strength, changed) if strength else None
        free = plan.pruned[index] - plan.kept.names.get(index, frozenset())
        rotator = Rotator(self.model, index, topology, free, recipe, changed) if rotates else None
        with self.experts.removed_after_layer():
            for sublayer_pass in sublayer_passes:
                pruned |= self._prune_sublayer(index, sublayer_pass, plan, smoother, rotator)
                is_last = index == plan.last and sublayer_pass is sublayer_passes[-1]
                sublayer_pass.advance(self.streams.pruned, self.streams.measured if is_last else None)
        self._free(index)
        prefix, direct = self.model.layer_prefix(index), self.model.names.direct
        written = {self.model.written_linear(index, name): linear for name, linear in pruned.items()}
        return written, {direct[prefix + name]: tensor for name, tensor in changed.items()}

    def replay(
        self,
        index: int,
        parameters: Mapping[str, torch.Tensor],
        experts: Iterable[str] = (),
        chunks: range | None = None,
    ) -> None:
        """Take the activations through a layer that was pruned earlier, or that stays dense.

        Args:
            parameters: name relative to the layer -> what pruning has made of it.
            experts: paths of the experts that were pruned.
            chunks: only these; None: all.
        """
        if chunks is not None and not chunks and self.alone is None:
            return
        sublayer_passes, layer = self._load(index), self.model.layers[index]
        own = {name: layer.get_parameter(name).data for name in parameters if self.alone is not None}
        if self.streams.dense is not None:
            for sublayer_pass in sublayer_passes:
                self._advance_dense(sublayer_pass, chunks)
                if self.alone is not None and parameters:
                    _set_parameters(layer, parameters)
                    self.alone.pass_pruned((index, sublayer_pass.runner.sublayer.name), sublayer_pass)
                    _set_parameters(layer, own)
        _set_parameters(layer, parameters)
        for path in experts:
            self.experts.use_pruned(index, path)
        for sublayer_pass in sublayer_passes:
            sublayer_pass.advance(self.streams.pruned, chunks)
        self._free(index)

    def mixed(
        self,
        stream: Activations,
        parameters: Callable[[int], Mapping[str, torch.Tensor]],
        plan: Plan,
        finished: Collection[Unit] | None = None,
    ) -> None:
        """Take the held-out chunks of a stream through all layers, some of whose sublayers are finished.

        Those are as they are served. Of the others only the weights are rounded: inputs are after their scales have
        migrated.

        Args:
            parameters: of a layer, by their names relative to it, as they are written.
            plan: of what they are.
            finished: None: all sublayers.
        """
        for index in range(len(self.model.layers)):
            sublayer_passes, layer = self._load(index), self.model.layers[index]
            found = parameters(index) if finished is None or any(unit[0] == index for unit in finished) else {}
            own = {name: layer.get_parameter(name).data for name in found}
            for sublayer_pass in sublayer_passes:
                sublayer = sublayer_pass.runner.sublayer
                linears = plan.changed(index).intersection(sublayer.linears)
                inputs: AbstractContextManager[None] = nullcontext()
                if finished is None or (index, sublayer.name) in finished:
                    _set_parameters(layer, found)
                    inputs = _rounded_inputs(layer, linears, self.recipe.activations)
                else:
                    _set_parameters(layer, own)
                    _set_parameters(layer, self._rounded(layer, linears))
                with inputs:
                    for chunk in self.streams.measured:
                        stream[chunk] = sublayer_pass.run(stream, chunk)
            self._free(index)

    def _rounded(self, layer: nn.Module, linears: Iterable[str]) -> dict[str, torch.Tensor]:
        """The weights of dense linears, as they are written if they stay dense; empty if that is as they are."""
        recipe, dtype = self.recipe.of_dense, self.model.stored_dtype
        names = linears if recipe.has_integers else ()
        return {f"{n}.weight": stored_weight(layer.get_submodule(n).weight.data, None, dtype, recipe)[0] for n in names}

    def _advance_dense(self, sublayer_pass: SublayerPass, chunks: range | None = None) -> None:
        assert self.streams.dense is not None
        if self.alone is not None:
            self.alone.pass_dense(sublayer_pass)
        sublayer_pass.advance(self.streams.dense, chunks)

    def _free(self, index: int) -> None:
        self.model.free_layer(index)
        self.embedded.arguments.free(index)
        self.store.forget_dense()

    def _load(self, index: int) -> list[SublayerPass]:
        """Load a layer; a pass for each of its sublayers, in order."""
        layer, arguments = self.model.load_layer(index), Arguments(self.embedded.arguments, index)
        place, topology = partial(self._place, index), self.topologies.of(index)
        gains = [gains_of(layer.get_submodule(name), self.model.dtype).float() for name in topology.norms]
        return [
            SublayerPass(runner, arguments, self.streams, self.monitor, place, gains)
            for runner in (SublayerRunner(layer, sublayer, self.model.dtype) for sublayer in topology.sublayers)
        ]

    def _prune_sublayer(
        self,
        index: int,
        sublayer_pass: SublayerPass,
        plan: Plan,
        smoother: Smoother | None,
        rotator: Rotator | None,
    ) -> dict[str, Pruned]:
        """Prune one stage after the other, so that each sees what those before it produce. Then train if asked, and
        round what was trained."""
        if rotator is not None:
            rotator.rotate(sublayer_pass)
        recipe, kept = self.recipe.before_rounding, plan.kept.names.get(index, frozenset())
        pruned: dict[str, Pruned] = {}
        stages = [plan.groups(index, stage) for stage in sublayer_pass.stages]
        undone = nullcontext if rotator is None else rotator.undone
        with undone():
            paths = [group.experts for groups in stages for group in groups if group.experts]
            dense = self.experts.dense_reads(index, sublayer_pass, paths)
        if not stages and self.streams.dense is not None:
            self._advance_dense(sublayer_pass)
        for number, groups in enumerate(stages):
            scale = partial(smoother.scale, pruned=pruned) if smoother is not None and not recipe.trains else None
            found = self._solve_stage(index, sublayer_pass, number, plan, dense, scale)
            if number == 0 and self.streams.dense is not None:  # while the whole sublayer is still dense
                with undone():
                    self._advance_dense(sublayer_pass)
            if rotator is not None:
                rotator.forget()
            for name, linear in found.items():
                if rotator is not None and name in rotator.rotated:
                    linear.record["rotated"] = True
                set_parameter(sublayer_pass.runner.layer, f"{name}.weight", linear.weight)
            if smoother is not None and not recipe.trains:
                smoother.apply(found, pruned)
            for group in groups:
                if group.experts:
                    self.experts.use_pruned(index, group.experts)
            pruned |= found
        if recipe.trains and pruned:
            free = {name: linear for name, linear in pruned.items() if name not in kept and not linear.is_dense}
            if free:
                pruned |= train_sublayer(sublayer_pass, free, recipe, self._share(index, sublayer_pass))
            if self.recipe.weights != "float":
                if smoother is not None:
                    pruned = smooth_sublayer(sublayer_pass, pruned, stages, smoother)
                scales = {} if smoother is None else smoother.scales
                pruned = round_sublayer(sublayer_pass, pruned, stages, scales, self.recipe, self.model.stored_dtype)
        if self.alone is not None and pruned:
            self.alone.pass_pruned((index, sublayer_pass.runner.sublayer.name), sublayer_pass)
        return pruned

    def _share(self, index: int, sublayer_pass: SublayerPass) -> float:
        """The weights of a sublayer's linears divided by those of the layer's largest sublayer; without experts."""
        runner = sublayer_pass.runner
        sizes = {
            sublayer.name: sum(runner.linear(name).weight.numel() for name in sublayer.linears)
            for sublayer in self.topologies.of(index).sublayers
        }
        return sizes[runner.sublayer.name] / max(sizes.values())

    def _solve_stage(
        self,
        index: int,
        sublayer_pass: SublayerPass,
        number: int,
        plan: Plan,
        dense: Mapping[str, Reads],
        scale: Callable[[Sequence[Group], dict[str, Statistics], dict[str, torch.Tensor]], None] | None,
    ) -> dict[str, Pruned]:
        """Prune the linears and experts of one stage.

        Args:
            number: of the stage.
            dense: path of experts -> what they read in the dense model; empty if it is not followed.
            scale: migrates scales in the statistics and weights of the groups' linears.

        Returns:
            Linear -> result. Pruned experts go to the store.
        """
        groups, rounded = plan.groups(index, sublayer_pass.stages[number]), plan.in_int8[index]
        kept = plan.kept.names.get(index, frozenset())
        plain = [group for group in groups if group.linears]
        pruned = [replace(group, linears=tuple(n for n in group.linears if n not in rounded)) for group in groups]
        needs_gram = self.recipe.needs_gram and any(group.linears for group in pruned)
        found = sublayer_pass.statistics(number, plain, needs_gram, rounded=rounded) if plain else []
        trim()
        names = [name for group in plain for name in group.linears]
        statistics = {name: stats for group, stats in zip(plain, found, strict=True) for name in group.linears}
        weights = {name: sublayer_pass.runner.linear(name).weight.data for name in names}
        if scale is not None:
            scale(plain, statistics, weights)
        with self.monitor.phase("permutations"):
            # Masks that are kept have the pattern in the model's own order; who reads the same should gather no other.
            fixed = [group for group in pruned if not {*group.linears, group.experts}.isdisjoint(kept)]
            alone = [group for group in pruned if group.linears and not group.experts and group not in fixed]
            permutations = dict.fromkeys(names) | find_permutations(alone, weights, statistics, self.recipe)
        routed: list[tuple[RoutedExperts, torch.Tensor | None]] = []
        for group in pruned:
            if group.experts is None:
                continue
            is_kept = group.experts in kept
            experts = self.experts.of(index, sublayer_pass, group.experts, dense.get(group.experts), is_kept)
            p = None
            if group not in fixed:
                beside = {name: (weights[name], statistics[name]) for name in group.linears}
                with self.monitor.phase("permutations"):
                    p = experts.permutation(partial(shared_permutation, experts, beside))
                permutations |= dict.fromkeys(group.linears, p)
            routed.append((experts, p))
        with self.monitor.phase("masks and weights"):
            trim()
            linears = {
                name: ToPrune(weights[name], statistics[name], permutations[name], name in kept, name in rounded)
                for name in names
            }
            recipe, dtype = self.recipe.before_rounding, self.model.stored_dtype
            solved = solve(linears, recipe, dtype, sublayer_pass.place, recipe.damping)
        del found, statistics, linears
        trim()
        for experts, p in routed:
            self.experts.prune(experts, p)
        return solved

    def _place(self, index: int, name: str) -> str:
        """What an error about a linear begins with: the model's folder, and the name in its files."""
        return f"{self.model.folder}: {self.model.written_linear(index, name)}"


def _set_parameters(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        set_parameter(layer, name, value)


@contextmanager
def _rounded_inputs(layer: nn.Module, linears: Iterable[str], activations: str) -> Iterator[None]:
    """Round each token of what these linears of a layer read, as the recipe's `activations` say."""
    dtype = {"int8": torch.int8, "fp8": FP8_DTYPE}.get(activations)
    modules = [] if dtype is None else [layer.get_submodule(name) for name in linears]
    hooks = [
        one.register_forward_pre_hook(lambda _, read: (round_tokens(read[0], dtype), *read[1:])) for one in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
