"""Writes a trained model as a compressed folder, with masks, permutations, folds and format of the one it came from."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ria_vllm.checkpoint.companions import companions
from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.writer import CheckpointWriter, check_place, discarded_on_failure
from ria_vllm.errors import RiaError, printable
from ria_vllm.format.schema import REPORT_FILE
from ria_vllm.hf.placement import Origin, Placement
from ria_vllm.hub.model_card import CARD_FILE, trained_card
from ria_vllm.progress import Monitor
from ria_vllm.report import without_errors
from ria_vllm.training.adapters import clean_name
from ria_vllm.training.encoding import Encoder
from ria_vllm.training.gathering import gathered, ready
from ria_vllm.training.ranks import is_first, together
from ria_vllm.training.settings import GENERATION_FILE, changed_settings, write_tokenizer


@dataclass(frozen=True)
class Saved:
    """What `save` has written.

    changed: how many of the `linears` pruned linears have other weights than before.
    relative_change: of the pruned linears' weights, ||after - before|| / ||before||.
    rounding: what rounding to the folder's format has cost, ||written - trained|| / ||trained||, in the same weights.
    kept: tensors of the folder that the model does not have (a vision tower, say); they stay as they were.
    settings: what the model has changed in config.json and generation_config.json, such as
        "generation_config.eos_token_id".
    """

    linears: int
    changed: int
    relative_change: float
    rounding: float
    kept: list[str]
    settings: list[str]


def save(
    model: nn.Module,
    new: str | Path,
    like: str | Path,
    overwrite: bool = False,
    note: str = "",
    max_shard_size: int = 5 * 10**9,
    tokenizer: Any = None,
) -> Saved | None:
    """Write `new`, a compressed folder that `vllm serve` takes. It appears whole or not at all.

    If the model is sharded (FSDP2), all ranks must call this, for its weights are gathered one by one. The first one
    writes and returns; the others return None.

    Args:
        like: the compressed folder that the model was loaded from. Its masks, permutations, folds, weight format and
            other files are those of `new`, but for what has changed in `model.config` and `model.generation_config`. In
            a quantized format the weights are rounded, by the old scales or by ones that fit the largest magnitudes,
            whichever are closer.
        overwrite: replace `new`.
        note: what the training was, for the recipe and the model card.
        max_shard_size: bytes.
        tokenizer: the trainer's tokenizer or processor (`processing_class`), whose files and chat template go to `new`;
            None: those of `like` do.

    Raises:
        RiaError: a weight outside its mask is not zero; a tensor is not finite, of another shape, or has no place in
            the folder; a setting of the model cannot be written; the tokenizer has more tokens than the model; the
            model has adapters; `new` exists or is `like`; `like` has changed since this call began; the disk is full.
    """
    first = is_first()
    alone = not dist.is_initialized() or not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    reader, found = together(lambda: (Reader(like) if first else None, ready(model, like)), alone)
    if not first and alone:
        return None
    tensors = gathered(*found, first)

    def write() -> Saved | None:
        try:
            if reader is not None:
                check_place(Path(new), reader.folder)
                _check_names(found[1], reader)
                writer = CheckpointWriter(Path(new), overwrite=overwrite)
                with reader.inputs.watched(), discarded_on_failure(writer):
                    return _write(found, tensors, reader, writer, note, max_shard_size, tokenizer)
        finally:
            for _ in tensors:  # also where writing has failed: the other ranks wait
                pass
        return None

    return together(write, alone)


class _Units:
    """What is written to the work folder, a parameter of the model at a time."""

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer
        self.keys: list[str] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.keys.append(f"{len(self.keys):06d}")
        self.writer.write(self.keys[-1], tensors)


def _write(
    model: tuple[nn.Module, Origin],
    tensors: Iterator[tuple[str, Placement | None, torch.Tensor | None]],
    reader: Reader,
    writer: CheckpointWriter,
    note: str,
    max_shard_size: int,
    tokenizer: Any,
) -> Saved:
    base, origin = model
    settings, generation, changed = changed_settings(base, reader)
    monitor = Monitor(shown=False)
    copies = companions(reader.folder)
    encoder = Encoder(reader)
    units = _Units(writer)
    with tempfile.TemporaryDirectory() as temporary:
        if tokenizer is not None:
            copies = write_tokenizer(tokenizer, base, copies, Path(temporary))
        others: dict[str, torch.Tensor] = {}
        kept: list[str] | None = None
        for name, placement, tensor in tensors:
            assert tensor is not None
            if placement is None:
                others[name] = tensor
                continue
            if kept is None:
                kept = _write_others(base, others, origin, encoder, units)
                others = {}
            linears = (encoder.linear(linear, weight) for linear, weight in placement.split(tensor))
            units.add({name: stored for tensors in linears for name, stored in tensors.items()})
        if kept is None:  # no linear is pruned
            kept = _write_others(base, others, origin, encoder, units)
        saved = Saved(
            len(reader.sparse_names), encoder.changed, encoder.relative_change, encoder.rounding, kept, changed
        )
        files = _texts(reader, settings, saved, note, str(next(base.parameters()).dtype), monitor)
        files |= {GENERATION_FILE: generation} if generation else {}
        writer.finish(units.keys, files, copies, max_shard_size, reader.schema.permutes, reader.inputs)
    return saved


def _check_names(origin: Origin, reader: Reader) -> None:
    """Every pruned linear of the folder is in the model, and no other."""
    placed = {name for placement in origin.placements.values() for name in placement.names}
    stored = set(reader.sparse_names)
    for name in sorted(stored - placed):
        raise RiaError(
            f"{reader.folder}: {name} is not in the model, which was loaded from {origin.folder}. Give the folder that "
            "it was loaded from as `like`, and load all of its layers."
        )
    for name in sorted(placed - stored):
        raise RiaError(
            f"{reader.folder}: {name} is not pruned here, but in the model, which was loaded from {origin.folder}. "
            "Give that folder as `like`."
        )


def _write_others(
    base: nn.Module, others: dict[str, torch.Tensor], origin: Origin, encoder: Encoder, units: _Units
) -> list[str]:
    """Write what is not pruned, under its names in the files; returns what the model does not have."""
    reader = encoder.reader
    in_int8 = {f"{name}.weight": name for name in reader.int8_names}
    names = {*reader.dense_names, *in_int8}
    _check_tied(base, others, reader)
    stored = _as_in_files(base, others, origin)
    # Files may also have the model's own names where transformers would write older ones.
    stored |= {name: tensor for name, tensor in others.items() if name in names - stored.keys()}
    # A tied tensor has two names, of which the files may have one. Buffers need not be stored at all.
    written = {tensor.data_ptr() for name, tensor in stored.items() if name in names}
    computed = {clean_name(name) for name, _ in base.named_buffers()}
    for name, tensor in stored.items():
        if name not in names and name not in computed and tensor.data_ptr() not in written:
            known = ", ".join(map(str, reader.config.get("architectures") or ["none"]))
            raise RiaError(
                f"{reader.folder}: the model's {name} has no place in this folder, so it would be lost. Train the "
                f"class that config.json names ({known})."
            )
    kept, encoded = [], set[str]()
    for weight in sorted(in_int8.keys() & stored.keys()):
        tensors = encoder.int8(in_int8[weight], stored[weight])
        units.add(tensors)
        encoded |= tensors.keys()
    for name in reader.dense_names:
        if name in encoded:
            continue
        if name in stored:
            units.add({name: encoder.other(name, stored[name])})
        else:
            units.add({name: reader.tensor(name)})
            kept.append(name)
    return kept


def _check_tied(base: Any, tensors: dict[str, torch.Tensor], reader: Reader) -> None:
    """Refuse two tensors where config.json will say that they are one, which vLLM then reads for both."""
    for name, other in base.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, two = tensors.get(clean_name(name)), tensors.get(clean_name(other))
        if one is not None and two is not None and not torch.equal(one, two):
            raise RiaError(
                f"{reader.folder}: config.json says that {name} and {other} are one tensor, but the model has two that "
                "differ, of which vLLM would read one. Keep them tied in training (PEFT: `ensure_weight_tying=True`); "
                "or, if the folder holds both, set `model.config.tie_word_embeddings = False` before saving."
            )


def _as_in_files(base: Any, tensors: dict[str, torch.Tensor], origin: Origin) -> dict[str, torch.Tensor]:
    """Tensors of the model under the names, and in the shapes, of the dense model's files."""
    from transformers.core_model_loading import revert_weight_conversion

    # The model's own conversions are those of a checkpoint that it was loaded from, or none (see `keep_sparse`).
    own = getattr(base, "_weight_conversions", None)
    base._weight_conversions = origin.conversions
    try:
        return dict(revert_weight_conversion(base, tensors))
    finally:
        base._weight_conversions = own


def _texts(
    reader: Reader, settings: dict[str, Any], saved: Saved, note: str, dtype: str, monitor: Monitor
) -> dict[str, Any]:
    """config.json (from `settings`), the model card, and the report if there is one, by their names."""
    numbers = {key: value for key, value in asdict(saved).items() if key not in ("kept", "linears")}
    entry = {"note": printable(note), "dtype": dtype.removeprefix("torch.")} | numbers
    before = reader.schema.recipe.get("training")
    recipe = reader.schema.recipe | {"training": [*(before if isinstance(before, list) else []), entry]}
    quantization = reader.config["quantization_config"] | {"recipe": recipe}
    files: dict[str, Any] = {"config.json": settings | {"quantization_config": quantization}}
    if report := reader.report():
        files[REPORT_FILE] = without_errors(report) | {"recipe": recipe}
    return files | {CARD_FILE: trained_card(reader, recipe, note, monitor.warn)}
