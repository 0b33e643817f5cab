"""A whole distillation: a pruned folder and its dense parent in, a better folder out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint import is_compressed
from ria_vllm.export import companion_files, kept_copies
from ria_vllm.inputs import Inputs
from ria_vllm.model_card import CARD_FILE, pruned_card
from ria_vllm.offline import digests
from ria_vllm.offline.calibration import data
from ria_vllm.offline.calibration.mixture import spread_among
from ria_vllm.offline.distill.checks import (
    check_models,
    check_texts,
    context_of,
    fitting,
    warn_of_the_same_windows,
)
from ria_vllm.offline.distill.foreign import ForeignStart
from ria_vllm.offline.distill.heldout import HeldOut
from ria_vllm.offline.distill.logits import TwoPart
from ria_vllm.offline.distill.origin import Origin, located, recorded_commit
from ria_vllm.offline.distill.parameters import AdamW, Pace
from ria_vllm.offline.distill.processes import joined
from ria_vllm.offline.distill.progress import Course
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.sharding import shard
from ria_vllm.offline.distill.start import Start
from ria_vllm.offline.distill.state import Work
from ria_vllm.offline.distill.student import Student
from ria_vllm.offline.distill.teacher import Answer, CachedTeacher, Teacher, fill_cache, most_probable
from ria_vllm.offline.distill.text import TrainingText, check_vocabulary, held_out_texts, training_text
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.model.architecture import output_head, text_config
from ria_vllm.offline.model.dtypes import choose_dtype
from ria_vllm.offline.model.hf import load_model, load_tokenizer, stored_dtype, text_tokenizer
from ria_vllm.offline.model.source_tensors import SourceTensors
from ria_vllm.offline.publish import published
from ria_vllm.offline.runtime.memory import release
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.work import begun_run, not_shared, work_folder
from ria_vllm.progress import Monitor
from ria_vllm.report import without_errors
from ria_vllm.schema import REPORT_FILE
from ria_vllm.weight_format import name_of
from ria_vllm.writer import CheckpointWriter, check_free, check_place

TEXT_KEY = "text"
DRAWN_KEY = "drawn"  # the part of it that the teacher does not write, if there are two


@dataclass(frozen=True)
class Settings:
    """How a distillation runs. Nothing here changes the result, except that devices round differently, and so do sums
    over the parts of a divided model.

    shard: divide the models and the optimizer state among the processes, by rows; otherwise each has all of them.
    """

    device: torch.device = torch.device("cpu")
    save_memory: bool = True
    shard: bool = False
    save_every: float = 600.0
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    resume: bool = False


def distill(
    folder: Path,
    teacher: str,
    out: Path,
    recipe: Distillation,
    settings: Settings,
    monitor: Monitor,
    drawn: TrainingText | None = None,
    inputs: Inputs | None = None,
) -> dict[str, Any]:
    """Train the kept weights of `folder` towards the predictions of `teacher`, and write `out`.

    Args:
        drawn: from the text, if the caller has it already.
        inputs: what must not have changed, if this is a part of a longer run.

    Returns:
        The report, as written to `out`.

    Raises:
        RiaError: bad input, or one that has changed meanwhile. Nothing is left at `out`, nor beside it unless
            `--resume` can continue from it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    for place in (folder, Path(teacher)):
        check_place(out, place)
    check_texts(out, recipe)
    check_free(out, settings.overwrite)
    inputs = Inputs() if inputs is None else inputs
    for place in (folder, *texts_of(recipe)):
        inputs.stamps(place)
    with joined(settings.device) as (ranks, device), monitor.live(), inputs.watched():
        settings = replace(settings, device=device)
        recipe = recipe.among(ranks.size)
        start = Start(folder) if is_compressed(folder) else ForeignStart(folder, monitor.warn)
        begun = begun_run(out) if settings.resume and ranks.first else {}
        origin = located(teacher, recorded_commit(teacher, begun, start.schema.recipe), ranks, monitor)
        inputs.stamps(origin.folder)
        origin.check_resumed(begun)
        dtype = _compute_dtype(start, origin.folder, recipe.compute_dtype, device, monitor)
        recipe = fitting(replace(recipe, compute_dtype=dtype), (str(folder), str(origin.folder)), monitor)
        check_models(start, origin, recipe, settings.shard and ranks.size > 1)
        warn_of_the_same_windows(recipe, start.schema.recipe, folder, monitor)
        kept = ("*", "The text and the steps so far")
        run = fingerprint(start, origin, recipe, inputs) | rounding_of(settings, ranks)
        with work_folder(out, run, settings.overwrite, settings.resume, ranks, kept) as writer:
            return _Run(start, origin, recipe, settings, writer, ranks, monitor, drawn, inputs).distill()


def _compute_dtype(
    start: Start | ForeignStart, teacher: Path, asked: str, device: torch.device, monitor: Monitor
) -> str:
    """The dtype to compute in: by default one that rounds no weight of a teacher in float32."""
    stored, of_teacher = start.linear(start.linears[0]).dtype, stored_dtype(teacher)
    if of_teacher is None and not is_compressed(teacher):  # config.json does not say
        of_teacher = SourceTensors(teacher, None).dtype
    if asked == "auto" and of_teacher == torch.float32:
        asked = "float32"
    chosen = choose_dtype(stored, device, asked, training=True)
    if chosen != stored:
        monitor.say(f"computing in {name_of(chosen)}, writing {name_of(stored)}")
    return name_of(chosen)


def texts_of(recipe: Distillation) -> list[Path]:
    """The local files among its texts."""
    return [path for path in map(Path, (*recipe.eval_text, recipe.text)) if path.is_file()]


def fingerprint(start: Start | ForeignStart, origin: Origin, recipe: Distillation, inputs: Inputs) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, as read back from JSON."""
    stamps = {
        "state of the texts": [[path.name, inputs.stamps(path)] for path in texts_of(recipe)],
        "state of the folder": inputs.stamps(start.folder),
        "state of the teacher": inputs.stamps(origin.folder) if origin.revision is None else {},
    }
    full = {"folder": str(start.folder), "teacher": origin.name, "text": recipe.text}  # this stays in the work folder
    return json.loads(json.dumps(recipe.dump(origin.name, origin.revision) | full | stamps))


def rounding_of(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """What results are rounded by besides the recipe's options: sums over processes have another order."""
    shard = settings.shard and ranks.size > 1
    return {"processes": ranks.size, "shard": shard, "device": settings.device.type}


def hardware(device: torch.device) -> dict[str, Any]:
    """What kernels are chosen by, which round differently too; a resumed run may have another."""
    if device.type == "cuda":
        return {"hardware": torch.cuda.get_device_name(device)}
    return {"hardware": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


@dataclass(frozen=True)
class _Run:
    """One distillation, and what its steps need."""

    start: Start | ForeignStart
    teacher: Origin
    recipe: Distillation
    settings: Settings
    writer: CheckpointWriter
    ranks: Ranks
    monitor: Monitor
    drawn: TrainingText | None
    inputs: Inputs

    def distill(self) -> dict[str, Any]:
        recipe, monitor = self.recipe, self.monitor
        # First, so that an error in them shows at once.
        copies, measured = companion_files(self.start.folder, monitor.warn), self.start.report()
        texts, text = self._held_out(), self._text()
        with monitor.phase("digests of files"):
            of_files = self.ranks.broadcast(self._digests() if self.ranks.first else None)
        with monitor.phase("loading the teacher"):
            dense = self._loaded(str(self.teacher.folder))
            dense.model.requires_grad_(False)
            if self.sharded:
                shard(dense, self.settings.device)
        vocabulary = output_head(dense.model).weight.shape[0]
        windows = self._written(dense) if text is None else text
        check_vocabulary([windows, *texts.values()], vocabulary, self.teacher.name)
        answers: Any = Teacher(dense, layers=bool(recipe.loss.hidden))
        plain: Teacher | None = Teacher(dense)
        if recipe.cache_teacher:
            mine = self.ranks.share(len(windows))
            k, temperature = recipe.loss.top_k, recipe.loss.temperature
            most = self.ranks.largest if self.sharded else None
            fill_cache(self.writer, dense, windows, k, temperature, monitor, mine, most)
            self.ranks.barrier()
            answers, plain = CachedTeacher(self.writer, self.settings.device), None
        of_held_out = self._of_held_out(texts, dense)
        del dense
        release(self.settings.device)
        with monitor.phase("loading the pruned model"):
            add = self.ranks.all_reduce
            pace = Pace(total=add) if self.sharded else Pace(reduce=add)
            student = self._student(pace)
        held_out = HeldOut(texts, of_held_out, plain)
        part = f"-{self.ranks.rank}-of-{self.ranks.size}" if self.sharded else ""
        work = Work(self.writer, part, self.ranks.first)
        course = Training(
            recipe, student, pace, answers, plain, windows, held_out, work, self.ranks, monitor, self.inputs,
            self.settings.save_every, self.sharded,
        ).run()  # fmt: skip
        report = self._report(course, of_files, measured)
        if self.ranks.first:
            with monitor.phase("writing"):
                step = course.best[0] if course.best else course.step
                self._finish(work.results(student.trained, step), report, copies)
        self.ranks.barrier()
        return report

    @property
    def sharded(self) -> bool:
        """Whether each process has only some rows of the models."""
        return self.settings.shard and self.ranks.size > 1

    def _loaded(self, name: str, state: dict[str, torch.Tensor] | None = None) -> TwoPart:
        """A model on its device; on the CPU if it is yet to be divided."""
        device = torch.device("cpu") if self.sharded else self.settings.device
        return TwoPart(load_model(name, device, self.recipe.compute_dtype, state, training=True), name)

    @property
    def _drawn_key(self) -> str:
        """Of the windows that are drawn from a text, and of what it is."""
        return DRAWN_KEY if self.recipe.windows_written else TEXT_KEY

    def _text(self) -> torch.Tensor | None:
        """The windows to train on; None if the teacher has yet to write them, or some of them."""
        if self.ranks.first and self.recipe.text != "self" and not self.writer.has(self._drawn_key):
            drawn = self.drawn or self._draw()
            self.writer.write(self._drawn_key, {"tokens": drawn.windows}, drawn.origin)
        return self._stored_text() if self.ranks.broadcast(self.writer.has(TEXT_KEY)) else None

    def _draw(self) -> TrainingText:
        start = self.start
        return training_text(self.recipe, text_tokenizer(start.folder), start.schema.recipe, self.monitor)

    def _stored_text(self) -> torch.Tensor:
        """The windows in the work folder: a part of the file, which is in memory as far as there is room.

        Raises:
            RiaError: this process does not see what the first one has written.
        """
        if not self.writer.has(TEXT_KEY):
            raise not_shared(self.writer.path(TEXT_KEY), self.ranks.rank)
        return self.writer.read(TEXT_KEY)[0]["tokens"]

    def _written(self, dense: TwoPart) -> torch.Tensor:
        """The windows to train on, once the teacher has written its part. If it is divided, all processes ask."""
        recipe = self.recipe
        count = recipe.windows_written or recipe.windows
        if self.ranks.first or self.sharded:
            with self.monitor.phase("writing the text"):
                bos = getattr(text_config(dense.model.config), "bos_token_id", None)
                found = data.from_model(dense.model, bos, count, recipe.seq_len, recipe.text_seed, self.monitor).int()
            if self.ranks.first:
                if recipe.windows_written:
                    found = spread_among(self.writer.read(DRAWN_KEY)[0]["tokens"], found)
                self.writer.write(TEXT_KEY, {"tokens": found})
        self.ranks.barrier()
        return self._stored_text()

    def _held_out(self) -> dict[str, torch.Tensor]:
        folder = str(self.start.folder)
        return held_out_texts(self.recipe, load_tokenizer(folder), context_of((folder, str(self.teacher.folder))))

    def _of_held_out(self, texts: dict[str, torch.Tensor], dense: TwoPart) -> dict[str, list[Answer]]:
        """What the teacher says of each window of the held-out texts."""
        answers: dict[str, list[Answer]] = {name: [] for name in texts}
        windows = [(name, window) for name, found in texts.items() for window in found]
        for name, window in self.monitor.steps(windows, "asking about held-out text", len(windows)):
            if self.recipe.cache_teacher:
                answer = Answer(top=most_probable(dense, window, self.recipe.loss.top_k, 1.0))
            else:
                answer = Teacher(dense).answer(window[None].to(dense.model.device), [])
            answers[name].append(answer)
        return answers

    def _student(self, pace: Pace) -> Student:
        recipe = self.recipe
        model = self._loaded(str(self.start.folder), self.start.state())
        adamw = AdamW(weight_decay=recipe.weight_decay, clip=recipe.clip)
        rows_on = self.settings.device if self.sharded else None
        return Student(self.start, model, adamw, pace, recipe.train, self.settings.save_memory, rows_on)

    def _digests(self) -> dict[str, Any]:
        """Of the texts and local models that the recipe names, and of the folder that training starts from."""
        found: dict[str, Any] = self.writer.record(self._drawn_key) if self.writer.has(self._drawn_key) else {}
        if self.recipe.eval_text:
            found["eval_text_sha256"] = [digests.sha256(path) for path in self.recipe.eval_text]
        found["student_weights_digest"] = digests.of_weights(self.start.folder)
        if self.teacher.revision is None:
            found["teacher_weights_digest"] = digests.of_weights(self.teacher.folder)
        return found

    def _report(self, course: Course, of_files: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
        """The report; `of_files` is what `_digests` found, `measured` the report of the folder that was trained."""
        recipe = self.start.schema.recipe
        found: dict[str, Any] = {"linears": {}} | without_errors(measured)
        this = self.recipe.dump(self.teacher.name, self.teacher.revision)
        this |= rounding_of(self.settings, self.ranks) | hardware(self.settings.device) | of_files
        this["steps"] = course.step
        if course.best:
            this["kept_step"] = course.best[0]
        earlier = recipe.get("distill")
        runs = [*(earlier if isinstance(earlier, list) else []), this]
        curves = found.get("distill") if isinstance(found.get("distill"), list) else []
        return found | {"recipe": recipe | {"distill": runs}, "distill": [*curves, {"curve": course.curve}]}

    def _finish(self, results: dict[str, str], report: dict[str, Any], copies: list[Path]) -> None:
        """Join the trained tensors and all others into the finished folder."""
        start, writer = self.start, self.writer
        keys = []
        for number, name in enumerate([*start.linears, *start.others]):
            if name not in results:
                results[name] = f"other-{number:06d}"
                writer.write(results[name], {name: start.others[name]})
            keys.append(results[name])
        quantization = start.config["quantization_config"]
        recipe = quantization.get("recipe", {}) | {"distill": report["recipe"]["distill"]}
        config = start.config | {"quantization_config": quantization | {"recipe": recipe}}
        card = self._card(report)
        copies, copied_from = kept_copies(writer, copies, start.folder)
        self.inputs.check()
        writer.finish(
            keys, {"config.json": config, REPORT_FILE: report}, copies, self.settings.max_shard_size,
            start.schema.permutes, {CARD_FILE: card}, copied_from,
        )  # fmt: skip

    def _card(self, report: dict[str, Any]) -> str:
        zeros = self.start.schema.sparsity_config.global_sparsity
        recipe = {key: value for key, value in report["recipe"].items() if key != "distill"}
        recipe = {"source": published(self.teacher.name), "pattern": "2:4"} | recipe
        card = pruned_card(self.start.folder, report | {"recipe": recipe}, zeros, True, self.monitor.warn)
        return card + "\n" + recovery_section(report["recipe"]["distill"])


def recovery_section(runs: Sequence[dict[str, Any]]) -> str:
    """The part of a model card that says how the kept weights were trained."""
    lines = ["## Recovery", "", "After pruning, the kept weights were trained towards the dense model's predictions."]
    for run in runs:
        shown = {key: value for key, value in run.items() if key != "versions" and _says_something(value)}
        lines += ["", "| option | value |", "| --- | --- |"]
        for key, value in shown.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"| {key} | `{text.replace('`', chr(39)).replace('|', ' ')}` |")
        if shown.get("kept_step") == 0:
            lines += ["", "Step 0 was kept: the weights are those from before this training, which made none better."]
    return "\n".join(lines) + "\n"


def _says_something(value: Any) -> bool:
    """Whether an option is set; a 0, which equals False, is a value like others."""
    return value is not None and value is not False and value not in ([], "")
