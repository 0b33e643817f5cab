"""The whole compression: a dense model in, a compressed checkpoint out, with one decoder layer in memory at a time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter, check_free, check_place
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format.weight_format import name_of
from ria_vllm.offline import digests
from ria_vllm.offline.calibration import hub
from ria_vllm.offline.calibration.hub import HubText
from ria_vllm.offline.experts.store import ExpertStore
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.dtypes import CHOICES, choose_dtype
from ria_vllm.offline.model.run.streaming import StreamedModel, stored_dtype
from ria_vllm.offline.model.source import Source, opened
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import budget, forecast
from ria_vllm.offline.run.alone import EachAlone
from ria_vllm.offline.run.held_out import held_out_loss
from ria_vllm.offline.run.kept import find_kept, keeping
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.offline.run.plan import Kept, Plan, make_plan, widths
from ria_vllm.offline.run.result import (
    BUDGET_KEY,
    CALIBRATION_KEY,
    HELD_OUT_KEY,
    Result,
    other_files,
    say_experts,
    say_layer,
)
from ria_vllm.offline.run.tokens import calibration_tokens
from ria_vllm.offline.run.work import HALF_FILE, begun_run, check_same_run, fingerprint, work_folder
from ria_vllm.offline.runtime.memory import map_large_blocks
from ria_vllm.offline.stored_layers import exact_key, exact_tensors, layer_key, layer_tensors, pruned_weights
from ria_vllm.progress import Monitor

TOPOLOGY_KEY = "topology"


@dataclass(frozen=True)
class Settings:
    """How a compression runs. Nothing here changes the result, except that devices round differently."""

    device: torch.device = torch.device("cpu")
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    resume: bool = False
    is_half: bool = False  # of a run that goes on from `out`: with `resume`, what is finished there is taken as it is


def compress(model: str, out: Path, recipe: Recipe, settings: Settings, monitor: Monitor) -> dict[str, Any]:
    """Compress `model` into the folder `out`.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: bad input, or one that has changed meanwhile. Nothing is left at `out`, nor beside it unless
            `--resume` can continue from it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_place(out, Path(model))
    inputs = Inputs()
    if recipe.eval_text is not None and not Path(recipe.eval_text).is_file():
        raise RiaError(f"--eval-data {recipe.eval_text}: no such file.")
    for text in map(Path, filter(None, (recipe.calibration, recipe.eval_text))):
        if text.is_file():
            check_place(out, text)
            inputs.stamps(text)
    map_large_blocks()
    with torch.no_grad(), monitor.live(), inputs.watched():
        check_free(out, settings.overwrite)
        source = opened(model, monitor, inputs)
        dtype = _compute_dtype(out, source, recipe, settings, monitor)
        with monitor.phase("reading the headers"):
            streamed = StreamedModel(source.folder, source.config, settings.device, dtype)
        if streamed.tensors.scheme is not None and (count := len(streamed.tensors.quantized)):
            method = streamed.tensors.scheme.method
            monitor.say(f"{count} tensors are quantized ({method}), and dequantized as they are read")
        recipe = replace(_clipped(recipe, source, monitor), compute_dtype=name_of(dtype))  # type: ignore[arg-type]
        kept = find_kept(streamed, recipe, monitor)
        recipe = _fitting(keeping(recipe, kept, monitor), streamed, monitor)
        run = fingerprint(recipe, source)
        if finished := _finished_half(out, settings):
            check_same_run(out, finished, run)
            return Reader(out).report()
        with work_folder(out, run, settings.overwrite, settings.resume) as writer:
            return _Run(source, streamed, recipe, kept, settings, writer, monitor).compress()


def _finished_half(out: Path, settings: Settings) -> dict[str, Any]:
    """The fingerprint of the run that has written `out`, if this one resumes from that; else empty."""
    path = out / HALF_FILE
    return read_json(path) if settings.is_half and settings.resume and path.is_file() else {}


def _compute_dtype(out: Path, source: Source, recipe: Recipe, settings: Settings, monitor: Monitor) -> torch.dtype:
    """The dtype to compute in. If none is asked for, a resumed run keeps the one it began with, on any machine."""
    stored, asked = stored_dtype(source.folder, source.config), recipe.compute_dtype
    if settings.resume and asked == "auto":
        begun = (_finished_half(out, settings) or begun_run(out)).get("compute_dtype")
        asked = begun if begun in CHOICES else asked
    dtype = choose_dtype(stored, settings.device, asked)
    if dtype != stored:
        monitor.say(f"computing in {name_of(dtype)}, writing {name_of(stored)}")
    return dtype


def _clipped(recipe: Recipe, source: Source, monitor: Monitor) -> Recipe:
    longest = getattr(text_config(source.config), "max_position_embeddings", None)
    clipped = recipe.within(longest)
    if clipped != recipe:
        monitor.warn(
            f"--seq-len {recipe.seq_len}: this model reads at most {longest} tokens, so samples have that length."
        )
    return clipped


def _fitting(recipe: Recipe, model: StreamedModel, monitor: Monitor) -> Recipe:
    """The recipe with a group size that fits the model, if its format has groups."""
    if recipe.weights == "float":
        return recipe
    found = recipe.fitting(widths(model, recipe))
    if found.group_size != recipe.group_size:
        monitor.say(f"--group-size {found.group_size}: what fits the in-features of all linears that may be pruned")
    return found


@dataclass(frozen=True)
class _Run:
    """One compression, and what its steps need."""

    source: Source
    model: StreamedModel
    recipe: Recipe
    kept: Kept
    settings: Settings
    writer: CheckpointWriter
    monitor: Monitor

    def compress(self) -> dict[str, Any]:
        """Run every step, from the calibration tokens to the finished folder; returns the report."""
        # First, so that an error in them shows at once, not after hours.
        others = other_files(self.source, self.model.stored_dtype)
        if self.recipe.budget is not None and self._kept(BUDGET_KEY) is None:
            budget.check_budget(self.model, self.recipe)
        if self.recipe.reads_text and not self.writer.has(CALIBRATION_KEY):
            self._say_estimate()
        tokens = self._tokens()
        store = ExpertStore(self.model, self.writer, self.recipe)
        store.forget_dense()
        # Those by which an interrupted run has pruned, whatever experiments would find now.
        known = self._kept(TOPOLOGY_KEY)
        topologies = None if known is None else Topologies.restored(known)
        layers = LayerPass(store, tokens, self.monitor, topologies)
        if known is None:
            self.writer.write(TOPOLOGY_KEY, {}, layers.topologies.kept())
        plan = make_plan(self.model, layers.topologies, self.recipe, self.kept)
        if self.recipe.budget is not None:
            if self._kept(BUDGET_KEY) is None:
                self._spend(layers, plan, store)
                layers = LayerPass(store, tokens, self.monitor, layers.topologies)
            plan = self._chosen(layers)
        for warning in plan.warnings:
            self.monitor.warn(warning)
        if self.model.is_wrapper:
            inside = f"{self.model.decoder_path}."
            beside = sum(not name.startswith(inside) for name in self.model.names.inside.values())
            self.monitor.say(f"{beside} tensors outside the text decoder are copied")
        self._finish(layers, plan, store)
        if self._correct():
            layers = LayerPass(store, tokens, self.monitor, layers.topologies)
            plan = self._chosen(layers)
            self._finish(layers, plan, store)
        for index in range(len(self.model.layers)):  # no run will go through them again
            self.writer.remove(exact_key(index))
        result = Result(self.source, store, layers.topologies, plan, self.monitor)
        report = result.report()
        with self.monitor.phase("writing"):
            if self.settings.is_half:
                others[0][HALF_FILE] = begun_run(self.writer.out)
            result.write(report, others, self.settings.max_shard_size)
        return report

    def _say_estimate(self) -> None:
        """How long everything should take, before anything is computed."""
        model, recipe = self.model, self.recipe
        seconds = {
            "writing text": forecast.writing_seconds(model, recipe),
            "pruning": self._passes * forecast.pruning_seconds(model, recipe),
            "distilling": self._distilling,
        }
        parts = ", ".join(f"{part} {forecast.about(one)}" for part, one in seconds.items() if one)
        self.monitor.say(
            f"this takes about {forecast.about(sum(seconds.values()))} ({parts}), estimated from how fast this machine "
            "multiplies; the first layer will be measured"
        )

    def _say_measured(self, index: int, seconds: float) -> None:
        """The same once layer `index`, the first one of this run, took so long to prune."""
        total = len(self.model.layers)
        layers = (range(index, index + 1), range(index, total), range(total))
        one, left, whole = (forecast.pruning_seconds(self.model, self.recipe, some) for some in layers)
        if one and self.recipe.reads_text:
            left += (self._passes - 1) * whole
            taken = f"{forecast.about(seconds * left / one)}{' from there on' if index else ''}"
            then = f", and distilling, as estimated, {forecast.about(self._distilling)}" if self._distilling else ""
            self.monitor.say(f"as measured on layer {index}, pruning takes about {taken}{then}")

    @property
    def _distilling(self) -> float:
        return forecast.distilling_seconds(self.model, self.recipe) if self.settings.is_half else 0.0

    @property
    def _passes(self) -> int:
        """How many times layers are pruned: twice where a budget is to be spent."""
        return 1 if self.recipe.budget is None else 2

    def _tokens(self) -> torch.Tensor:
        if self.writer.has(CALIBRATION_KEY):
            return self.writer.read(CALIBRATION_KEY)[0]["tokens"]
        with self.monitor.phase("calibration text"):
            text = hub.opened(self.recipe.calibration)
            found: dict[str, Any] = {}
            tokens = calibration_tokens(self.source, self.model, self.recipe, self.monitor, text, found)
        with self.monitor.phase("digests of files"):
            found |= self._digests(text)
        self.writer.write(CALIBRATION_KEY, {"tokens": tokens}, found)
        return tokens

    def _digests(self, text: str | HubText) -> dict[str, str]:
        """Of the texts, as they were opened, and of the model's local files."""
        found, source, held_out = digests.of_text(text, "calibration"), self.source, self.recipe.eval_text
        if held_out is not None:
            found |= digests.of_text(held_out, "eval_text")
            if found["eval_text_sha256"] == found.get("calibration_sha256"):
                raise RiaError(
                    f"--eval-data {held_out}: weights are fitted to this text. Give another, or leave it out."
                )
        if source.revision is None:
            found["source_weights_digest"] = digests.of_weights(source.folder)
        return found

    def _kept(self, key: str) -> dict[str, Any] | None:
        """What this run, or the one that it resumes, has kept besides layers."""
        return self.writer.record(key) if self.writer.has(key) else None

    def _chosen(self, layers: LayerPass) -> Plan:
        """The plan of the sublayers that the budget buys."""
        record = self._kept(BUDGET_KEY)
        assert record is not None  # `_spend` has written it
        chosen = frozenset((index, name) for index, name in record["pruned"])
        return make_plan(self.model, layers.topologies, self.recipe, self.kept, chosen)

    def _finish(self, layers: LayerPass, plan: Plan, store: ExpertStore) -> None:
        """Prune, and measure how much is lost, unless an interrupted run has; for `--max-loss` of what is written."""
        start = None if self.recipe.max_loss is None else EachAlone(layers.streams).start
        self._prune_layers(layers, plan, self._replay_finished(layers, plan), store)
        if not self.recipe.held_out or self._kept(HELD_OUT_KEY) is not None:
            return
        streams = layers.streams
        if start is not None:
            layers.mixed(start, lambda index: self._finished(index, plan, True), plan)
            streams = replace(streams, pruned=start)
        found = held_out_loss(self.model, streams, layers.embedded.held_out, self.monitor)
        self.writer.write(HELD_OUT_KEY, {}, found or {})

    def _correct(self) -> bool:
        """Whether the result loses more than `--max-loss`; then fewer sublayers are chosen, once."""
        most, record, loss = self.recipe.max_loss, self._kept(BUDGET_KEY), self._kept(HELD_OUT_KEY)
        if most is None or record is None or not loss:
            return False
        fewer = budget.corrected(self.model, self.recipe, record, loss)
        if fewer is None:
            return False
        self.monitor.say(
            f"--max-loss {most:.1%}: the result loses {fewer['corrected']:.1%}, so {len(fewer['pruned'])} instead of "
            f"{len(record['pruned'])} sublayers are pruned, once more"
        )
        self._restart(fewer)
        return True

    def _restart(self, record: dict[str, Any]) -> None:
        """Forget the layers that are finished, and keep what the budget buys."""
        self.writer.remove(HELD_OUT_KEY)
        for index in reversed(range(len(self.model.layers))):  # what is left of them is resumed
            self.writer.remove(layer_key(index))
        self.writer.write(BUDGET_KEY, {}, record)

    def _spend(self, layers: LayerPass, plan: Plan, store: ExpertStore) -> None:
        """Prune everything, to find out what to leave dense."""
        budget.check_reachable(layers, plan)
        layers.alone = EachAlone(layers.streams)
        self._prune_layers(layers, plan, self._replay_finished(layers, plan), store)
        record = budget.spend(layers, plan, lambda index: self._finished(index, plan, True))
        self._restart(record)

    def _finished(self, index: int, plan: Plan, written: bool = False) -> dict[str, torch.Tensor]:
        """The parameters of a finished layer that pruning has changed, by their names relative to it.

        Args:
            written: as they are written, and not as what comes after them is pruned for.
        """
        stored, _ = self.writer.read(layer_key(index))
        names = {self.model.written_linear(index, name): name for name in sorted(plan.changed(index))}
        tensors, recipe = stored, self.recipe
        if recipe.continues_exactly and index <= plan.last and not written:
            tensors, recipe = self.writer.read(exact_key(index))[0], recipe.before_rounding
        weights = pruned_weights(tensors, list(names), self.model.stored_dtype, recipe)
        found = {f"{names[written]}.weight": weight for written, weight in weights.items()}
        # What stays dense may have been changed, too: scales migrate, and biases are rotated.
        prefix = self.model.layer_prefix(index)
        for name, _ in self.model.layers[index].named_parameters():
            stored_name = self.model.names.direct.get(prefix + name)
            if stored_name in stored:
                found[name] = stored[stored_name]
        return found

    def _replay_finished(self, layers: LayerPass, plan: Plan) -> int:
        """Take the activations through the layers that an interrupted run has finished; returns their number."""
        total = len(self.model.layers)
        unfinished = (index for index in range(total) if not self.writer.has(layer_key(index)))
        finished = next(unfinished, total)
        if finished:
            self.monitor.say(f"resuming: {finished} of {total} layers are finished")
        chunks = None if finished <= plan.last else layers.streams.measured
        if finished <= plan.last or (self.recipe.held_out and self._kept(HELD_OUT_KEY) is None):
            for index in self.monitor.steps(range(finished), "resuming", finished):
                layers.replay(index, self._finished(index, plan), plan.experts[index], chunks)
        return finished

    def _prune_layers(self, layers: LayerPass, plan: Plan, finished: int, store: ExpertStore) -> None:
        total = len(self.model.layers)
        for index in self.monitor.layers(range(finished, total), total):
            began = self.monitor.clock()
            pruned, changed = layers.prune(index, plan)
            self.source.inputs.check()  # now, and not only after the hours that the other layers take
            records = {name: linear.record for name, linear in pruned.items()}
            with self.monitor.phase("writing"):
                if self.recipe.continues_exactly and index <= plan.last:
                    self.writer.write(exact_key(index), exact_tensors(pruned, self.recipe))
                tensors = layer_tensors(self.model, index, pruned, self.recipe, plan.experts[index], changed)
                self.writer.write(layer_key(index), tensors, records)
                del tensors
            del pruned, changed  # before the next layer is loaded
            seconds = self.monitor.clock() - began
            say_layer(records, self.recipe.pattern, self.monitor)
            for path in sorted(plan.experts[index]):
                say_experts(self.model.experts[index][path].module, store.records(index, [path]), self.monitor)
            if index == finished and not self.writer.has(BUDGET_KEY):  # which leaves more of some layers than of others
                self._say_measured(index, seconds)
