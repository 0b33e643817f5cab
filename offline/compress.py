"""The pipeline: a dense model in, a compressed checkpoint out, one decoder layer in memory at a time."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint import read_json
from ria_vllm.errors import RiaError
from ria_vllm.model_card import CARD_FILE, pruned_card
from ria_vllm.offline.calibration import data as calibration
from ria_vllm.offline.evaluation.evaluate import explained, load_tokenizer
from ria_vllm.offline.layers import LayerPass
from ria_vllm.offline.model.dtypes import CHOICES, choose_dtype, name_of
from ria_vllm.offline.model.source import Source, opened, stamp_of
from ria_vllm.offline.model.streaming import StreamedModel, stored_dtype
from ria_vllm.offline.model.topology import Topology
from ria_vllm.offline.plan import Plan, make_plan, most_sensitive
from ria_vllm.offline.publish import without_paths
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.memory import available, map_large_blocks
from ria_vllm.offline.runtime.ranks import Ranks, joined
from ria_vllm.offline.units import layer_key, layer_tensors, pruned_weights
from ria_vllm.progress import Monitor
from ria_vllm.schema import REPORT_FILE, RiaSchema, SparsityConfig, WeightQuantization
from ria_vllm.writer import CheckpointWriter, check_place, disk_errors

CALIBRATION_KEY = "calibration"
SENSITIVITY_KEY = "sensitivity"
FINGERPRINT_FILE = "run.json"
TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Settings:
    """How a compression runs; nothing here changes what comes out (but for a device's own rounding)."""

    device: torch.device = torch.device("cpu")
    activation_cache: str = "cpu"
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    resume: bool = False


def compress(model: str, out: Path, recipe: Recipe, settings: Settings, monitor: Monitor) -> dict[str, Any]:
    """Compress `model` into the folder `out`.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: bad input; nothing is left at `out`, nor beside it unless `--resume` can go on from it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_place(out, Path(model))
    map_large_blocks()
    with joined(settings.device) as team, torch.no_grad(), monitor.live():
        if (out.exists() or out.is_symlink()) and not settings.overwrite:
            raise RiaError(f"{out}: exists already. Choose another folder, or give --overwrite.")
        with opened(model, out.parent, team, monitor) as source:
            dtype = _compute_dtype(out, source, recipe, settings, team, monitor)
            with monitor.phase("reading the headers"):
                streamed = StreamedModel(source.folder, source.config, settings.device, dtype)
            recipe = _clipped(recipe, source, monitor).with_compute_dtype(name_of(dtype))
            with _work_folder(out, _fingerprint(recipe, source), settings, team) as writer:
                return _run(source, streamed, recipe, settings, writer, team, monitor)


def _run(
    source: Source,
    model: StreamedModel,
    recipe: Recipe,
    settings: Settings,
    writer: CheckpointWriter,
    team: Ranks,
    monitor: Monitor,
) -> dict[str, Any]:
    others = _other_files(source)  # now: what is wrong with them should not show after hours
    _check_nothing_lost(model, set(), _planned(model))
    tokens = _tokens(source, model, recipe, writer, team, monitor)
    cache = writer.work / "activations" if settings.activation_cache == "disk" else None
    sensitive = _sensitive(model, tokens, cache, recipe, writer, team, monitor)
    layers = LayerPass(model, tokens, cache, recipe, team, monitor)
    plan = make_plan(model, layers.topology, recipe, sensitive)
    for warning in plan.warnings:
        monitor.warn(warning)
    total = len(model.layers)
    finished = team.from_first(next((i for i in range(total) if not writer.has(layer_key(i))), total))
    if finished:
        monitor.say(f"resuming: {finished} of {total} layers are finished")
    if finished < total:
        for index in monitor.steps(range(finished), "resuming", finished):
            stored, _ = writer.read(layer_key(index))
            names = {model.written_linear(index, name): name for name in sorted(plan.pruned[index])}
            weights = pruned_weights(stored, list(names), model.stored_dtype, recipe)
            layers.replay(index, {names[written]: weight for written, weight in weights.items()})
    for index in monitor.layers(range(finished, total), total):
        pruned = layers.prune(index, plan, last=index == total - 1)
        records = {name: linear.record for name, linear in pruned.items()}
        if team.first:
            with monitor.phase("writing"):
                writer.write(layer_key(index), layer_tensors(model, index, pruned, recipe), records)
        del pruned  # before the next layer is loaded
        _say_layer(records, monitor)
    team.wait()
    report = _report(source, recipe, model, plan, writer)
    team.wait()  # until all have read what the first one removes in the end
    if team.first:
        with monitor.phase("writing"):
            _finish(source, model, recipe, layers.topology, plan, settings, writer, report, others, monitor)
    team.wait()
    return report


def _clipped(recipe: Recipe, source: Source, monitor: Monitor) -> Recipe:
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if longest and recipe.seq_len > longest:
        monitor.warn(f"--seq-len {recipe.seq_len}: this model reads at most {longest} tokens; samples get that length.")
        recipe = recipe.with_seq_len(longest)
    return recipe


def _compute_dtype(
    out: Path, source: Source, recipe: Recipe, settings: Settings, team: Ranks, monitor: Monitor
) -> torch.dtype:
    """What this run computes in. Where nothing else is asked, a resumed run goes on as it began, on any machine."""
    stored, asked = stored_dtype(source.folder, source.config), recipe.compute_dtype
    if team.first and settings.resume and asked == "auto":
        begun = _begun(_work(out)).get("compute_dtype")
        asked = begun if begun in CHOICES else asked
    dtype = team.from_first(choose_dtype(stored, settings.device, asked))  # the others' machines may be unlike
    if dtype != stored:
        monitor.say(f"computing in {name_of(dtype)}, writing {name_of(stored)}")
    return dtype


def _work(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _begun(work: Path) -> dict[str, Any]:
    """The fingerprint of the run that a work folder is from; empty where there is none."""
    fingerprint = work / FINGERPRINT_FILE
    try:
        return read_json(fingerprint) if fingerprint.is_file() else {}
    except RiaError:
        raise RiaError(
            f"--resume: {fingerprint} is damaged, so nothing says what run this is from. Leave out --resume to begin "
            "anew."
        ) from None


def _fingerprint(recipe: Recipe, source: Source) -> dict[str, Any]:
    """All that the bytes of the result depend on, as JSON gives it back."""
    text = Path(recipe.calibration)
    stamps = {"model": source.stamp, "calibration text": stamp_of(text) if text.is_file() else None}
    names = {"source": source.name, "calibration": recipe.calibration}  # in full: this stays in the work folder
    return json.loads(json.dumps(recipe.dump(source.name) | names | stamps))


def _other_versions(before: Any, now: dict[str, str]) -> str:
    before = before if isinstance(before, dict) else {}
    differing = [name for name in now if before.get(name) != now[name]]
    then, here = (", ".join(f"{name} {found.get(name)}" for name in differing) for found in (before, now))
    return f"{then}; here is {here}. Install what it began with, or leave out --resume."


@contextmanager
def _work_folder(out: Path, run: dict[str, Any], settings: Settings, team: Ranks) -> Iterator[CheckpointWriter]:
    """The work folder, new or, with --resume, that of an interrupted run with the same fingerprint."""
    work = _work(out)
    if team.first:
        known = _begun(work) if settings.resume else {}
        differing = [key for key in run if known and known.get(key) != run[key]]
        if differing[:1] == ["versions"]:
            raise RiaError(f"--resume: {work} is from a run with {_other_versions(known['versions'], run['versions'])}")
        if differing:
            what, before = differing[0].replace("_", "-"), known.get(differing[0])
            shown = f" ({before})" if isinstance(before, str | int | float) else ""
            raise RiaError(
                f"--resume: {work} is from a run with another {what}{shown}. Give the same, or leave out --resume."
            )
        writer = CheckpointWriter(out, settings.overwrite, resume=bool(known))
        with disk_errors(work):
            temporary = work / f"{FINGERPRINT_FILE}.tmp"
            temporary.write_text(json.dumps(run))
            os.replace(temporary, work / FINGERPRINT_FILE)
    team.wait()
    if not team.first:
        writer = CheckpointWriter(out, overwrite=True, resume=True)
    try:
        yield writer
    except RiaError as error:
        # A full disk, a file out of reach or a place that is taken can be mended, and the run go on. What else goes
        # wrong after the first layer may have been chance, or need another version: finished layers are never lost.
        if team.first and not isinstance(error.__cause__, OSError):
            if writer.has(layer_key(0)):
                kept = (
                    f"Finished layers are kept in {work}: with the same options, --resume goes on from them; with others, "
                    "leave it out."
                )
                raise RiaError(f"{error} {kept}") from error.__cause__
            writer.discard()
        raise


def _tokens(
    source: Source, model: StreamedModel, recipe: Recipe, writer: CheckpointWriter, team: Ranks, monitor: Monitor
) -> torch.Tensor:
    tokens = None
    if team.first and writer.has(CALIBRATION_KEY):
        tokens = writer.read(CALIBRATION_KEY)[0]["tokens"]
    elif team.first:
        with monitor.phase("calibration text"):
            tokens = _make_tokens(source, model, recipe, monitor)
        writer.write(CALIBRATION_KEY, {"tokens": tokens})
    return team.from_first(tokens)


def _make_tokens(source: Source, model: StreamedModel, recipe: Recipe, monitor: Monitor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    if recipe.calibration == "self":
        _check_whole_fits(source, model)
        with (
            monitor.phase("loading the whole model"),
            explained(f"{source.name}: transformers cannot load the model"),
        ):
            # Plain attention: for one token at a time the fused kernels of a CPU take much longer.
            whole = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=model.dtype, attn_implementation="eager", trust_remote_code=False
            )
            whole = whole.to(model.device).eval()
        bos = source.config.get_text_config().bos_token_id
        return calibration.from_model(whole, bos, recipe.samples, recipe.seq_len, recipe.seed, monitor)
    try:
        tokenizer = load_tokenizer(str(source.folder))
    except RiaError as error:
        raise RiaError(f"{error} Use --calibration self.") from None
    tokens = calibration.from_text(recipe.calibration, tokenizer, recipe.samples, recipe.seq_len, recipe.seed)
    vocabulary = model.model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise RiaError(f"{source.name}: its tokenizer makes token {int(tokens.max())}, the model knows {vocabulary}.")
    return tokens


def _check_whole_fits(source: Source, model: StreamedModel) -> None:
    """Only sampling needs the dense model as a whole; a process that takes more than there is is killed unasked."""
    needed = sum(parameter.numel() for parameter in model.model.parameters()) * model.dtype.itemsize
    devices = {model.device, torch.device("cpu")}  # it is read into the host's memory first
    room = {device: free for device in devices if (free := available(device)) is not None}
    for device, free in room.items():
        if needed > free:
            smaller, least = "", needed * model.stored_dtype.itemsize // model.dtype.itemsize
            if least < needed and least <= min(room.values()):
                narrow = name_of(model.stored_dtype)
                smaller = f" Or give --compute-dtype {narrow}, which takes half as much and more time."
            raise RiaError(
                f"{source.name}: --calibration self runs the whole dense model in {name_of(model.dtype)}, "
                f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free ({device}). Give a text file to "
                f"--calibration: with that, decoder layers are in memory one at a time.{smaller}"
            )


def _sensitive(
    model: StreamedModel,
    tokens: torch.Tensor,
    cache: Path | None,
    recipe: Recipe,
    writer: CheckpointWriter,
    team: Ranks,
    monitor: Monitor,
) -> list[str]:
    """Linears to keep dense, chosen in a pass over the dense model before anything is pruned."""
    if not recipe.skip_sensitive:
        return []
    if not team.from_first(writer.has(SENSITIVITY_KEY)):
        layers = LayerPass(model, tokens, cache, recipe, team, monitor, follow=False)
        plan = make_plan(model, layers.topology, recipe)
        monitor.say("measuring what pruning does to each linear")
        records = {}
        for index in monitor.layers(range(len(model.layers)), len(model.layers)):
            records |= layers.measure(index, plan)
        if team.first:
            chosen = most_sensitive(records, recipe.skip_sensitive, plan.together)
            writer.write(SENSITIVITY_KEY, {}, {"chosen": chosen})
        team.wait()
    return writer.record(SENSITIVITY_KEY)["chosen"]


def _say_layer(records: dict[str, dict[str, Any]], monitor: Monitor) -> None:
    for name, record in records.items():
        text = f"{name}: retained score {record['retained_before']:.4f} -> {record['retained_after']:.4f}"
        if "error_after" in record:
            text += f", output error {record['error_before']:.4f} -> {record['error_after']:.4f}"
        monitor.say(text)


def _report(
    source: Source, recipe: Recipe, model: StreamedModel, plan: Plan, writer: CheckpointWriter
) -> dict[str, Any]:
    linears: dict[str, Any] = {}
    for index in range(len(model.layers)):
        linears |= dict(sorted(writer.record(layer_key(index)).items()))
    return {"recipe": recipe.dump(source.name), "linears": linears, "dense": dict(plan.dense)}


def _finish(
    source: Source,
    model: StreamedModel,
    recipe: Recipe,
    topology: Topology,
    plan: Plan,
    settings: Settings,
    writer: CheckpointWriter,
    report: dict[str, Any],
    others: tuple[dict[str, Any], list[Path]],
    monitor: Monitor,
) -> None:
    keys = []
    for number, name in enumerate(model.names_outside_layers()):
        keys.append(f"outside-{number:05d}")
        writer.write(keys[-1], {name: model.read(name)})
    keys += [layer_key(index) for index in range(len(model.layers))]
    _check_nothing_lost(model, set(report["linears"]), [name for key in keys for name in writer.names(key)])
    json_files, copies = others
    config = json_files["config.json"]
    pruned = sum(record["shape"][0] * record["shape"][1] for record in report["linears"].values())
    total = sum(m.weight.numel() for layer in model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    zeros = round((1 - recipe.pattern.density) * pruned / total, 6)
    if recipe.served:
        sparsity = SparsityConfig(ignore=list(plan.dense), global_sparsity=zeros)
        folds = topology.absolute_folds(model.written_linear, len(model.layers))
        words = recipe.weight_format.quantization
        weights = None if words is None else WeightQuantization(**words, dtype=name_of(model.stored_dtype))
        schema = RiaSchema(sparsity_config=sparsity, weights=weights, folds=folds, recipe=recipe.dump(source.name))
        config["quantization_config"] = schema.model_dump(mode="json", exclude_none=True)
    json_files = json_files | {REPORT_FILE: report}
    permuted = recipe.served and recipe.permute != "none"
    cards = {CARD_FILE: pruned_card(source.folder, report, zeros, recipe.served, monitor.warn)}
    writer.finish(keys, json_files, copies, settings.max_shard_size, permuted, cards)


def _other_files(source: Source) -> tuple[dict[str, Any], list[Path]]:
    """What goes with the weights: JSON files by their names, without paths of this machine, and files to copy."""
    json_files, copies = {"config.json": without_paths(source.raw_config)}, source.small_files()
    for path in [path for path in copies if path.name == TOKENIZER_FILE]:
        json_files[path.name] = without_paths(read_json(path))
        copies.remove(path)
    return json_files, copies


def _planned(model: StreamedModel) -> list[str]:
    """The written names of all tensors that will be read, to be copied or pruned."""
    layers = (model.names_in_layer(index) for index in range(len(model.layers)))
    return [*model.names_outside_layers(), *(name for names in layers for name in names)]


def _check_nothing_lost(model: StreamedModel, pruned: set[str], written: list[str]) -> None:
    """Every tensor of the source is written once, by its own name, as it was or compressed.

    Only what is left out on purpose (`names.LEFT_OUT`) is not.
    """
    counts = Counter(written)
    for name in model.files:
        mine = model.names.written(name)
        if mine is None:
            continue
        linear = mine.removesuffix(".weight")
        there = counts[mine] + (counts[f"{linear}.compressed"] if linear in pruned else 0)
        if there != 1:
            wrong = {0: "missing in the output", 2: "in the output twice"}.get(there, f"in the output {there} times")
            raise RiaError(f"{model.files[name]}: {name} would be {wrong}. Report this as a defect of ria-vllm.")
