"""Writes a trained model as a compressed folder, with the masks, orders, folds and format of the one it came from."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ria_vllm.checkpoint import Reader
from ria_vllm.errors import RiaError, printable
from ria_vllm.export import companion_files
from ria_vllm.model_card import CARD_FILE, trained_card
from ria_vllm.placement import Origin, Placement
from ria_vllm.progress import Monitor
from ria_vllm.schema import REPORT_FILE
from ria_vllm.training.encoding import Encoder
from ria_vllm.training.masks import holder, origin_of
from ria_vllm.writer import CheckpointWriter, check_place

UNIT_BYTES = 1 << 28
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
STALE = ("error_before", "error_after")
"""What the report says of a linear, and training has changed."""


@dataclass(frozen=True)
class Saved:
    """What `save` has written.

    changed: how many of the `linears` pruned linears have other weights than before.
    relative_change: of the pruned linears' weights, ||after - before|| / ||before||.
    rounding: what rounding to the folder's format has cost, ||written - trained|| / ||trained||, in the same weights.
    kept: tensors of the folder that the model does not have (a vision tower, say); they stay as they were.
    """

    linears: int
    changed: int
    relative_change: float
    rounding: float
    kept: list[str]


def save(
    model: nn.Module,
    new: str | Path,
    like: str | Path,
    overwrite: bool = False,
    note: str = "",
    max_shard_size: int = 5 * 10**9,
) -> Saved | None:
    """Write `new`, a compressed folder that `vllm serve` takes. It appears whole or not at all.

    If the model is sharded (FSDP2), all ranks must call this, for its weights are gathered one by one. The first one
    writes and returns; the others return None.

    Args:
        like: the compressed folder that the model was loaded from. Its masks, permutations, folds, weight format,
            tokenizer and other files are those of `new`. In an integer format the weights are rounded, by the old
            scales or by ones that fit the largest magnitudes, whichever are closer.
        overwrite: replace `new`.
        note: what the training was, for the recipe and the model card.
        max_shard_size: bytes.

    Raises:
        RiaError: a weight outside its mask is not zero; a tensor is not finite, of another shape, or has no place in
            the folder; the model has adapters; `new` exists or is `like`; the disk is full.
    """
    _refuse_adapters(model)
    base, origin = origin_of(model, like)
    first = not dist.is_initialized() or dist.get_rank() == 0
    sharded = dist.is_initialized() and any(isinstance(parameter, DTensor) for parameter in base.parameters())
    if not first and not sharded:
        return None
    tensors = _gathered(base, origin, first)
    error: BaseException | None = None
    saved = None
    try:
        if first:
            saved = _write(base, origin, tensors, Reader(like), Path(new), overwrite, note, max_shard_size)
    except BaseException as raised:
        error = raised
    for _ in tensors:  # also where writing has failed: the other ranks wait
        pass
    if sharded:
        message: list[Any] = [error and (str(error) or type(error).__name__)]
        dist.broadcast_object_list(message, src=0)
        if message[0] and not first:
            raise RiaError(f"The first rank could not save the model: {message[0]}")
    if error is not None:
        raise error
    return saved


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            raise RiaError(
                f"{name or type(model).__name__}: the model has adapters ({type(module).__name__}), which a "
                "compressed folder does not hold. Save them by `model.save_pretrained(ADAPTER)` and serve them beside "
                "the folder: `vllm serve OUT --enable-lora --lora-modules NAME=ADAPTER`. If kept weights were trained "
                "as well, save these from `model.unload()`."
            )


def _clean(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _gathered(
    base: nn.Module, origin: Origin, first: bool
) -> Iterator[tuple[str, Placement | None, torch.Tensor | None]]:
    """Each tensor of the model: its name, the pruned linears in it, and the whole of it on the CPU (first rank only).

    Those without pruned linears come first. A tensor with several names is one object.
    """
    state = {_clean(name): tensor for name, tensor in base.state_dict(keep_vars=True).items()}
    found: dict[int, torch.Tensor | None] = {}
    for name, tensor in state.items():
        if name not in origin.placements and isinstance(tensor, torch.Tensor):
            if id(tensor) not in found:
                found[id(tensor)] = _whole(name, tensor, first)
            yield name, None, found[id(tensor)]
    for name, placement in origin.placements.items():
        module, leaf = holder(base, name)
        parameter = module._parameters.get(leaf)
        if parameter is None:
            raise RiaError(f"{name}: the model has no such parameter any more.")
        yield name, placement, _whole(name, parameter, first)


def _whole(name: str, tensor: torch.Tensor, first: bool) -> torch.Tensor | None:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    if not first:
        return None
    if tensor.is_meta:
        raise RiaError(
            f"{name}: its weights are not in memory (they are on the device meta). Load the model without it."
        )
    return tensor.cpu()


class _Units:
    """Collects tensors to units of a few hundred megabytes."""

    def __init__(self, writer: CheckpointWriter):
        self.writer = writer
        self.keys: list[str] = []
        self.waiting: dict[str, torch.Tensor] = {}

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.waiting |= {name: tensor.clone() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.waiting.values()) >= UNIT_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.keys.append(f"{len(self.keys):06d}")
            self.writer.write(self.keys[-1], self.waiting)
            self.waiting = {}


def _write(
    base: nn.Module,
    origin: Origin,
    tensors: Iterator[tuple[str, Placement | None, torch.Tensor | None]],
    reader: Reader,
    out: Path,
    overwrite: bool,
    note: str,
    max_shard_size: int,
) -> Saved:
    _check_names(origin, reader)
    check_place(out, reader.folder)
    monitor = Monitor(shown=False)
    copies = companion_files(reader.folder, monitor.warn)
    encoder = Encoder(reader)
    writer = CheckpointWriter(out, overwrite=overwrite)
    units = _Units(writer)
    try:
        others: dict[str, torch.Tensor] = {}
        kept: list[str] | None = None
        for name, placement, tensor in tensors:
            assert tensor is not None
            if placement is None:
                others[name] = tensor
                continue
            if kept is None:
                kept = _write_others(base, others, encoder, units)
                others = {}
            for linear, weight in placement.split(tensor):
                units.add(encoder.linear(linear, weight))
        units.flush()
        saved = Saved(len(reader.sparse_names), encoder.changed, encoder.relative_change, encoder.rounding, kept or [])
        config, report, card = _texts(reader, saved, note, str(next(base.parameters()).dtype), monitor)
        writer.finish(
            units.keys, {"config.json": config} | report, copies, max_shard_size,
            permuted=reader.schema.permutes, text_files={CARD_FILE: card}, copied_from=reader.folder,
        )  # fmt: skip
    except BaseException as error:
        if not isinstance(error.__cause__, FileExistsError):  # then the result is whole, but someone has created `out`
            writer.discard()
        raise
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


def _write_others(base: nn.Module, others: dict[str, torch.Tensor], encoder: Encoder, units: _Units) -> list[str]:
    """Write what is not pruned, under its names in the files; returns what the model does not have."""
    from transformers.core_model_loading import revert_weight_conversion

    reader = encoder.reader
    names = set(reader.dense_names)
    stored = revert_weight_conversion(base, others)
    # Files may also have the model's own names where transformers would write older ones.
    stored |= {name: tensor for name, tensor in others.items() if name in names - stored.keys()}
    # A tied tensor has two names, of which the files may have one. Buffers need not be stored at all.
    written = {tensor.data_ptr() for name, tensor in stored.items() if name in names}
    computed = {_clean(name) for name, _ in base.named_buffers()}
    for name, tensor in stored.items():
        if name not in names and name not in computed and tensor.data_ptr() not in written:
            known = ", ".join(map(str, reader.config.get("architectures") or ["none"]))
            raise RiaError(
                f"{reader.folder}: the model's {name} has no place in this folder, so it would be lost. Train the "
                f"class that config.json names ({known})."
            )
    kept = []
    for name in reader.dense_names:
        if name in stored:
            units.add({name: encoder.other(name, stored[name])})
        else:
            units.add({name: reader.tensor(name)})
            kept.append(name)
    return kept


def _texts(
    reader: Reader, saved: Saved, note: str, dtype: str, monitor: Monitor
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """config.json, the report if there is one, and the model card."""
    numbers = {key: value for key, value in asdict(saved).items() if key not in ("kept", "linears")}
    entry = {"note": printable(note), "dtype": dtype.removeprefix("torch.")} | numbers
    before = reader.schema.recipe.get("training")
    recipe = reader.schema.recipe | {"training": [*(before if isinstance(before, list) else []), entry]}
    quantization = reader.config["quantization_config"] | {"recipe": recipe}
    config = reader.config | {"quantization_config": quantization}
    report = reader.report()
    if report:
        linears = report.get("linears")
        if isinstance(linears, dict):
            report["linears"] = {
                name: {key: value for key, value in record.items() if key not in STALE}
                if isinstance(record, dict)
                else record
                for name, record in linears.items()
            }
        report["recipe"] = recipe
    return config, {REPORT_FILE: report} if report else {}, trained_card(reader, recipe, note, monitor.warn)
