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
from ria_vllm.format.schema import REPORT_FILE
from ria_vllm.format.weight_format import name_of
from ria_vllm.hub.model_card import CARD_FILE
from ria_vllm.offline import digests
from ria_vllm.offline.calibration.written import Prompts, from_model, told
from ria_vllm.offline.distill.recipe import TEXT_SEED, Distillation
from ria_vllm.offline.distill.report import card_of, with_training
from ria_vllm.offline.distill.state import Work
from ria_vllm.offline.distill.student.student import Student
from ria_vllm.offline.distill.teacher import Origin, located
from ria_vllm.offline.distill.text import (
    check_texts,
    context_of,
    held_out_texts,
    same_tokens,
    training_text,
)
from ria_vllm.offline.distill.train import Training
from ria_vllm.offline.model.run.architecture import text_config
from ria_vllm.offline.model.run.dtypes import choose_dtype
from ria_vllm.offline.model.run.hf import load_model, load_tokenizer, stored_dtype, text_tokenizer
from ria_vllm.offline.run.work import begun_run, work_folder
from ria_vllm.offline.self_written import check_vocabulary, spread_among
from ria_vllm.progress import Monitor

TEXT_KEY = "text"


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
    with monitor.live(), inputs.watched():
        reader = _opened(folder)
        begun = begun_run(out) if settings.resume else {}
        origin = located(teacher, reader.schema.recipe, begun, monitor)
        inputs.stamps(origin.folder)
        longest = context_of([str(folder), str(origin.folder)])
        if longest is not None and recipe.seq_len > longest:
            monitor.warn(f"--seq-len {recipe.seq_len}: these models read at most {longest} tokens; so do sequences.")
            recipe = recipe.with_options(seq_len=longest)
        stored = reader.linear(reader.sparse_names[0]).dtype
        asked = recipe.compute_dtype
        if asked == "auto" and stored_dtype(origin.folder) == torch.float32:  # no weight of the teacher is rounded
            asked = "float32"
        chosen = choose_dtype(stored, settings.device, asked, training=True)
        if chosen != stored:
            monitor.say(f"computing in {name_of(chosen)}, writing {name_of(stored)}")
        recipe = recipe.with_options(compute_dtype=name_of(chosen))
        names = origin.name, str(folder)
        same_tokens(load_tokenizer(str(origin.folder)), load_tokenizer(str(folder)), names)
        run = fingerprint(reader, origin, recipe, inputs) | {"device": settings.device.type}
        kept = ("*", "The text and the steps so far")
        with work_folder(out, run, settings.overwrite, settings.resume, kept) as writer:
            return _Run(reader, origin, recipe, settings, writer, monitor, inputs).distill()


def _opened(folder: Path) -> Reader:
    """The folder that training starts from.

    Raises:
        RiaError: ria-vllm did not write it, or it is damaged.
    """
    if (folder / "config.json").is_file() and not is_compressed(folder):
        raise RiaError(
            f"{folder}: not a folder that `ria-vllm compress` wrote. If it is pruned already, "
            f"`ria-vllm compress {folder} -o NEW` keeps its zeros: distil NEW."
        )
    reader = Reader(folder)
    if not reader.sparse_names:
        raise RiaError(f"{folder}: no linear in it is pruned, so there is nothing to train.")
    return reader


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


@dataclass(frozen=True)
class _Run:
    """One distillation, and what its steps need."""

    reader: Reader
    teacher: Origin
    recipe: Distillation
    settings: Settings
    writer: CheckpointWriter
    monitor: Monitor
    inputs: Inputs

    def distill(self) -> dict[str, Any]:
        folders = str(self.reader.folder), str(self.teacher.folder)
        # First, so that an error in them shows at once.
        copies = companions(self.reader.folder)
        self.reader.report()
        with self.monitor.phase("digests of files"):
            of_files = self._digests()
        texts = held_out_texts(self.recipe, load_tokenizer(folders[0]), context_of(folders))
        drawn = None
        if self.recipe.text != "self" and not self.writer.has(TEXT_KEY):
            drawn = training_text(self.recipe, text_tokenizer(self.reader.folder), self.monitor)
        with self.monitor.phase("loading the teacher"):
            dense = self._loaded(folders[1]).requires_grad_(False)
        with self.monitor.phase("loading the pruned model"):
            student = Student(self.reader, self._loaded(folders[0]), self.settings.save_memory)
        words, known = (model.get_output_embeddings().weight.shape[0] for model in (student.model, dense))
        if words != known:
            raise RiaError(
                f"{folders[0]}: predicts {words} tokens, but {self.teacher.name} {known}. Give the model that it was "
                "pruned from as --teacher."
            )
        windows = self._windows(dense, drawn)
        check_vocabulary([windows, *texts.values()], words, self.teacher.name)
        of_files |= self.writer.record(TEXT_KEY)
        work = Work(self.writer)
        course = Training(
            self.recipe, student, dense, windows, texts, work, self.monitor, self.inputs, self.settings.save_every
        ).run()
        this = self.recipe.dump(self.teacher.name, self.teacher.revision) | {"device": self.settings.device.type}
        this |= of_files | {"steps": course.step} | ({"kept_step": course.kept} if course.best else {})
        report = with_training(self.reader, this, course.curve)
        with self.monitor.phase("writing"):
            self._finish(work.results(student.trained, course.kept), report, copies)
        return report

    def _loaded(self, name: str) -> Any:
        """A model on its device."""
        return load_model(name, self.settings.device, self.recipe.compute_dtype, training=True)

    def _windows(self, dense: Any, drawn: tuple[torch.Tensor, dict[str, str]] | None) -> torch.Tensor:
        """The windows to train on, once the teacher has written its part.

        They are a part of a file in the work folder, which is in memory as far as there is room.

        Args:
            drawn: those that it does not write, and what they are from; None: it writes all, or they are there.
        """
        recipe = self.recipe
        if not self.writer.has(TEXT_KEY):
            windows, origin = drawn or (torch.empty(0, recipe.seq_len, dtype=torch.int32), {})
            if count := recipe.windows - len(windows):
                with self.monitor.phase("writing the text"):
                    bos = getattr(text_config(dense.config), "bos_token_id", None)
                    prompts = Prompts.of(dense, text_tokenizer(self.reader.folder))
                    own = from_model(dense, bos, count, recipe.seq_len, recipe.seed + TEXT_SEED, self.monitor, prompts)
                windows, origin = spread_among(windows, own), origin | told(prompts, recipe.seq_len)
            self.writer.write(TEXT_KEY, {"tokens": windows}, origin)
        return self.writer.read(TEXT_KEY)[0]["tokens"]

    def _digests(self) -> dict[str, Any]:
        """Of the texts and local models that the recipe names, and of the folder that training starts from."""
        found: dict[str, Any] = {}
        if self.recipe.eval_text:
            found["eval_text_sha256"] = [digests.sha256(path) for path in self.recipe.eval_text]
        found["student_weights_digest"] = digests.of_weights(self.reader.folder)
        if self.teacher.revision is None:
            found["teacher_weights_digest"] = digests.of_weights(self.teacher.folder)
            if found["teacher_weights_digest"] == found["student_weights_digest"]:
                raise RiaError(
                    f"--teacher {self.teacher.name}: the same weights as {self.reader.folder}. Give the dense model "
                    "that it was pruned from."
                )
        return found

    def _finish(self, results: dict[str, str], report: dict[str, Any], copies: dict[str, Path]) -> None:
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
        files = {"config.json": config, REPORT_FILE: report, CARD_FILE: card}
        writer.finish(keys, files, copies, self.settings.max_shard_size, reader.schema.permutes, self.inputs)
