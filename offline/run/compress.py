"""The whole compression: a dense model in, a compressed checkpoint out, with one decoder layer in memory at a time."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.checkpoint.writer import CheckpointWriter, check_free, check_place
from ria_vllm.export import kept_copies
from ria_vllm.files.json_file import read_json
from ria_vllm.files.sizes import human_size
from ria_vllm.format.pattern import Pattern
from ria_vllm.format.schema import (
    FP8_TOKENS,
    INT8_TOKENS,
    REPORT_FILE,
    TOPOLOGY,
    RiaSchema,
    SparsityConfig,
    WeightQuantization,
)
from ria_vllm.format.weight_format import name_of
from ria_vllm.hub.model_card import CARD_FILE, pruned_card
from ria_vllm.offline import digests
from ria_vllm.offline.calibration import data
from ria_vllm.offline.calibration.hub import HubText
from ria_vllm.offline.experts.plan import describe_experts, folds_of_experts
from ria_vllm.offline.experts.store import ExpertStore
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.dtypes import CHOICES, choose_dtype
from ria_vllm.offline.model.run.streaming import StreamedModel, stored_dtype
from ria_vllm.offline.model.source import Source, opened
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.publish import without_paths
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.run import budget, forecast
from ria_vllm.offline.run.alone import EachAlone
from ria_vllm.offline.run.heads import head_tensors, heads_in_int8
from ria_vllm.offline.run.held_out import held_out_loss, verdict
from ria_vllm.offline.run.kept import find_kept, keeping
from ria_vllm.offline.run.layers import LayerPass
from ria_vllm.offline.run.plan import Kept, Plan, make_plan, widths
from ria_vllm.offline.run.tokens import calibration_tokens
from ria_vllm.offline.run.work import begun_run, fingerprint, work_folder
from ria_vllm.offline.runtime.memory import map_large_blocks
from ria_vllm.offline.runtime.ranks import Ranks, joined
from ria_vllm.offline.stored_layers import exact_key, exact_tensors, layer_key, layer_tensors, pruned_weights
from ria_vllm.offline.sublayer.pruned_linear import DENSE
from ria_vllm.offline.written_once import check_written_once, planned
from ria_vllm.progress import Monitor
from ria_vllm.report import HELD_OUT, VERDICT, VERDICT_KEYS
from ria_vllm.speed import expected_here

CALIBRATION_KEY = "calibration"
HELD_OUT_KEY = "held-out"
TOPOLOGY_KEY = "topology"
BUDGET_KEY = "budget"
LEANING = "They are pruned by what the layer's experts read on average; more --samples may help."
TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Settings:
    """How a compression runs. Nothing here changes the result, except that devices round differently."""

    device: torch.device = torch.device("cpu")
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    resume: bool = False


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
    if Path(recipe.calibration).is_file():
        check_place(out, Path(recipe.calibration))
        inputs.stamps(Path(recipe.calibration))
    map_large_blocks()
    with joined(settings.device) as ranks, torch.no_grad(), monitor.live(), inputs.watched():
        check_free(out, settings.overwrite)
        source = opened(model, ranks, monitor, inputs)
        dtype = _compute_dtype(out, source, recipe, settings, ranks, monitor)
        with monitor.phase("reading the headers"):
            streamed = StreamedModel(source.folder, source.config, settings.device, dtype)
        if streamed.tensors.scheme is not None and (count := len(streamed.tensors.quantized)):
            method = streamed.tensors.scheme.method
            monitor.say(f"{count} tensors are quantized ({method}), and dequantized as they are read")
        recipe = _clipped(recipe, source, monitor).with_compute_dtype(name_of(dtype))
        kept = find_kept(streamed, recipe, monitor)
        recipe = _fitting(keeping(recipe, kept, monitor), streamed, monitor)
        run = fingerprint(recipe, source)
        with work_folder(out, run, settings.overwrite, settings.resume, ranks) as writer:
            return _Run(source, streamed, recipe, kept, settings, writer, ranks, monitor).compress()


def _compute_dtype(
    out: Path, source: Source, recipe: Recipe, settings: Settings, ranks: Ranks, monitor: Monitor
) -> torch.dtype:
    """The dtype to compute in. If none is asked for, a resumed run keeps the one it began with, on any machine."""
    stored, asked = stored_dtype(source.folder, source.config), recipe.compute_dtype
    if ranks.first and settings.resume and asked == "auto":
        begun = begun_run(out).get("compute_dtype")
        asked = begun if begun in CHOICES else asked
    dtype = ranks.broadcast(choose_dtype(stored, settings.device, asked))  # other ranks may be on other machines
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
    ranks: Ranks
    monitor: Monitor

    def compress(self) -> dict[str, Any]:
        """Run every step, from the calibration tokens to the finished folder; returns the report."""
        # First, so that an error in them shows at once, not after hours.
        others = _other_files(self.source, self.model.stored_dtype)
        check_written_once(self.model, set(), planned(self.model), self.recipe.weight_format)
        if self.recipe.budget is not None:
            budget.check_budget(self.model, self.recipe)
        if self.ranks.size == 1 and self.recipe.reads_text and not self.writer.has(CALIBRATION_KEY):
            passes = 1 if self.recipe.budget is None else 2
            taken = forecast.about(passes * forecast.pruning_seconds(self.model, self.recipe))
            self.monitor.say(
                f"pruning takes about {taken}, estimated from how fast this machine multiplies; the ETA is measured"
            )
        tokens = self._tokens()
        store = ExpertStore(self.model, self.writer, self.recipe, self.ranks)
        store.forget_dense()
        layers = LayerPass(store, tokens, self.monitor, self._kept_topologies(), self.recipe.held_out)
        self._keep(layers.topologies)
        plan = make_plan(self.model, layers.topologies, self.recipe, self.kept)
        if self.recipe.budget is not None:
            if not self._has(BUDGET_KEY):
                self._spend(layers, plan, store)
                layers = LayerPass(store, tokens, self.monitor, layers.topologies, self.recipe.held_out)
            chosen = frozenset((index, name) for index, name in self.writer.record(BUDGET_KEY)["pruned"])
            plan = make_plan(self.model, layers.topologies, self.recipe, self.kept, chosen)
        for warning in plan.warnings:
            self.monitor.warn(warning)
        if copied := self.model.copied():
            self.monitor.say(f"{self.model.how_copied()}, beside the text decoder: {', '.join(copied)}")
        self._prune_layers(layers, plan, self._replay_finished(layers, plan), store)
        self._measure(layers)
        self.ranks.barrier()
        if self.ranks.first:  # no run will go through these layers again
            for index in range(len(self.model.layers)):
                self.writer.remove(exact_key(index))
        report = self._report(layers.topologies, plan, store)
        self.ranks.barrier()  # all ranks have read the work folder before the first one removes it
        if self.ranks.first:
            with self.monitor.phase("writing"):
                self._finish(layers.topologies, plan, store, report, others)
        self.ranks.barrier()
        return report

    def _tokens(self) -> torch.Tensor:
        tokens = None
        if self.ranks.first and self.writer.has(CALIBRATION_KEY):
            tokens = self.writer.read(CALIBRATION_KEY)[0]["tokens"]
        elif self.ranks.first:
            with self.monitor.phase("calibration text"):
                text = data.opened(self.recipe.calibration)
                tokens = calibration_tokens(self.source, self.model, self.recipe, self.monitor, text)
            with self.monitor.phase("digests of files"):
                found = self._digests(text)
            self.writer.write(CALIBRATION_KEY, {"tokens": tokens}, found)
        return self.ranks.broadcast(tokens)

    def _digests(self, text: str | HubText) -> dict[str, str]:
        """Of the text, as it was opened, and of the model's local files."""
        found, source = digests.of_text(text, "calibration"), self.source
        if source.revision is None:
            found["source_weights_digest"] = digests.of_weights(source.folder)
        return found

    def _kept_topologies(self) -> Topologies | None:
        """Those by which an interrupted run has pruned, whatever experiments would find now; None if there are none."""
        kept = self.ranks.broadcast(self.writer.record(TOPOLOGY_KEY)) if self._has(TOPOLOGY_KEY) else None
        return None if kept is None else Topologies.restored(kept)

    def _keep(self, topologies: Topologies) -> None:
        if self.ranks.first and not self.writer.has(TOPOLOGY_KEY):
            self.writer.write(TOPOLOGY_KEY, {}, topologies.kept())

    def _has(self, key: str) -> bool:
        """Whether an interrupted run has kept it; on all ranks the same."""
        return self.ranks.broadcast(self.ranks.first and self.writer.has(key))

    def _measure(self, layers: LayerPass) -> None:
        """Measure how much is lost, unless an interrupted run has."""
        if not self.recipe.held_out or self._has(HELD_OUT_KEY):
            return
        found = held_out_loss(self.model, layers.streams, layers.embedded.held_out, self.ranks, self.monitor)
        if self.ranks.first:
            self.writer.write(HELD_OUT_KEY, {}, found or {})

    def _spend(self, layers: LayerPass, plan: Plan, store: ExpertStore) -> None:
        """Prune everything, to find out what to leave dense."""
        budget.check_reachable(layers, plan)
        layers.alone = EachAlone(layers.streams)
        self._prune_layers(layers, plan, self._replay_finished(layers, plan), store)
        record = budget.spend(layers, plan, lambda index: self._finished(index, plan))
        self.ranks.barrier()  # all have read them
        if self.ranks.first:
            for index in reversed(range(len(self.model.layers))):  # what is left of them is resumed
                self.writer.remove(layer_key(index))
            self.writer.write(BUDGET_KEY, {}, record)
        self.ranks.barrier()

    def _finished(self, index: int, plan: Plan) -> dict[str, torch.Tensor]:
        """The parameters of a finished layer that pruning has changed, by their names relative to it."""
        stored, _ = self.writer.read(layer_key(index))
        names = {self.model.written_linear(index, name): name for name in sorted(plan.changed(index))}
        tensors, recipe = stored, self.recipe
        if recipe.continues_exactly and index <= plan.last:
            tensors, recipe = self.writer.read(exact_key(index))[0], recipe.before_rounding
        weights = pruned_weights(tensors, list(names), self.model.stored_dtype, recipe)
        found = {f"{names[written]}.weight": weight for written, weight in weights.items()}
        # What stays dense may have been changed, too: scales migrate, and biases are rotated.
        prefix = self.model.layer_prefix(index)
        for name, _ in self.model.layers[index].named_parameters():
            written = self.model.names.direct.get(prefix + name)
            if written in stored:
                found[name] = stored[written]
        return found

    def _replay_finished(self, layers: LayerPass, plan: Plan) -> int:
        """Take the activations through the layers that an interrupted run has finished; returns their number."""
        total = len(self.model.layers)
        unfinished = (index for index in range(total) if not self.writer.has(layer_key(index)))
        finished = self.ranks.broadcast(next(unfinished, total))
        if finished:
            self.monitor.say(f"resuming: {finished} of {total} layers are finished")
        chunks = None if finished <= plan.last else layers.streams.measured
        if finished <= plan.last or (self.recipe.held_out and not self._has(HELD_OUT_KEY)):
            for index in self.monitor.steps(range(finished), "resuming", finished):
                layers.replay(index, self._finished(index, plan), plan.experts[index], chunks)
        return finished

    def _prune_layers(self, layers: LayerPass, plan: Plan, finished: int, store: ExpertStore) -> None:
        total = len(self.model.layers)
        for index in self.monitor.layers(range(finished, total), total):
            pruned, changed = layers.prune(index, plan)
            self.source.inputs.check()  # now, and not only after the hours that the other layers take
            records = {name: linear.record for name, linear in pruned.items()}
            if self.ranks.first:
                with self.monitor.phase("writing"):
                    if self.recipe.continues_exactly and index <= plan.last:
                        self.writer.write(exact_key(index), exact_tensors(pruned, self.recipe))
                    tensors = layer_tensors(self.model, index, pruned, self.recipe, plan.experts[index], changed)
                    self.writer.write(layer_key(index), tensors, records)
                    del tensors
            del pruned, changed  # before the next layer is loaded
            _say_layer(records, self.recipe.pattern, self.monitor)
            for path in sorted(plan.experts[index]):
                _say_experts(self.model.experts[index][path].module, store.records(index, [path]), self.monitor)

    def _dumped_recipe(self, topologies: Topologies, smoothed: int, rotated: int) -> dict[str, Any]:
        """What the folder says.

        Args:
            smoothed: linears whose scales migrated; if there are none, `smooth` is 0.
            rotated: those that read rotated heads; if there are none, `rotate` is none.
        """
        scheme = self.model.tensors.scheme
        found = {} if scheme is None else {"dequantized_from": scheme.method}
        if self.source.revision is not None:
            found["source_revision"] = self.source.revision
        recipe = self.recipe if smoothed else replace(self.recipe, smooth=0.0)
        recipe = recipe if rotated else replace(recipe, rotate="none")
        found |= self.writer.record(CALIBRATION_KEY)
        return recipe.dump(self.source.name) | found | {TOPOLOGY: topologies.dump()}

    def _report(self, topologies: Topologies, plan: Plan, store: ExpertStore) -> dict[str, Any]:
        records: dict[str, Any] = {}
        for index in range(len(self.model.layers)):
            records |= dict(sorted(self.writer.record(layer_key(index)).items()))
            records |= store.records(index, plan.experts[index])
        count, rotated = (sum(key in record for record in records.values()) for key in ("smoothed", "rotated"))
        recipe = self._dumped_recipe(topologies, count, rotated)
        linears = {name: record for name, record in records.items() if DENSE not in record}
        found = {"recipe": recipe, "linears": linears, "dense": dict(plan.dense)}
        if in_int8 := {name: record for name, record in records.items() if DENSE in record}:
            found["dense_in_int8"] = in_int8
        if kept := sum("kept" in record for record in linears.values()):
            found["kept"] = {"linears": kept, "pruned": len(linears) - kept}
        if self.recipe.migration_strength:
            found["smoothed"] = {"linears": count, "left": len(records) - count}
            self.monitor.say(
                f"scales of inputs migrated for {count} of {len(records)} linears; those of the others stay"
            )
        if self.recipe.rotates_heads:
            self.monitor.say(f"heads rotated before {rotated} of {len(linears)} linears")
        left = sum(record.get("trained") is False for record in linears.values())
        if left:
            self.monitor.warn(
                f"{left} of {len(linears)} linears keep the weights that ADMM gave them, because training did not "
                "lower the error of their part of a layer on held-out samples. ria_report.json names them."
            )
        if copied := self.model.copied():
            found["copied"] = copied
        if self.recipe.budget is not None:
            record = self.writer.record(BUDGET_KEY)
            found["budget"] = {key: record[key] for key in ("sublayers", "measured", "speed") if key in record}
        judged = self._size_and_speed(plan)
        if self._has(HELD_OUT_KEY) and (loss := self.writer.record(HELD_OUT_KEY)):
            found[HELD_OUT] = loss
            lost = loss["perplexity"] / loss["perplexity_dense"] - 1
            if self.recipe.max_loss is not None and lost > self.recipe.max_loss:
                self.monitor.warn(
                    f"--max-loss {self.recipe.max_loss:.1%}: the result loses {lost:.1%}. Pruning once more what was "
                    "chosen does not lose the same. Ask for less."
                )
            judged = verdict(loss, self.recipe) | judged
        return {VERDICT: {key: judged[key] for key in VERDICT_KEYS if key in judged}} | found

    def _size_and_speed(self, plan: Plan) -> dict[str, str]:
        """What the result weighs, and how fast it should be served here."""
        sizes, dense, size = forecast.sizes_of(self.model, plan, self.recipe)
        found = {"size": f"{human_size(size)} of weights, dense {human_size(dense)}"}
        speed = expected_here(
            sizes, self.recipe.scheme, self.recipe.pattern, self.model.stored_dtype, self.model.device
        )
        return found | ({"speed": speed} if speed else {})

    def _finish(
        self,
        topologies: Topologies,
        plan: Plan,
        store: ExpertStore,
        report: dict[str, Any],
        others: tuple[dict[str, Any], list[Path]],
    ) -> None:
        """Join the layers and everything outside them into the finished folder."""
        source, model, recipe, writer = self.source, self.model, self.recipe, self.writer
        keys, in_int8 = [], heads_in_int8(model, recipe)
        for number, name in enumerate(model.names_outside_layers()):
            keys.append(f"outside-{number:05d}")
            # No variable has the tensor, which would keep it: embeddings are large.
            is_head = name in in_int8
            writer.write(keys[-1], head_tensors(name, model.read(name)) if is_head else {name: model.read(name)})
        for index in range(len(model.layers)):
            keys += [layer_key(index), *store.keys(index, plan.experts[index])]
        written = [name for key in keys for name in writer.names(key)]
        check_written_once(model, set(report["linears"]), written, recipe.weight_format)
        json_files, copies = others
        pruned = sum(record["shape"][0] * record["shape"][1] for record in report["linears"].values())
        zeros = round(0.5 * pruned / model.linear_weights, 6)
        sparsity = SparsityConfig(
            sparsity_structure=str(recipe.pattern), ignore=list(plan.dense), global_sparsity=zeros
        )
        experts = describe_experts(model, plan.experts)
        folds = topologies.absolute_folds(model.written_linear) + folds_of_experts(model, topologies, plan.experts)
        words = recipe.weight_format.quantization
        weights = None if words is None else WeightQuantization(**words, dtype=name_of(model.stored_dtype))
        schema = RiaSchema(
            sparsity_config=sparsity, weights=weights, folds=folds, experts=experts,
            input_activations={"none": None, "int8": INT8_TOKENS, "fp8": FP8_TOKENS}[recipe.activations],
            int8_linears=list(report.get("dense_in_int8", ())), recipe=report["recipe"],
        )  # fmt: skip
        json_files["config.json"]["quantization_config"] = schema.model_dump(mode="json", exclude_none=True)
        json_files = json_files | {REPORT_FILE: report}
        permuted = recipe.permute != "none"
        cards = {CARD_FILE: pruned_card(source.folder, report, zeros, self.monitor.warn)}
        copies, copied_from = kept_copies(writer, copies, source.folder)
        source.inputs.check()
        writer.finish(keys, json_files, copies, self.settings.max_shard_size, permuted, cards, copied_from)


def _say_layer(records: dict[str, dict[str, Any]], pattern: Pattern, monitor: Monitor) -> None:
    for name, record in records.items():
        if DENSE in record:
            text = f"{name}: dense in int8"
        elif "kept" in record:
            text = f"{name}: {pattern} already"
        else:
            text = f"{name}: retained score {record['retained_before']:.4f} -> {record['retained_after']:.4f}"
        if "error_after" in record:
            text += f", output error {record['error_before']:.4f} -> {record['error_after']:.4f}"
        if "rounding_error" in record:
            text += f", rounding error {record['rounding_error']:.4f}"
        monitor.say(text)


def _say_experts(module: str, records: dict[str, dict[str, Any]], monitor: Monitor) -> None:
    before, after = (
        sum(record[key] for record in records.values()) / len(records) for key in ("retained_before", "retained_after")
    )
    text = f"{module}: {len(records)} linears, retained score {before:.4f} -> {after:.4f} on average"
    errors = [record["error_after"] for record in records.values() if "error_after" in record]
    monitor.say(text + (f", output error up to {max(errors):.4f}" if errors else ""))
    short = {name.rpartition(".")[0]: record["tokens"] for name, record in records.items() if "borrowed" in record}
    if short:
        unused = list(short.values()).count(0)
        monitor.warn(
            f"{module}: {len(short)} experts get fewer calibration tokens than channels"
            f"{f', {unused} of them none' if unused else ''}. {LEANING}"
        )


def _other_files(source: Source, dtype: torch.dtype) -> tuple[dict[str, Any], list[Path]]:
    """The files that go with the weights: (name -> content of JSON files, without local paths; files to copy).

    Where config.json names no dtype, each reader derives one from the tensors in a way of its own: vLLM takes the
    widest one, transformers the first one. So it then gets `dtype`, that of the weights.
    """
    config = without_paths(source.raw_config)
    if not any(isinstance(getattr(torch, str(config.get(key)), None), torch.dtype) for key in ("dtype", "torch_dtype")):
        config["dtype"] = name_of(dtype)
    json_files, copies = {"config.json": config}, source.small_files()
    for path in [path for path in copies if path == source.folder / TOKENIZER_FILE]:
        json_files[path.name] = without_paths(read_json(path))
        copies.remove(path)
    return json_files, copies
