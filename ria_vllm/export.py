"""Turns a compressed folder into one that others read, one tensor in memory at a time: plain and dense, or
compressed-tensors'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter, check_place, discarded_on_failure
from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.pattern import TWO_OF_FOUR
from ria_vllm.format.schema import RiaSchema
from ria_vllm.hub.model_card import CARD_FILE, exported_card
from ria_vllm.progress import Monitor

# The last version of compressed-tensors with 2:4 weights. Its `sparse-24-bitmask` is `NAME.compressed`, `NAME.bitmask`
# and `NAME.shape`, with `NAME.weight_scale` beside them: our tensors, where no columns are permuted.
VERSION = "0.12.2"
FORMATS = {FLOAT: "dense", INT8: "int-quantized", FP8: "float-quantized"}


def export_dense(
    reader: Reader,
    out: Path,
    max_shard_size: int,
    overwrite: bool = False,
    monitor: Monitor | None = None,
    compressed: bool = False,
) -> None:
    """Write `out`: the model's own channel order, zeros where pruned, no quantization_config.

    If `compressed`, pruned linears stay as they are stored, and config.json describes them in compressed-tensors'
    words. What is dense in int8 becomes plain.

    The folder appears whole or not at all. Experts are stacked as in the dense model's files; besides a stacked tensor,
    only one of its experts is in memory.

    Args:
        max_shard_size: bytes.
        monitor: shows the finished tensors, and warns of a model card that cannot be read.

    Raises:
        RiaError: `out` exists (unless `overwrite`), or is or contains the folder being read; a tensor is damaged; a
            file is a link out of the folder; the folder has changed since `reader` opened it; the disk is full;
            compressed-tensors has no words for what it holds.
    """
    monitor = monitor or Monitor(shown=False)
    check_place(out, reader.folder)
    schema, words = reader.schema, {}
    if compressed:
        words = {"quantization_config": quantization_config(schema, reader.sparse_names, reader.permuted_names)}
    writer = CheckpointWriter(out, overwrite=overwrite)
    keys = []
    with discarded_on_failure(writer), reader.inputs.watched():
        tensors = reader.dense_tensors()
        stays = {f"{name}.weight": name for name in reader.sparse_names if compressed}
        for number, name in enumerate(monitor.steps(list(tensors), "exporting", len(tensors))):
            keys.append(f"{number:06d}")
            if name in stays:
                writer.write(keys[-1], reader.linear(stays[name]).tensors())
            else:
                writer.write(keys[-1], {name: tensors[name]()})
        config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
        config |= words
        files = {"config.json": config, CARD_FILE: exported_card(reader, monitor.warn, compressed)}
        with monitor.phase("writing"):
            writer.finish(keys, files, companions(reader.folder), max_shard_size, inputs=reader.inputs)


def quantization_config(schema: RiaSchema, linears: Sequence[str], permuted: Sequence[str]) -> dict[str, Any]:
    """What config.json then says; it names each linear, so that no other is taken for one of them.

    Args:
        linears: those that are pruned.
        permuted: those of them whose columns are permuted.

    Raises:
        RiaError: compressed-tensors has no words for what the folder holds.
    """
    way = "write the dense form: leave out --format"
    reason = None
    if permuted:
        reason = f"{permuted[0]} has permuted columns: compress with --permute none, or {way}"
    elif schema.pattern != TWO_OF_FOUR:
        reason = f"it holds {TWO_OF_FOUR} alone, and this folder is {schema.pattern}: {way}"
    elif schema.weight_format not in FORMATS:
        reason = (
            f"it packs {schema.weight_format.name} in another way: compress with --scheme BF16, W8A8 or FP8, or {way}"
        )
    elif schema.experts:
        reason = f"{schema.experts[0].module} has pruned experts, which its readers expect dense: {way}"
    if reason is not None:
        raise RiaError(f"--format compressed-tensors: {reason}.")
    words, names = schema.weight_format.quantization, list(linears)
    inputs = schema.input_activations and schema.input_activations.model_dump()
    group = words and {"targets": names, "weights": {**words, "dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": FORMATS[schema.weight_format],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group} if group else {},
        "ignore": [],
        "sparsity_config": {
            "format": schema.format,
            "sparsity_structure": str(schema.pattern),
            "global_sparsity": schema.sparsity_config.global_sparsity,
            "targets": names,
            "ignore": [],
        },
    }
