"""A whole distillation: a pruned folder and its dense parent in, a better folder out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.inputs import Inputs
from ria_vllm.checkpoint.reader import Reader, is_compressed
from ria_vllm.checkpoint.writer import CheckpointWriter, check_free, check_place
from ria_vllm.errors import RiaError
from ria_vllm.export import kept_copies
from ria_vllm.format.schema import REPORT_FILE
from ria_vllm.format.weight_format import name_of
from ria_vllm.hub.model_card import CARD_FILE
from ria_vllm.offline import digests
from ria_vllm.offline.calibration import data
from ria_vllm.offline.distill.checks import check_models, check_texts, context_of
from ria_vllm.offline.distill.recipe import Distillation
from ria_vllm.offline.distill.report import card_of, with_training
from ria_vllm.offline.distill.state import Work
from ria_vllm.offline.distill.student.parameters import AdamW, Pace
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher.teacher import Origin, located, read
from ria_vllm.offline.distill.teacher.two_part import TwoPart
from ria_vllm.offline.distill.text import check_vocabulary, held_out_texts, training_text
from ria_vllm.offline.distill.train import HeldOut, Training
from ria_vllm.offline.model.files.source_tensors import SourceTensors
from ria_vllm.offline.model.run.architecture import output_head, text_config
from ria_vllm.offline.model.run.dtypes import choose_dtype
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer, stored_dtype, text_tokenizer
from ria_vllm.offline.run.work import begun_run, not_shared, work_folder
from ria_vllm.offline.runtime.ranks import Ranks, joined
from ria_vllm.offline.self_written import spread_among
from ria_vllm.progress import Monitor

TEXT_KEY = "text"
DRAWN_KEY = "drawn"  # the part of it that the teacher does not write, if there are two


@dataclass(frozen=True)
class Settings:
    """How a distillation runs. Nothing here changes the result, except that devices round differently."""

    device: torch.device = torch.device("cpu")
    save_memory: bool = True
    save_every: float = 600.0
    max_shard_size: int = 5 * 10**9
    overwrite: bool = False
    resume: bool = False


def distill(
    folder: Path, teacher: str, out: Path, recipe: Distillation, settings: Settings, monitor: Monitor
) -> dict[str, Any]:
    """Train the kept weights of `folder` towards the predictions of `teacher`, and write `out`.

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
    check_texts(out, recipe, monitor)
    check_free(out, settings.overwrite)
    inputs = Inputs()
    for place in (folder, *_files(recipe)):
        inputs.stamps(place)
    with joined(settings.device) as ranks, monitor.live(), inputs.watched():
        reader = _opened(folder)
        begun = begun_run(out) if settings.resume and ranks.first else {}
        origin = located(teacher, [begun, reader.schema.recipe], ranks, monitor)
        inputs.stamps(origin.folder)
        longest = context_of([str(folder), str(origin.folder)])
        if longest is not None and recipe.seq_len > longest:
            monitor.warn(f"--seq-len {recipe.seq_len}: these models read at most {longest} tokens; so do sequences.")
            recipe = recipe.with_options(seq_len=longest)
        dtype = _compute_dtype(reader, origin.folder, recipe.compute_dtype, settings.device, monitor)
        recipe = recipe.with_options(compute_dtype=dtype).among(ranks.size)
        check_models(reader, origin)
        run = fingerprint(reader, origin, recipe, inputs) | rounding_of(settings, ranks)
        kept = ("*", "The text and the steps so far")
        with work_folder(out, run, settings.overwrite, settings.resume, ranks, kept) as writer:
            return _Run(reader, origin, recipe, settings, writer, ranks, monitor, inputs).distill()


def _opened(folder: Path) -> Reader:
    """The folder that training starts from.

    Raises:
        RiaError: ria-vllm did not write it, or it is damaged.
    """
    if (folder / "config.json").is_file() and not is_compressed(folder):
        raise RiaError(
            f"{folder}: not a folder that `ria-vllm compress` wrote. If it is 2:4 already, `ria-vllm compress {folder} "
            "-o NEW` keeps its zeros: distil NEW."
        )
    reader = Reader(folder)
    if not reader.sparse_names:
        raise RiaError(f"{folder}: no linear in it is pruned, so there is nothing to train.")
    return reader


def _compute_dtype(reader: Reader, teacher: Path, asked: str, device: torch.device, monitor: Monitor) -> str:
    """The dtype to compute in: by default one that rounds no weight of a teacher in float32."""
    stored, of_teacher = reader.linear(reader.sparse_names[0]).dtype, stored_dtype(teacher)
    if of_teacher is None and not is_compressed(teacher):  # config.json does not say
        of_teacher = SourceTensors(teacher, None).dtype
    if asked == "auto" and of_teacher == torch.float32:
        asked = "float32"
    chosen = choose_dtype(stored, device, asked, training=True)
    if chosen != stored:
        monitor.say(f"computing in {name_of(chosen)}, writing {name_of(stored)}")
    return name_of(chosen)


def _files(recipe: Distillation) -> list[Path]:
    """The local files among its texts."""
    return [path for path in map(Path, (*recipe.eval_text, recipe.text)) if path.is_file()]


def fingerprint(reader: Reader, origin: Origin, recipe: Distillation, inputs: Inputs) -> dict[str, Any]:
    """Everything that the bytes of the result depend on, as read back from JSON."""
    stamps = {
        "state of the texts": [[path.name, inputs.stamps(path)] for path in _files(recipe)],
        "state of the folder": inputs.stamps(reader.folder),
        "state of the teacher": inputs.stamps(origin.folder) if origin.revision is None else {},
    }
    full = {"folder": str(reader.folder), "teacher": origin.name, "text": recipe.text}  # this stays in the work folder
    return json.loads(json.dumps(recipe.dump(origin.name, origin.revision) | full | stamps))


def rounding_of(settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """What results are rounded by besides the recipe's options: sums over processes have another order."""
    return {"processes": ranks.size, "device": settings.device.type}


@dataclass(frozen=True)
class _Run:
    """One distillation, and what its steps need."""

    reader: Reader
    teacher: Origin
    recipe: Distillation
    settings: Settings
    writer: CheckpointWriter
    ranks: Ranks
    monitor: Monitor
    inputs: Inputs

    def distill(self) -> dict[str, Any]:
        folders = str(self.reader.folder), str(self.teacher.folder)
        # First, so that an error in them shows at once.
        copies = companions(self.reader.folder)
        texts = held_out_texts(self.recipe, load_tokenizer(folders[0]), context_of(folders))
        self._draw()
        with self.monitor.phase("digests of files"):
            of_files = self.ranks.broadcast(self._digests() if self.ranks.first else None)
        with self.monitor.phase("loading the teacher"):
            dense = self._loaded(folders[1])
            dense.model.requires_grad_(False)
        windows = self._windows(dense)
        vocabulary = output_head(dense.model).weight.shape[0]
        check_vocabulary([windows, *texts.values()], vocabulary, self.teacher.name)
        held_out: HeldOut = {name: [] for name in texts}
        pairs = [(name, window) for name, found in texts.items() for window in found]
        for name, window in self.monitor.steps(pairs, "asking about held-out text", len(pairs)):
            held_out[name].append((window, read(dense, window[None].to(dense.model.device))))
        with self.monitor.phase("loading the pruned model"):
            student = self._student()
        work = Work(self.writer, self.ranks.first)
        course = Training(
            self.recipe, student, dense, windows, held_out, work, self.ranks, self.monitor, self.inputs,
            self.settings.save_every,
        ).run()  # fmt: skip
        this = self.recipe.dump(self.teacher.name, self.teacher.revision) | rounding_of(self.settings, self.ranks)
        this |= of_files | {"steps": course.step} | ({"kept_step": course.kept} if course.best else {})
        report = with_training(self.reader, this, course.curve)
        if self.ranks.first:
            with self.monitor.phase("writing"):
                self._finish(work.results(student.trained, course.kept), report, copies)
        self.ranks.barrier()
        return report

    def _loaded(self, name: str) -> TwoPart:
        """A model on its device."""
        return TwoPart(load_model(name, self.settings.device, self.recipe.compute_dtype, training=True), name)

    @property
    def _drawn_key(self) -> str:
        """Of the windows that are drawn from a text, and of what it is."""
        return DRAWN_KEY if self.recipe.windows_written else TEXT_KEY

    def _draw(self) -> None:
        """Put the windows of a text into the work folder, unless they are there."""
        if self.ranks.first and self.recipe.text != "self" and not self.writer.has(self._drawn_key):
            windows, origin = training_text(self.recipe, text_tokenizer(self.reader.folder), self.monitor)
            self.writer.write(self._drawn_key, {"tokens": windows}, origin)

    def _windows(self, dense: TwoPart) -> torch.Tensor:
        """The windows to train on, once the teacher has written its part.

        They are a part of a file in the work folder, which is in memory as far as there is room.

        Raises:
            RiaError: this process does not see what the first one has written.
        """
        recipe = self.recipe
        if not self.ranks.broadcast(self.writer.has(TEXT_KEY)):
            count = recipe.windows_written or recipe.windows
            if self.ranks.first:
                with self.monitor.phase("writing the text"):
                    bos = getattr(text_config(dense.model.config), "bos_token_id", None)
                    found = data.from_model(dense.model, bos, count, recipe.seq_len, recipe.text_seed, self.monitor)
                found = found.int()
                if recipe.windows_written:
                    found = spread_among(self.writer.read(DRAWN_KEY)[0]["tokens"], found)
                self.writer.write(TEXT_KEY, {"tokens": found})
            self.ranks.barrier()
        if not self.writer.has(TEXT_KEY):
            raise not_shared(self.writer.path(TEXT_KEY), self.ranks.rank)
        return self.writer.read(TEXT_KEY)[0]["tokens"]

    def _student(self) -> Student:
        pace = Pace(reduce=self.ranks.all_reduce)
        model = self._loaded(str(self.reader.folder))
        adamw = AdamW(weight_decay=self.recipe.weight_decay, clip=self.recipe.clip)
        return Student(self.reader, model, adamw, pace, self.settings.save_memory)

    def _digests(self) -> dict[str, Any]:
        """Of the texts and local models that the recipe names, and of the folder that training starts from."""
        found: dict[str, Any] = self.writer.record(self._drawn_key) if self.writer.has(self._drawn_key) else {}
        if self.recipe.eval_text:
            found["eval_text_sha256"] = [digests.sha256(path) for path in self.recipe.eval_text]
        found["student_weights_digest"] = digests.of_weights(self.reader.folder)
        if self.teacher.revision is None:
            found["teacher_weights_digest"] = digests.of_weights(self.teacher.folder)
        return found

    def _finish(self, results: dict[str, str], report: dict[str, Any], copies: list[Path]) -> None:
        """Join the trained tensors and all others into the finished folder."""
        reader, writer = self.reader, self.writer
        keys = []
        for number, name in enumerate([*reader.sparse_names, *reader.dense_names]):
            if name not in results:
                results[name] = f"other-{number:06d}"
                writer.write(results[name], {name: reader.tensor(name)})
            keys.append(results[name])
        config = reader.config | {
            "quantization_config": reader.config["quantization_config"] | {"recipe": report["recipe"]}
        }
        card = card_of(reader, self.teacher.name, report, self.monitor.warn)
        copies, copied_from = kept_copies(writer, copies, reader.folder)
        self.inputs.check()
        writer.finish(
            keys, {"config.json": config, REPORT_FILE: report}, copies, self.settings.max_shard_size,
            reader.schema.permutes, {CARD_FILE: card}, copied_from,
        )  # fmt: skip
