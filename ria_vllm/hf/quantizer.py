"""The Hugging Face quantizer for quant_method "ria": it decompresses linears into the model's own order as they load.

The result is a plain dense model, as large as one, for Hugging Face's tools. Serving does not use it.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ria_vllm.checkpoint.consistency import check_digests, check_prefix
from ria_vllm.checkpoint.side_files import checked_proofs, load_permutations
from ria_vllm.checkpoint.sparse_linear import checked_linear
from ria_vllm.checkpoint.weight_files import tensor_names
from ria_vllm.errors import RiaError
from ria_vllm.files.fetching import hub_errors
from ria_vllm.format import int8_rows, proofs
from ria_vllm.format.schema import PERMUTATIONS_FILE, PROOFS_FILE, QUANT_METHOD, RiaSchema
from ria_vllm.hf.dtypes import kept_dtypes
from ria_vllm.hf.experts import ExpertsConverter, expert_converters
from ria_vllm.hf.inputs import round_inputs
from ria_vllm.hf.placement import ORIGIN_ATTRIBUTE, Origin, Placement
from ria_vllm.hf.proofs import disproved
from ria_vllm.hf.unread import refuse_unread_weights

PART = r"\.{}$"


class RiaQuantizationConfig(QuantizationConfigMixin):
    """The `quantization_config` of a folder that ria-vllm wrote."""

    def __init__(self, /, **content: Any):  # config.json may have any key, even "self"
        self.schema = RiaSchema.parse(content, "config.json")
        self.quant_method = QUANT_METHOD
        self.dequantize = True  # so that HF drops the config after loading: the model is a plain one

    def to_dict(self) -> dict[str, Any]:
        return self.schema.model_dump(exclude_none=True)


class Loading:
    """The checkpoint of one `from_pretrained`, and which of its linears were used. All conversions share it."""

    def __init__(self, schema: RiaSchema):
        self.schema = schema
        self.where: str | Path = ""
        self.permutations: dict[str, torch.Tensor] = {}
        self.proofs: dict[str, torch.Tensor] = {}
        self.files: dict[str, Path] = {}  # tensor -> where it is
        self.rounded: dict[str, torch.dtype] = {}  # see `ria_vllm.hf.proofs`
        self.pruned: set[str] = set()
        self.int8: set[str] = set()  # matrices that are stored in int8
        self.int8_linears: list[str] = []  # parameters of the model
        self.claimed: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.conversions: list[Any] = []  # transformers' own
        self.placements: dict[str, Placement] = {}  # parameter of the model -> what it holds
        self.errors: list[RiaError] = []
        self.dtype: torch.dtype | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Loading":
        return self

    def open(self, model: torch.nn.Module, files: list[Path]) -> None:
        """Read what must be known before the first tensor arrives.

        Raises:
            RiaError: a file is missing, or the files do not belong together, or the model is divided among processes.
        """
        name = model.config._name_or_path
        if getattr(model.config, "distributed_config", None) is not None:
            raise RiaError(
                f"{name}: transformers divides a model's tensors among processes (`tp_plan`, `distributed_config`) "
                "before they are decompressed, which compressed weights do not allow. Load the model without that, for "
                "example with a `device_map`, or divide the dense folder that `ria-vllm export` writes."
            )
        self.where = files[0].parent if files else name
        path = _side_file(files[0].parent, PERMUTATIONS_FILE, self.schema.permutes) if files else None
        if path is None and self.schema.permutes:
            raise RiaError(
                f"{self.where}: {PERMUTATIONS_FILE} is missing, though the model was compressed with permutations."
            )
        self.permutations = {} if path is None else load_permutations(path)
        stored = [name for file in files for name in tensor_names(file)]
        self.files = {name: file for file in files for name in tensor_names(file)}
        twice = next((name for name, count in Counter(stored).items() if count > 1), None)
        if twice is not None:
            raise RiaError(f"{self.where}: {twice} is in two weight files. Get all files of one run.")
        check_prefix(stored, self.schema, f"{model.base_model_prefix}.", self.where)
        self.pruned = {name.removesuffix(".compressed") for name in stored if name.endswith(".compressed")}
        self.int8 = {name.removesuffix(".integers") for name in stored if name.endswith(".integers")}
        for name in sorted(set(self.permutations) - self.pruned):
            raise RiaError(f"{path}: a permutation for {name}, which is not a pruned linear of this model.")
        check_digests(self.schema, self.permutations, files, self.where)
        if files and self.schema.proofs is not None and proofs.wanted():
            self.proofs = checked_proofs(_side_file(files[0].parent, PROOFS_FILE, True), self.schema, self.where)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def close(self, model: torch.nn.Module, used: list[Any]) -> None:
        """Check that all of the checkpoint was used, and leave in the model where it comes from.

        Args:
            used: transformers' own conversions and ours, as far as they were used.

        Raises:
            RiaError: a damaged linear, one that was not used though the model has its layer, a tensor of a wrong shape.
        """
        if self.errors:
            raise self.errors[0]
        if left := min(self._wanted(model) - self.claimed, default=None):
            raise RiaError(
                f"{self.where}: {left} is stored compressed, but transformers found no place for it in a "
                f"{type(model).__name__}. `ria-vllm export` writes a dense folder, which it may be able to read."
            )
        for name, tensor in model.state_dict().items():
            if name in self.shapes and tensor.shape != self.shapes[name]:
                raise RiaError(
                    f"{self.where}: {name} has shape {tuple(tensor.shape)}, by config.json {tuple(self.shapes[name])}. "
                    "Get all files of one model."
                )
        conversions = self._to_undo(used)
        model._weight_conversions = conversions
        setattr(model, ORIGIN_ATTRIBUTE, Origin(Path(self.where), self.placements, conversions))
        if self.schema.input_dtype is not None:
            round_inputs(model, [*self.placements, *self.int8_linears], self.where, self.schema.input_dtype)

    def prove(self, model: torch.nn.Module, used: list[Any]) -> None:
        """Check that the model, loaded and complete, holds the matrices that the checkpoint was written with.

        Args:
            used: see `close`.

        Raises:
            RiaError: names the file and the linear of the first matrix that is another one.
        """
        if not self.proofs:
            return
        theirs = [entry for entry in used if isinstance(entry, WeightConverter) and not isinstance(entry, OURS)]
        made = {name for entry in theirs for name in _made(entry, self.shapes)}
        for name in disproved(model, self.placements, self.rounded, made, self.schema, self.proofs):
            parts = ("compressed", int8_rows.INTEGERS, "weight")
            file = next((self.files[f"{name}.{part}"] for part in parts if f"{name}.{part}" in self.files), self.where)
            raise RiaError(
                f"{file}: {name}: what was loaded is not the matrix that the checkpoint was written with "
                f"({PROOFS_FILE}). Run `ria-vllm verify`: if it finds a problem, get the files again. If not, "
                "transformers has changed the weights: load the folder that `ria-vllm export` writes, or set "
                f"{proofs.VARIABLE}=0."
            )

    def _to_undo(self, used: list[Any]) -> list[Any]:
        """The conversions that `save_pretrained` undoes, so that its files are laid out as the dense model's are.

        A dense model would have used more: those for the experts that ours have made.
        """
        experts = {name for name, placement in self.placements.items() if placement.stacked}
        unused = [(entry, _made(entry, self.shapes)) for entry in self.conversions if not entry.was_used()]
        return [
            *(entry for entry in used if not isinstance(entry, OURS)),
            *(entry for entry, made in unused if made and experts.issuperset(made)),
        ]

    def _wanted(self, model: torch.nn.Module) -> set[str]:
        """What the model should have used: all that is pruned or in int8, but a head only if it has one."""
        paths, prefix = {path for path, _ in model.named_modules()}, f"{model.base_model_prefix}."
        has_head = model.get_output_embeddings() is not None
        heads = {name for name in self.int8 if has_head or {name, prefix + name, name.removeprefix(prefix)} & paths}
        return set(self.pruned) | heads

    def linear(self, sources: Collection[str], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One dense weight in the model's own order, from the tensors that the checkpoint calls `sources`."""
        names = sorted({source.rpartition(".")[0] for source in sources})
        unknown = [source for source in sources if source.rpartition(".")[2] not in self.schema.tensor_names]
        if len(names) > 1 or unknown:
            raise RiaError(
                f"{self.where}: {', '.join(sorted(sources))}: meant for one weight, but not the tensors of one "
                "pruned linear."
            )
        name = names[0]
        linear = checked_linear(name, tensors, self.permutations.get(name), self.schema, self.where)
        self.claimed.add(name)
        dtype = self.dtype or linear.dtype
        exact = self.schema.weights is None and torch.promote_types(linear.dtype, dtype) == dtype
        self.rounded[name] = torch.float32 if exact else dtype
        return replace(linear, dtype=dtype).dense()

    def int8_matrix(
        self, parameter: str, sources: Collection[str], tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """A matrix that is stored in int8, for a parameter of the model, from the tensors that the checkpoint calls
        `sources`."""
        name, *others = sorted({source.rpartition(".")[0] for source in sources})
        reason = f"transformers takes it for one matrix with {others[0]}" if others else int8_rows.problem(tensors)
        if reason:
            raise RiaError(f"{self.where}: {name}.{reason}. Get the weight files again.")
        self.claimed.add(name)
        if name in self.schema.int8_linears:
            self.int8_linears.append(parameter)
        stored = self.schema.weights and getattr(torch, self.schema.weights.dtype)
        return int8_rows.decode(tensors, self.dtype or stored or torch.float32)


class RiaQuantizer(HfQuantizer):
    requires_calibration = True

    def __init__(self, quantization_config: RiaQuantizationConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.loading = Loading(quantization_config.schema)

    def _process_model_before_weight_loading(
        self, model: torch.nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        self.loading.open(model, [Path(file) for file in checkpoint_files or ()])

    def postprocess_model(self, model: torch.nn.Module, **kwargs: Any) -> None:
        """Here, because transformers 5.24 drops the conversions on the way to `_process_model_after_weight_loading`."""
        conversions = getattr(model, "_weight_conversions", None) or []
        super().postprocess_model(model, **kwargs)
        self.loading.close(model, conversions)
        # With a quantizer, HF may leave the tensors that it renamed or converted in the stored dtype.
        dtype = self.loading.dtype
        kept = kept_dtypes(model, dtype, type(model).__name__)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(kept.get(name, dtype or parameter.dtype))
        self.loading.prove(model, conversions)

    def param_needs_quantization(self, model: torch.nn.Module, param_name: str, **_: Any) -> bool:
        """transformers compares no shapes where this says yes. `Loading.close` does, and its errors name the file."""
        return True

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype in which a tensor of the file arrives. What we decompress stays as it is stored: scales, too."""
        return None if isinstance(converter, OURS) else super().get_new_dtype(converter, param, dtype)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.loading.dtype = dtype
        return dtype

    def get_weight_conversions(self) -> list[WeightConverter]:
        loading = self.loading
        parts = [PART.format(part) for part in (*loading.schema.tensor_names, int8_rows.INTEGERS)]
        experts = expert_converters(loading.schema, loading.linear, loading.errors.append, loading.placements)
        return [*experts, LinearConverter(parts, ".weight", operations=[Decompress(loading)])]

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Ours first: some models' own patterns for an expert's `.weight` match its `.weight_scale`, too."""
        self.loading.conversions = weight_conversions
        return [*self.get_weight_conversions(), *weight_conversions]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Decompress(ConversionOps):
    """The tensors of one pruned linear -> its dense weight in the model's own order.

    sources: their names in the checkpoint. Only these say which permutation belongs to them: `convert` gets the model's
    name for the weight, which differs where transformers renames modules, or adds or strips a prefix.
    """

    def __init__(self, loading: Loading):
        self.loading = loading
        self.sources: list[str] = []

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **_: Any) -> dict[str, torch.Tensor]:
        parts = (*self.loading.schema.tensor_names, int8_rows.INTEGERS)
        found = {part: input_dict[PART.format(part)] for part in parts if PART.format(part) in input_dict}
        tensors = {part: one[0] if isinstance(one, list) else one for part, one in found.items()}
        try:
            if int8_rows.INTEGERS in tensors:
                return {full_layer_name: self.loading.int8_matrix(full_layer_name, self.sources, tensors)}
            dense = self.loading.linear(self.sources, tensors)
        except RiaError as error:  # transformers would bury it in a table; `close` raises it
            self.loading.errors.append(error)
            dense = torch.empty(0)
        else:
            self.loading.placements[full_layer_name] = Placement(((self.sources[0].rpartition(".")[0],),))
        return {full_layer_name: dense}


class LinearConverter(WeightConverter):
    """transformers copies this for each parameter and gives the copy the tensors that the parameter is made of."""

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.operations[0].sources.append(source_key)


# Saving a loaded model writes plain dense weights, so these conversions are not to be undone.
OURS = (LinearConverter, ExpertsConverter)


def _made(conversion: Any, names: Collection[str]) -> list[str]:
    """Those of the parameters `names` that a conversion makes."""
    reverse = conversion.reverse_transform()
    return [name for name in names if reverse.rename_source_key(name)[1] is not None]


def _side_file(folder: Path, name: str, ask: bool) -> Path | None:
    """A file that belongs to the weights in `folder`: beside them or, if `ask`, from the folder's hub repository.

    Raises:
        RiaError: the hub did not provide it.
    """
    if (folder / name).is_file():
        return folder / name
    # The hub's cache holds only the files that were requested, in CACHE/models--USER--NAME/snapshots/COMMIT.
    cached = [p for p in folder.parents if p.name == "snapshots" and p.parent.name.startswith("models--")]
    if not cached or not ask:
        return None
    commit, *subfolders = folder.relative_to(cached[0]).parts
    repository = cached[0].parent.name.removeprefix("models--").replace("--", "/")
    with hub_errors(repository, f"{repository}: {name} is not in {folder}"):  # the caller's `token=` is not known here
        found = cached_file(
            repository, name, revision=commit, cache_dir=str(cached[0].parents[1]),
            subfolder="/".join(subfolders), _raise_exceptions_for_missing_entries=False,
        )  # fmt: skip
    return None if found is None else Path(found)


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(RiaQuantizationConfig)
    register_quantizer(QUANT_METHOD)(RiaQuantizer)
    refuse_unread_weights(RiaQuantizer)
