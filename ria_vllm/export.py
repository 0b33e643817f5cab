"""Turns a compressed folder back into a plain dense Hugging Face folder, one tensor in memory at a time."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ria_vllm.checkpoint.companions import leads_out, left_where_it_is, nested_companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.weight_files import INDEX_FILE
from ria_vllm.checkpoint.writer import CheckpointWriter, check_place, discarded_on_failure, disk_errors
from ria_vllm.format.schema import EXPORTED_KEY, PERMUTATIONS_FILE, REPORT_FILE
from ria_vllm.hub.model_card import CARD_FILE, exported_card
from ria_vllm.progress import Monitor

OWN_FILES = {"config.json", INDEX_FILE, PERMUTATIONS_FILE, REPORT_FILE, CARD_FILE}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


def companion_files(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The files besides the weights that a dense folder needs too: tokenizer, templates, generation config."""
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in OWN_FILES and path.suffix not in WEIGHT_SUFFIXES
    ]
    found += nested_companions(folder)
    strays = [path for path in found if leads_out(path, folder)]
    for path in strays:
        warn(left_where_it_is(path))
    return [path for path in found if path not in strays]


def kept_copies(writer: CheckpointWriter, files: Iterable[Path], folder: Path) -> tuple[list[Path], Path]:
    """Copy files of a folder to the work folder, so that `CheckpointWriter.finish` reads none of the run's inputs.

    Returns:
        What `finish` takes as `copies` and `copied_from`.

    Raises:
        RiaError: a file cannot be read, or the disk is full.
    """
    kept = writer.work / "copies"
    found: list[Path] = []
    with disk_errors(kept):
        for path in files:
            found.append(kept / path.relative_to(folder))
            found[-1].parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, found[-1])
    return found, kept


def export_dense(
    reader: Reader,
    out: Path,
    max_shard_size: int,
    overwrite: bool = False,
    monitor: Monitor | None = None,
) -> None:
    """Write `out`: the model's own channel order, zeros where pruned, no quantization_config.

    config.json says that this program has exported it: adapters of the dense model may not fit.

    The folder appears whole or not at all. Experts are stacked as in the dense model's files; besides a stacked tensor,
    only one of its experts is in memory.

    Args:
        max_shard_size: bytes.
        monitor: shows the finished tensors and warns of what is left out: a model card that cannot be read, links that
            lead out of the folder.

    Raises:
        RiaError: `out` exists (unless `overwrite`), or is or contains the folder being read; a tensor is damaged; the
            folder has changed since `reader` opened it; the disk is full.
    """
    monitor = monitor or Monitor(shown=False)
    check_place(out, reader.folder)
    writer = CheckpointWriter(out, overwrite=overwrite)
    keys = []
    with discarded_on_failure(writer), reader.inputs.watched():
        tensors = reader.dense_tensors()
        for number, name in enumerate(monitor.steps(list(tensors), "exporting", len(tensors))):
            keys.append(f"{number:06d}")
            writer.write(keys[-1], {name: tensors[name]()})
        config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
        config[EXPORTED_KEY] = "ria-vllm"
        cards = {CARD_FILE: exported_card(reader, monitor.warn)}
        copies, folder = kept_copies(writer, companion_files(reader.folder, monitor.warn), reader.folder)
        reader.inputs.check()
        with monitor.phase("writing"):
            writer.finish(keys, {"config.json": config}, copies, max_shard_size, text_files=cards, copied_from=folder)
