"""Saves the weights of the model that are trained beside adapters of PEFT, whose checkpoints hold only the adapter."""

import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ria_vllm.checkpoint.weight_files import file_metadata, tensor_names
from ria_vllm.checkpoint.writer import save_whole
from ria_vllm.errors import RiaError
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.training.adapters import own_parameters
from ria_vllm.training.gathering import own_share, whole
from ria_vllm.training.keep import kept_weights
from ria_vllm.training.ranks import is_first, together

TRAINED_FILE = "ria_trained.safetensors"
CHECKPOINT_ID = "checkpoint"


def write_trained(model: nn.Module, folder: str | Path) -> None:
    """Write the weights of the model that have `requires_grad`, without adapters, to a file in a checkpoint's folder.

    They have the names of the model without adapters, and its dtype. If the model is sharded (FSDP2), all ranks must
    call this; the first one writes.

    Raises:
        RiaError: the model is not kept sparse; there is no such folder, or it cannot be written.
    """
    _write(model, Path(folder), "")


def read_trained(model: nn.Module, folder: str | Path) -> None:
    """Give the model, with adapters or without, the weights that `write_trained` or `BesideAdapters` has written.

    Raises:
        RiaError: the model is not kept sparse; the file is not there, damaged, or of another model; a weight in it is
            not zero outside the mask. The model is as before then.
    """
    together(lambda: _read(model, Path(folder)))


class BesideAdapters(TrainerCallback, ExportableState):
    """Has transformers' Trainer save, resume and choose weights of the model that are trained beside adapters.

    Give it to any trainer that derives from it: `trainer.add_callback(ria_vllm.training.BesideAdapters)`. A run that
    resumes finds its checkpoint in the output folder, or where the arguments' `resume_from_checkpoint` says.

    Raises:
        RiaError: from the trainer, if a run resumes from a checkpoint without these weights, or with other ones; or if
            its arguments have `enable_jit_checkpoint` or `save_total_limit=1`, which may leave none with them.
    """

    def __init__(self) -> None:
        self.checkpoint = ""

    def state(self) -> dict[str, Any]:
        """What the trainer writes into trainer_state.json, just before `on_save`."""
        self.checkpoint = uuid.uuid4().hex
        return {"args": {}, "attributes": {CHECKPOINT_ID: self.checkpoint}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        _check_settings(args)
        kept = kept_weights(model)
        kept.beside_adapters = True
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around the one that makes the steps
        # Now, because some trainers merge adapters for a while to generate text, even before the first step, and
        # rounding leaves something outside the masks.
        together(lambda: kept.check_first_step(optimizer, kept.weights))
        if state.global_step:
            together(lambda: _resume(model, args, state))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        _write(model, _folder(args, state), self.checkpoint)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            read_trained(model, state.best_model_checkpoint)


def _check_settings(args: Any) -> None:
    """Refuse settings by which the trainer would keep only checkpoints without the weights."""
    if getattr(args, "enable_jit_checkpoint", False):
        raise RiaError(
            "enable_jit_checkpoint: the checkpoint that it writes when a job is stopped lacks the weights that are "
            "trained beside the adapter. Set it to False in the trainer's arguments."
        )
    if getattr(args, "save_total_limit", None) == 1:
        raise RiaError(
            "save_total_limit=1: the trainer removes the last checkpoint before the new one has the weights that are "
            "trained beside the adapter. Set it to 2 or more in the trainer's arguments."
        )


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resume(model: nn.Module, args: Any, state: Any) -> None:
    """Read the weights of the checkpoint that the trainer has read its state from; it does not say from where."""
    found = state.stateful_callbacks.get(BesideAdapters.__name__)
    wanted = found["attributes"][CHECKPOINT_ID] if isinstance(found, dict) else None
    if wanted is None:
        raise RiaError(
            "This run resumes from a checkpoint that was written without BesideAdapters, so it does not hold what was "
            "trained beside the adapter. Start anew, or go on from a checkpoint that does."
        )
    folder = _folder(args, state)
    if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
        folder = Path(args.resume_from_checkpoint)
    path = _existing(folder)
    if file_metadata(path).get(CHECKPOINT_ID) != wanted:
        raise RiaError(
            f"{path}: of another checkpoint than the one that this run resumes from. Set that one's folder as "
            "`resume_from_checkpoint` in the trainer's arguments, too."
        )
    stored = set(tensor_names(path))
    for name, _ in _trained(model):
        if name not in stored:
            raise RiaError(f"{name}: trained now, but not in {path}. Train the same weights as before.")
    _read(model, folder)


def _existing(folder: Path) -> Path:
    path = folder / TRAINED_FILE
    if not path.is_file():
        raise RiaError(f"{path}: no such file, so what was trained beside the adapter is not in this checkpoint.")
    return path


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    base = kept_weights(model).base()
    assert base is not None
    found = {id(parameter): (name, parameter) for name, parameter in own_parameters(base) if parameter.requires_grad}
    return list(found.values())


def _write(model: nn.Module, folder: Path, checkpoint: str) -> None:
    first = is_first()
    tensors = {name: whole(parameter, first) for name, parameter in _trained(model)}

    def write() -> None:
        if not first:
            return
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        try:
            save_whole(held, folder / TRAINED_FILE, {CHECKPOINT_ID: checkpoint})
        except Exception as error:  # safetensors has its own for a missing folder and a full disk
            raise RiaError(f"{folder / TRAINED_FILE}: cannot be written ({error}).") from None

    together(write)


@torch.no_grad()
def _read(model: nn.Module, folder: Path) -> None:
    kept, path, files = kept_weights(model), _existing(folder), OpenFiles()
    base = kept.base()
    assert base is not None
    parameters, weights = dict(own_parameters(base)), kept.by_parameter()
    tensors = {name: files.tensor(path, name) for name in tensor_names(path)}
    for name, tensor in tensors.items():
        if name not in parameters:
            raise RiaError(f"{path}: {name}: not a parameter of this model.")
        shape = parameters[name].shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise RiaError(f"{path}: {name}: of shape {tuple(tensor.shape)}, {tensor.dtype}, not {tuple(shape)}.")
        weight = weights.get(id(parameters[name]))
        if weight is not None and not weight.fits(tensor):
            raise RiaError(
                f"{path}: {name}: not zero everywhere outside the mask in {kept.origin.folder}, so it is of another "
                "model, or of one with other masks."
            )
    for name, tensor in tensors.items():
        _copy(tensor, parameters[name])


def _copy(tensor: torch.Tensor, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(own_share(tensor, parameter))
    else:
        parameter.copy_(tensor)
