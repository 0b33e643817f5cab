"""RiaConfig: what vLLM knows of a checkpoint with quant_method "ria"."""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ria_vllm.checkpoint import is_compressed, read_json
from ria_vllm.errors import RiaError
from ria_vllm.schema import QUANT_METHOD, REARRANGED_BY_VLLM, RiaSchema, SparsityConfig
from ria_vllm.serve.checkpoint_files import (
    OutOfReach,
    WeightHeaders,
    check_weight_files,
    locate,
    permutations_of,
    stored_modules,
)
from ria_vllm.serve.claims import ProvisionalDenseMethod
from ria_vllm.serve.compressed_tensors import Foreign, claims
from ria_vllm.serve.folding import Folding, RowOrder, fold
from ria_vllm.serve.linear import Sparse24LinearMethod
from ria_vllm.serve.load_report import LoadReport
from ria_vllm.serve.stream import WeightStream
from ria_vllm.serve.weight_scheme import Storage

# Only vLLM before 0.32 has it: its own GPT-NeoX, which does what `schema.REARRANGED_BY_VLLM` says of others. Later ones
# run transformers' model.
OLD_GPT_NEOX = "vllm.model_executor.models.gpt_neox"

# vLLM's own model of these families puts the rows of attention in another order as it loads them, of whatever has rows.
# That is right for compressed rows too, for no fold reorders any there; only the tensors are no longer the file's.
ROWS_REARRANGED_BY_VLLM = ("falcon",)

KERNEL_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer")

# vLLM puts this before the names of a draft model in speculative decoding; its checkpoint knows nothing of it.
DRAFT_PREFIX = "draft_model."


class RiaConfig(QuantizationConfig):
    """Which linears are pruned, in what order their inputs are stored, and which of these orders are folded away.

    Linears have the checkpoint's names here; `names` leads from vLLM's to those. vLLM copies and pickles the object on its
    way to the workers, so it holds plain data only until a model is built.

    Attributes:
        where: folder or repository.
        stored: linears and other modules with a weight, pruned or not; None where no weight file could say.
        pruned: those that are stored compressed; None where none is, or no weight file could say.
        required: linears that vLLM's own layers would load as raw numbers; some layer of ours must serve each.
        names: vLLM's name of a module, as far as its mappers tell -> the checkpoint's.
        unread: why the files could not be read, which made-up weights do not mind.
        stream: knows the checkpoint's names of the tensors that arrive.
        source: vLLM's ModelConfig of the model that was built.
        folds_allowed: False with LoRA.
        served_by: linear -> the class of the model that serves it, see `ria_vllm.serve.claims`.
        settled: a model was built with this config.
    """

    def __init__(self, schema: RiaSchema, foreign: Foreign | None = None):
        super().__init__()
        self.schema = schema
        self.foreign = foreign
        # vLLM reads it off any configuration, and then makes the cache fp8 unless the user chose a dtype.
        self.kv_cache_scheme = foreign and foreign.kv_cache_scheme
        self.where = "this model"
        self.pruned: set[str] | None = None
        self.stored: set[str] | None = None
        self.names: dict[str, str] = {}
        self.unread: str | None = None
        self.permutations: dict[str, np.ndarray] = {}
        self.folding = Folding()
        self.report = LoadReport()
        self.stream = WeightStream()
        self.source: Any = None
        self.folds_allowed = True
        self.required: set[str] = set()
        self.served_by: dict[str, type] = {}
        self.settled = False

    def __repr__(self) -> str:
        return f"RiaConfig({self.schema.format}, {len(self.permutations)} permutations)"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RiaConfig":
        if claims(config):
            return cls(RiaSchema(sparsity_config=SparsityConfig()), Foreign.parse(config))
        return cls(RiaSchema.parse(config, "config.json"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take over compressed-tensors' 2:4 checkpoints, which vLLM would refuse."""
        return QUANT_METHOD if claims(hf_quant_cfg) and user_quant in (None, QUANT_METHOD) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the permutations: producers must know their row order before the first weight arrives."""
        model = self.where = str(model_name)
        family = getattr(hf_config, "model_type", None)
        if family == "gpt_neox" and find_spec(OLD_GPT_NEOX):
            raise RiaError(f"{model}: a compressed GPT-NeoX needs vLLM 0.32 or later.")
        if family in REARRANGED_BY_VLLM:
            raise RiaError(
                f"{model}: vLLM rearranges the attention heads of {family} in a way that only dense weights allow, so it "
                "cannot be served compressed. `ria-vllm export` makes a dense folder of it."
            )
        self.stream.strict = family not in ROWS_REARRANGED_BY_VLLM
        try:
            headers = WeightHeaders(model, revision)
        except OutOfReach as error:
            # Made-up weights need nothing of it; which load format it will be is not known here.
            self.unread = str(error)
            return
        if headers.names is not None:
            stored = stored_modules(headers.names)
            self.stored = set(stored)
            self.pruned = {name for name, pruned in stored.items() if pruned} or None
            scaled = {name.removesuffix(".weight_scale") for name in headers.names if name.endswith(".weight_scale")}
            self.required = (self.pruned or set()) | {name for name in scaled if self._quantized(name)}
        if self.foreign is None:
            try:
                permutations = permutations_of(model, revision, self.schema)
            except RiaError as error:
                if self.stored is not None and not isinstance(error, OutOfReach):
                    raise
                self.unread, permutations = str(error), {}  # or a folder without weights
            try:
                check_weight_files(headers, self.schema)
            except OutOfReach as error:
                self.unread = str(error)
            for name in permutations:
                if not self._is_pruned(name):
                    raise RiaError(f"{model}: a permutation for {name}, which is no pruned linear of this model.")
            self.folding = fold(self.schema, permutations, self._is_pruned, model)
            self.permutations = permutations
        self.names = {name: name for name in (self.stored or self.permutations)}

    def check_reload(self, from_files: bool) -> None:
        """A reload may bring the weights of another run only if that stored the same linears in the same orders.

        Args:
            from_files: vLLM reads the weights from the model's files; else somebody sends them, by their names.

        Raises:
            RiaError: it did not, or its own files do not fit together.
        """
        if self.unread is not None:
            raise RiaError(
                f"{self.unread} This server was started with made-up weights without that. Start it again instead of "
                "loading others."
            )
        current = get_current_vllm_config_or_none()
        source = self.source if current is None else current.model_config
        if source is None or not from_files:
            return
        model, revision = str(source.model), source.revision
        path = locate(model, "config.json", revision)
        if path is None:
            return  # the weights come from elsewhere, by their names
        if is_compressed(path.parent) != (self.foreign is None):
            raise RiaError(
                f"{model}: its weights are stored in another form than those which this server was started with. Start a "
                "server of that folder instead of reloading."
            )
        if self.foreign is not None:
            return
        schema = RiaSchema.parse(read_json(path)["quantization_config"], str(path))
        permutations_of(model, revision, schema)
        headers = WeightHeaders(model, revision)
        check_weight_files(headers, schema)
        pruned = {name for name, sparse in stored_modules(headers.names or []).items() if sparse}
        if self.pruned is not None and pruned != self.pruned:
            differing = min(pruned ^ self.pruned)
            raise RiaError(
                f"{model}: {differing} is pruned there or on this server, but not on both. Start a server of that folder "
                "instead of reloading."
            )
        if (schema.permutations_digest, schema.folds) != (self.schema.permutations_digest, self.schema.folds):
            raise RiaError(
                f"{model}: its weights are stored in other channel orders than those which this server has folded. Start "
                "a server of that folder instead of reloading."
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        sparsity = self.schema.sparsity_config
        sparsity.ignore = hf_to_vllm_mapper.apply_list(sparsity.ignore)
        self.names = {
            new: name for known, name in self.names.items() for new in hf_to_vllm_mapper.apply_list([known])
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            if self.kv_cache_scheme is None:
                return None
            from ria_vllm.serve.kv_cache import method_for  # brings all of vLLM's compressed-tensors along

            return method_for(layer, self)
        current = get_current_vllm_config_or_none()
        load_format = None if current is None else str(current.load_config.load_format)
        if self.unread is not None and load_format != "dummy":
            raise RiaError(self.unread)
        if load_format in KERNEL_FORMATS:
            raise RiaError(
                f"--load-format {load_format} brings weights in a kernel's own form, which fits one kernel on one machine. "
                "Serve the folder that `ria-vllm compress` wrote without this option."
            )
        if current is not None:
            self.source = current.model_config
            # LoRA adapters are trained against channels in the model's own order, so with them every linear keeps to it.
            self.folds_allowed = current.lora_config is None
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        parts = self.parts_of(prefix)
        if not self.serves_sparse(prefix, parts):
            return ProvisionalDenseMethod()
        return Sparse24LinearMethod(self, prefix, parts)

    def serves_sparse(self, layer: str, parts: tuple[str, ...]) -> bool:
        """Whether a layer of ours serves the linears that vLLM's layer is made of: pruned ones, and quantized ones of others.

        Raises:
            RiaError: it would be some of them and not all.
        """
        pruned = [self._is_pruned(part) or self._quantized(part) for part in parts]
        if any(pruned) and not all(pruned):
            dense = next(part for part, sparse in zip(parts, pruned) if not sparse)
            raise RiaError(
                f"{layer}: vLLM fuses {', '.join(parts)}, but {dense} is dense and others are pruned. Compress the "
                "model again with all of them pruned, or all of them in --ignore."
            )
        return all(pruned)

    def parts_of(self, path: str) -> tuple[str, ...]:
        """The checkpoint's linears that vLLM's layer `path` is made of, in output order, by `packed_modules_mapping`.

        Where the checkpoint does not know the names they are vLLM's.
        """
        if path in self.names:
            return (self.names[path],)  # fused on disk already, as in Phi-3
        parent, _, leaf = path.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf) or [leaf]
        parts = [f"{parent}.{part}" if parent else part for part in leaves]
        if self.stored is not None and len(parts) == 3 and set(parts) - set(self.names) == {parts[2]}:
            parts[2] = parts[1]  # no v_proj: the values are the keys, as in Gemma 4, and vLLM loads k_proj twice
        return tuple(self.names.get(part, part) for part in parts)

    def _is_pruned(self, name: str) -> bool:
        if self.pruned is not None:
            return name in self.pruned
        return name in self.foreign.pruned if self.foreign is not None else not self.schema.ignored(name)

    def _quantized(self, name: str) -> bool:
        """Whether a checkpoint of others has int8 or fp8 values for this linear, which then may be dense."""
        return self.foreign is not None and self.foreign.storage(name).quantized is not None

    def storage(self, name: str) -> Storage:
        if self.foreign is not None:
            storage = self.foreign.storage(name)
            return storage if self._is_pruned(name) else replace(storage, dense=True)
        return Storage(quantized=torch.int8, scales="channel") if self.schema.weights else Storage()

    def row_orders(self, name: str) -> list[RowOrder]:
        """How the rows of the linear `name` are to be taken; empty: as they come."""
        return self.folding.row_orders.get(name, []) if self.folds_allowed else []

    def gathers(self, name: str) -> np.ndarray | None:
        """The permutation that the linear `name` must apply to its input itself; None where there is none to apply."""
        return None if self.folds_allowed and name in self.folding.folded else self.permutations.get(name)
