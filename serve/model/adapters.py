"""LoRA adapters of the dense model, for a folder whose heads are rotated.

`compress --rotate heads` rotates the rows of v and the columns of o (`ria_vllm.format.rotation`). An adapter adds B A x
to what v returns, and B A z to what o makes of its input z, so on such a folder the rows of v's B and the columns of
o's A have to be rotated, too. That is done as soon as vLLM has read an adapter: its tensors are whole, and have the
names of the adapter's file after the model's own rules. Later, vLLM joins those of q, k and v, and cuts them for tensor
parallel.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.utils import get_packed_modules_mapping

from ria_vllm.checkpoint.reader import is_compressed
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format import permutation, rotation
from ria_vllm.format.layer_schema import Producer
from ria_vllm.format.schema import EXPORTED_KEY
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.load.engine import ADAPTERS_VARIABLE, EngineOptions
from ria_vllm.serve.load.model_paths import place_of
from ria_vllm.serve.model.checkpoint_files import rotations_of
from ria_vllm.serve.model.config import RiaConfig

logger = init_logger("vllm.ria")

WAY_OUT = (
    "To serve adapters of the dense model, compress with --rotate none. If yours were trained on this folder, set "
    f"{ADAPTERS_VARIABLE}=1."
)


@dataclass(frozen=True)
class Rotation:
    """How the adapter of one linear is rotated.

    Attributes:
        rotations: float32 [kv heads, d, d].
        num_heads: how many query heads there are.
        producer: the rows of the linear that make the key-value heads; None: the linear reads all query heads.
    """

    rotations: torch.Tensor
    num_heads: int
    producer: Producer | None

    def apply(self, lora_a: Any, lora_b: Any) -> None:
        """Rotate an adapter's A [rank, in] or B [out, rank], in place.

        Raises:
            ValueError: it is missing, or has another shape.
        """
        rotations = self.rotations.double()
        kv, d, _ = rotations.shape
        name, tensor = ("lora_A", lora_a) if self.producer is None else ("lora_B", lora_b)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"it has no {name} that is a matrix")
        if self.producer is None:
            if tensor.shape[1] != self.num_heads * d:
                raise ValueError(f"{name} has {tensor.shape[1]} columns, expected {self.num_heads} heads of {d}")
            rotation.rotate_columns(tensor, rotations)
            return
        rows = permutation.places(len(tensor), *(self.producer.rows or (0, len(tensor))), self.producer.blocks)
        if isinstance(rows, str) or len(rows) != kv * d:
            wrong = rows if isinstance(rows, str) else f"{len(rows)} of them for values"
            raise ValueError(f"{name} has {len(tensor)} rows ({wrong}), expected {kv} key-value heads of {d}")
        rotation.rotate_rows(tensor, rotations, rows)


def rotate_adapters(config: RiaConfig, model: torch.nn.Module, revision: str | None) -> None:
    """Have adapters rotated that vLLM loads for a model that was just built, if its folder's heads are rotated.

    Dummy weights do not need that, but those that may follow them do, see `RiaConfig.excused`.

    Raises:
        RiaError: the rotations are missing or damaged, or it is not known how to rotate an adapter for this model.
    """
    engine = EngineOptions.current()
    if not engine.lora or engine.own_adapters or config.schema.rotations_digest is None or config.unread is not None:
        return
    with config.excused():
        rotations = rotations_of(config.where, revision, config.schema, config.is_pruned)
        model.ria_rotations = _by_adapter_name(config, model, _by_linear(config, rotations))
    if config.unread is not None:
        return
    source = config.schema.recipe.get("source")
    if engine.own_adapters is None:
        model.ria_check_base = functools.partial(check_base, where=config.where, source=source)
    logger.info_once(
        "Heads are rotated in this folder, and LoRA adapters of the dense model will be rotated, too. For adapters "
        f"that were trained on this folder, set {ADAPTERS_VARIABLE}=1."
    )
    _watch_adapters()


def check_base(adapter: Path, name: str, where: str, source: object) -> None:
    """Refuse an adapter unless PEFT has written down that it was trained on the dense model.

    Args:
        adapter: its folder.
        name: the adapter's, for messages.
        where: the folder that is served, or a hub id.
        source: the dense model's published name, as config.json has it: perhaps not a string.

    Raises:
        RiaError: it fits as it is, or nothing shows that it was trained on the dense model.
    """
    path = adapter / "adapter_config.json"
    dense = source[:200] if isinstance(source, str) else ""
    if doubt := _doubt(read_json(path).get("base_model_name_or_path"), where, dense):
        raise RiaError(
            f"adapter {name}: {path} {doubt}. Adapters of the dense model ({dense or 'config.json does not name it'}) "
            "have to be rotated like this folder's heads; those that were trained on this folder must not be. Set "
            f"{ADAPTERS_VARIABLE}=1 if they were trained on this folder (none is rotated), or {ADAPTERS_VARIABLE}=0 if "
            "they are the dense model's (all are rotated). It holds for all adapters of the server."
        )


def _doubt(base: object, where: str, dense: str) -> str | None:
    """What an adapter's configuration says, if that is not that it was trained on the dense model.

    Args:
        base: what PEFT has written down: the name of a model, a path that may be another machine's, or nothing.
        where: what is served.
        dense: the dense model's published name; empty if it is not known.
    """
    if not isinstance(base, str) or not base:
        return "does not say on which model it was trained"
    says = f"says that it was trained on {base[:200]}"
    if base == where or (os.path.exists(base) and os.path.exists(where) and os.path.samefile(base, where)):
        return f"{says}, the folder that is served"
    names = _names(base)
    if not names:
        return f"{says}, which names no model"
    if (config := _config_in(base)) is not None:
        if is_compressed(Path(base)):
            return f"{says}, which is a pruned folder"
        if EXPORTED_KEY in config:
            return f"{says}, which `ria-vllm export` wrote"
    if base == dense:
        return None
    if names & _names(where):
        return f"{says}, and the folder that is served has this name"
    return None if names & _names(dense) else f"{says}, which may be the dense model or not"


def _names(model: str) -> set[str]:
    """What the path of a model, or its hub id, calls it, in lower case. A snapshot on the hub is called by its
    repository's name, or by its commit."""
    *before, last = re.split(r"[/\\]", model.rstrip("/\\").lower())
    names = {last}
    if len(before) >= 2 and before[-1] == "snapshots" and before[-2].startswith("models--"):
        names.add(before[-2].rpartition("--")[2])
    return names - {"", ".", ".."}


def _config_in(folder: str) -> dict[str, Any] | None:
    """The content of its config.json; None if it has none that can be read."""
    try:
        return read_json(Path(folder) / "config.json")
    except RiaError:
        return None


def rotate(loras: Mapping[str, Any], rotates: Mapping[str, Sequence[Rotation]], adapter: str) -> None:
    """Rotate what an adapter adds to each linear that is rotated, in place; the others stay as they are.

    Args:
        loras: module -> an object with its `lora_a` [rank, in] and `lora_b` [out, rank].
        rotates: module -> how what is added to it has to be rotated.
        adapter: its name, for messages.

    Raises:
        RiaError: a tensor is missing or has another shape.
    """
    for module, lora in loras.items():
        for one in rotates.get(module, ()):
            try:
                one.apply(lora.lora_a, lora.lora_b)
            except ValueError as error:
                raise RiaError(f"adapter {adapter}: {module}: {error}. {WAY_OUT}") from None


def _by_linear(config: RiaConfig, rotations: Mapping[str, torch.Tensor]) -> dict[str, list[Rotation]]:
    """Linear of the checkpoint -> how its adapter is rotated."""
    found: dict[str, list[Rotation]] = {}
    for name, matrices in rotations.items():
        fold = config.schema.fold_of(name)
        assert fold is not None  # as `checked_rotations` has seen
        (producer,) = fold.producers_of(name)
        for linear, rows in ((name, None), (producer.name, producer)):
            found.setdefault(linear, []).append(Rotation(matrices, fold.num_heads or 0, rows))
    return found


def _by_adapter_name(
    config: RiaConfig, model: torch.nn.Module, rotates: Mapping[str, list[Rotation]]
) -> dict[str, list[Rotation]]:
    """Module that an adapter may name -> how what it adds there is rotated.

    Raises:
        RiaError: it is not known which linear of the checkpoint a module is.
    """
    packed = get_packed_modules_mapping(model)
    found: dict[str, list[Rotation]] = {}
    left = set(rotates)
    for path, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not isinstance(method, Sparse24LinearMethod) or not rotates.keys() & set(method.names):
            continue
        names = _adapter_names(path, packed)
        if len(names) != len(method.names):
            raise RiaError(
                f"{config.where}: {', '.join(method.names)}: vLLM's layer {path} takes adapters for "
                f"{', '.join(names)} instead, so it is not known how to rotate them. {WAY_OUT}"
            )
        for name, linear in zip(names, method.names):
            found[name] = rotates.get(linear, [])
            if getattr(model, "is_pooling_model", False):  # these take names of a decoder without a head, too
                found[name.removeprefix("model.")] = found[name]
        left -= set(method.names)
    left = {name for name in left if place_of(model, f"{name}.weight") is not None}  # not of other pipeline stages
    if left and config.stored is None:  # otherwise their layers are in another process
        raise RiaError(
            f"{config.where}: {min(left)}: no weight file here tells which of vLLM's layers serves it, so it is not "
            f"known how to rotate adapters. {WAY_OUT}"
        )
    return found


def _adapter_names(path: str, packed: Mapping[str, list[str]]) -> list[str]:
    """The modules whose adapters vLLM gives to its layer `path`, in the order of the outputs."""
    parent, _, leaf = path.rpartition(".")
    parts = packed.get(leaf, [])
    return [f"{parent}.{part}" if parent else part for part in parts] if len(parts) > 1 else [path]


def _watch_adapters() -> None:
    """Rotate each adapter that vLLM reads for a model that has `ria_rotations`. vLLM has no hook for that."""
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if hasattr(load, "ria_rotations"):
        return

    @functools.wraps(load)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        adapter, model = load(self, lora_request), self._adapter_manager.model
        if hasattr(model, "ria_rotations"):
            if hasattr(model, "ria_check_base"):
                model.ria_check_base(Path(get_adapter_absolute_path(lora_request.lora_path)), lora_request.lora_name)
            rotate(adapter.loras, model.ria_rotations, lora_request.lora_name)
        return adapter

    _load_adapter.ria_rotations = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = _load_adapter
