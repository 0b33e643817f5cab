"""Turns a compressed folder into a plain dense one, one tensor in memory at a time."""

from pathlib import Path

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter, check_place, discarded_on_failure
from ria_vllm.hub.model_card import CARD_FILE, exported_card
from ria_vllm.progress import Monitor


def export_dense(
    reader: Reader, out: Path, max_shard_size: int, overwrite: bool = False, monitor: Monitor | None = None
) -> None:
    """Write `out`: the model's own channel order, zeros where pruned, no quantization_config.

    The folder appears whole or not at all. Experts are stacked as in the dense model's files; besides a stacked tensor,
    only one of its experts is in memory.

    Args:
        max_shard_size: bytes.
        monitor: shows the finished tensors, and warns of a model card that cannot be read.

    Raises:
        RiaError: `out` exists (unless `overwrite`), or is or contains the folder being read; a tensor is damaged; a
            file is a link out of the folder; the folder has changed since `reader` opened it; the disk is full.
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
        files = {"config.json": config, CARD_FILE: exported_card(reader, monitor.warn)}
        with monitor.phase("writing"):
            writer.finish(keys, files, companions(reader.folder), max_shard_size, inputs=reader.inputs)
