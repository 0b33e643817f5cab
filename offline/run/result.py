"""What a compression says and writes: the lines about its layers, its report, and the finished folder."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.files.sizes import human_size
from ria_vllm.format.int8_rows import INTEGERS
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
from ria_vllm.offline.experts.plan import describe_experts, folds_of_experts
from ria_vllm.offline.experts.store import ExpertStore
from ria_vllm.offline.model.source import Source
from ria_vllm.offline.model.topology import Topologies
from ria_vllm.offline.publish import without_paths
from ria_vllm.offline.run import forecast
from ria_vllm.offline.run.heads import embeddings_in_int8, head_tensors
from ria_vllm.offline.run.held_out import verdict
from ria_vllm.offline.run.plan import Plan
from ria_vllm.offline.stored_layers import layer_key
from ria_vllm.offline.sublayer.pruned_linear import DENSE
from ria_vllm.progress import Monitor
from ria_vllm.report import HELD_OUT, VERDICT, VERDICT_KEYS
from ria_vllm.speed import expected_here

# What the work folder has besides layers.
CALIBRATION_KEY = "calibration"
HELD_OUT_KEY = "held-out"
BUDGET_KEY = "budget"
LEANING = "They are pruned by what the layer's experts read on average; more --samples may help."
TOKENIZER_FILE = "tokenizer_config.json"
Others = tuple[dict[str, Any], dict[str, Path]]


@dataclass(frozen=True)
class Result:
    """What comes of a run of which all layers are in the work folder.

    store: the run's, which knows its model, recipe and work folder.
    """

    source: Source
    store: ExpertStore
    topologies: Topologies
    plan: Plan
    monitor: Monitor

    def report(self) -> dict[str, Any]:
        """What ria_report.json says: in short, the recipe, what was lost, and each linear."""
        store, plan, monitor = self.store, self.plan, self.monitor
        model, writer, recipe = store.model, store.writer, store.recipe
        records: dict[str, Any] = {}
        for index in range(len(model.layers)):
            records |= dict(sorted(writer.record(layer_key(index)).items()))
            records |= store.records(index, plan.experts[index])
        count, rotated = (sum(key in record for record in records.values()) for key in ("smoothed", "rotated"))
        linears = {name: record for name, record in records.items() if DENSE not in record}
        found = {"recipe": self._dumped_recipe(count, rotated), "linears": linears, "dense": dict(plan.dense)}
        if in_int8 := {name: record for name, record in records.items() if DENSE in record}:
            found["dense_in_int8"] = in_int8
        if kept := sum("kept" in record for record in linears.values()):
            found["kept"] = {"linears": kept, "pruned": len(linears) - kept}
        if recipe.migration_strength:
            found["smoothed"] = {"linears": count, "left": len(records) - count}
            monitor.say(f"scales of inputs migrated for {count} of {len(records)} linears; those of the others stay")
        if recipe.rotates_heads:
            monitor.say(f"heads rotated before {rotated} of {len(linears)} linears")
        trained = [record["trained"] for record in linears.values() if "trained" in record]
        left = trained.count(False)
        if trained:
            found["trained"] = {"linears": trained.count(True), "left": left}
            monitor.say(f"weights trained of {trained.count(True)} of {len(linears)} linears")
        if left:
            monitor.warn(
                f"{left} of {len(linears)} linears keep the weights that ADMM gave them, because training did not "
                "lower the error of their part of a layer on held-out samples. ria_report.json names them."
            )
        if recipe.budget is not None:
            record = writer.record(BUDGET_KEY)
            found["budget"] = {
                key: record[key] for key in ("sublayers", "measured", "speed", "corrected") if key in record
            }
        judged = self._size_and_speed()
        if writer.has(HELD_OUT_KEY) and (loss := writer.record(HELD_OUT_KEY)):
            found[HELD_OUT] = loss
            lost = loss["perplexity"] / loss["perplexity_dense"] - 1
            if recipe.max_loss is not None and lost > recipe.max_loss:
                monitor.warn(
                    f"--max-loss {recipe.max_loss:.1%}: the result loses {lost:.1%}. What is pruned is corrected once "
                    "only. Ask for less."
                )
            judged = verdict(loss, recipe) | judged
        elif not recipe.reads_text:
            judged["quality"] = "Its weights are the dense model's: nothing is lost."
        return {VERDICT: {key: judged[key] for key in VERDICT_KEYS if key in judged}} | found

    def _dumped_recipe(self, smoothed: int, rotated: int) -> dict[str, Any]:
        """What the folder says.

        Args:
            smoothed: linears whose scales migrated; if there are none, `smooth` is 0.
            rotated: those that read rotated heads; if there are none, `rotate` is none.
        """
        scheme, recipe = self.store.model.tensors.scheme, self.store.recipe
        found = {} if scheme is None else {"dequantized_from": scheme.method}
        if self.source.revision is not None:
            found["source_revision"] = self.source.revision
        recipe = recipe if smoothed else replace(recipe, smooth=0.0)
        recipe = recipe if rotated else replace(recipe, rotate="none")
        found |= self.store.writer.record(CALIBRATION_KEY)
        return recipe.dump(self.source.name) | found | {TOPOLOGY: self.topologies.dump()}

    def _size_and_speed(self) -> dict[str, str]:
        """What the result weighs, and how fast it should be served here."""
        model, recipe = self.store.model, self.store.recipe
        sizes, dense, size = forecast.sizes_of(model, self.plan, recipe)
        found = {"size": f"{human_size(size)} of weights, dense {human_size(dense)}"}
        speed = expected_here(sizes, recipe.scheme, recipe.pattern, model.stored_dtype, model.device)
        return found | ({"speed": speed} if speed else {})

    def write(self, report: dict[str, Any], others: Others, max_shard_size: int) -> None:
        """Join the layers and everything outside them into the finished folder.

        Args:
            report: as `report` gives it.
            others: the files that go with the weights, see `other_files`.
        """
        source, store, plan = self.source, self.store, self.plan
        model, recipe, writer = store.model, store.recipe, store.writer
        keys, in_int8 = [], embeddings_in_int8(model, recipe)
        for number, name in enumerate(model.names_outside_layers()):
            keys.append(f"outside-{number:05d}")
            # No variable has the tensor, which would keep it: embeddings are large.
            is_head = name in in_int8
            writer.write(keys[-1], head_tensors(name, model.read(name)) if is_head else {name: model.read(name)})
        for index in range(len(model.layers)):
            keys += [layer_key(index), *store.keys(index, plan.experts[index])]
        self._check_written_once(set(report["linears"]), [name for key in keys for name in writer.names(key)])
        files, copies = others
        pruned = sum(record["shape"][0] * record["shape"][1] for record in report["linears"].values())
        zeros = round(0.5 * pruned / model.linear_weights, 6)
        sparsity = SparsityConfig(
            sparsity_structure=str(recipe.pattern), ignore=list(plan.dense), global_sparsity=zeros
        )
        experts = describe_experts(model, plan.experts)
        folds = self.topologies.absolute_folds(model.written_linear)
        folds += folds_of_experts(model, self.topologies, plan.experts)
        words = recipe.weight_format.quantization
        weights = None if words is None else WeightQuantization(**words, dtype=name_of(model.stored_dtype))
        schema = RiaSchema(
            sparsity_config=sparsity, weights=weights, folds=folds, experts=experts,
            input_activations={"none": None, "int8": INT8_TOKENS, "fp8": FP8_TOKENS}[recipe.activations],
            int8_linears=list(report.get("dense_in_int8", ())), recipe=report["recipe"],
        )  # fmt: skip
        files["config.json"]["quantization_config"] = schema.model_dump(mode="json", exclude_none=True)
        files |= {REPORT_FILE: report, CARD_FILE: pruned_card(source.folder, report, zeros, self.monitor.warn)}
        writer.finish(keys, files, copies, max_shard_size, recipe.permute != "none", source.inputs)

    def _check_written_once(self, pruned: set[str], written: list[str]) -> None:
        """Check that each tensor of the source is written once, in one form; a stack of experts by all its linears.

        Nothing that reads the folder would miss a norm.
        """
        model, counts = self.store.model, Counter(written)
        first = self.store.recipe.weight_format.parts[0].name
        stacks = {
            tensor: linears for layer in model.experts for f in layer.values() for tensor, linears in f.in_stack.items()
        }
        for name, in_file in model.names.files.items():
            linear = name.removesuffix(".weight")
            there = counts[name] + counts[f"{linear}.{INTEGERS}"] + (linear in pruned) * counts[f"{linear}.{first}"]
            if pruned & set(stacks.get(name, ())):
                times = [counts[f"{one}.{first}"] for one in stacks[name]]
                there += max(times) if min(times) else 0
            if there != 1:
                raise RiaError(
                    f"{model.files[in_file]}: {name} would be in the output {there} times. Please report this bug in "
                    "ria-vllm."
                )


def say_layer(records: dict[str, dict[str, Any]], pattern: Pattern, monitor: Monitor) -> None:
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


def say_experts(module: str, records: dict[str, dict[str, Any]], monitor: Monitor) -> None:
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


def other_files(source: Source, dtype: torch.dtype) -> Others:
    """The files that go with the weights: name -> content of JSON, without local paths; place -> file to copy.

    Where config.json names no dtype, each reader derives one from the tensors in a way of its own: vLLM takes the
    widest one, transformers the first one. So it then gets `dtype`, that of the weights.
    """
    config = without_paths(source.raw_config)
    if not any(isinstance(getattr(torch, str(config.get(key)), None), torch.dtype) for key in ("dtype", "torch_dtype")):
        config["dtype"] = name_of(dtype)
    files, copies = {"config.json": config}, source.small_files()
    if TOKENIZER_FILE in copies:
        files[TOKENIZER_FILE] = without_paths(read_json(copies.pop(TOKENIZER_FILE)))
    return files, copies
