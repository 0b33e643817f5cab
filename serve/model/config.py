"""RiaConfig: what vLLM knows about a checkpoint with quant_method "ria"."""

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from ria_vllm import vllm_quirks
from ria_vllm.checkpoint.folding import Folding, fold
from ria_vllm.checkpoint.weight_files import INDEX_FILE, SINGLE_FILE
from ria_vllm.compressed_tensors.config import CompressedTensorsConfig, is_24_checkpoint, quantization_of
from ria_vllm.compressed_tensors.packed_forms import Translation
from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.schema import QUANT_METHOD, RiaSchema, SparsityConfig
from ria_vllm.format.stacks import LayerExperts
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.format.weight_scheme import WeightScheme
from ria_vllm.serve.experts.names import check_plain, plain_experts
from ria_vllm.serve.experts.stored import ExpertPermutations, stored_experts
from ria_vllm.serve.kernels.choice import refuse_on_gpus
from ria_vllm.serve.linear.method import ProvisionalDenseMethod, Sparse24LinearMethod, StoredLinear
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.file_proofs import FileProofs, foreign_vector
from ria_vllm.serve.load.stream import NOT_SERVED
from ria_vllm.serve.model.checkpoint_files import files_of, folder_of, permutations_of

logger = init_logger("vllm.ria")

ADAPTERS_VARIABLE = "RIA_VLLM_OWN_ADAPTERS"
"""1: all LoRA adapters of the server were trained on the folder that is served."""

# vLLM puts this before the names of a draft model in speculative decoding. The names in its checkpoint do not have it.
DRAFT_PREFIX = "draft_model."


def compressed_tensors_of(config: Mapping[str, Any], where: str) -> CompressedTensorsConfig:
    """Parse a `quantization_config`, of the file `where`, that `is_24_checkpoint` accepts.

    Raises:
        RiaError: it is not served here.
    """
    if config.get("kv_cache_scheme"):
        raise RiaError(
            f"{where}: kv_cache_scheme: a checkpoint's scales of an fp8 KV cache are not served. Remove this key from "
            "quantization_config; the cache then has the model's dtype."
        )
    return CompressedTensorsConfig.parse(config)


class RiaConfig(QuantizationConfig):
    """Which linears are pruned, how their input channels are permuted, and which permutations are folded away.

    Linears have the checkpoint's names here; `names` translates vLLM's names to those. vLLM copies and pickles the
    object on its way to the workers, so it holds plain data only until a model is built.

    Attributes:
        schema: of config.json.
        compressed_tensors: the configuration of a checkpoint that compressed-tensors wrote; None for one of ours.
        where: folder or repository.
        tensors: all that the weight files have, but those that only describe others.
        stored: linears and other modules with a weight, pruned or not.
        int8: matrices in int8 that no linear layer of ours serves: heads, embeddings, and what is left of
            `RiaSchema.int8_linears`, see `match_layers`.
        pruned: those that are stored compressed; if none are, those that compressed-tensors' configuration calls 2:4.
        required: linears whose tensors vLLM's own layers would misread, so that one of our layers must serve each.
        names: vLLM's name of a module, as far as its mappers tell -> the checkpoint's.
        permutations: linear -> int32 [in], that of its input channels.
        folding: the permutations that the rows of other linears absorb.
        translation: of tensors in forms that only compressed-tensors has; the names here are those after it.
        experts: name of an MoE layer's experts -> these, if they are pruned.
        expert_linears: their linears.
        expert_layers: vLLM's name of such experts, as far as its mappers tell -> the checkpoint's.
        served_by: linear, or experts -> the class of the model that serves it, see `layer_matching`. If not empty, a
            model was built with this config.
        rearranged: vLLM's model changes the order of rows.
        scales_head: vLLM's model scales the rows of the head as it loads them.
    """

    def __init__(self, schema: RiaSchema, compressed_tensors: CompressedTensorsConfig | None = None):
        super().__init__()
        self.schema = schema
        self.compressed_tensors = compressed_tensors
        self.where = "this model"
        self.tensors: set[str] = set()
        self.stored: set[str] = set()
        self.pruned: Container[str] = set() if compressed_tensors is None else compressed_tensors.pruned
        self.int8: set[str] = set()
        self.names: dict[str, str] = {}
        self.permutations: dict[str, np.ndarray] = {}
        self.folding = Folding()
        self.translation: Translation | None = None
        if compressed_tensors is not None:
            self.translation = Translation(compressed_tensors.form, compressed_tensors.weight_format)
        self.required: set[str] = set()
        self.experts: dict[str, LayerExperts] = {}
        self.expert_linears: set[str] = set()
        self.expert_layers: dict[str, str] = {}
        self.served_by: dict[str, type] = {}
        self.rearranged = False
        self.scales_head = False

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
        if is_24_checkpoint(config):
            theirs = compressed_tensors_of(config, "config.json")
            return cls(RiaSchema(sparsity_config=SparsityConfig()), theirs)
        return cls(RiaSchema.parse(config, "config.json"))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take over compressed-tensors' 2:4 checkpoints, which vLLM would refuse."""
        return QUANT_METHOD if is_24_checkpoint(hf_quant_cfg) and user_quant in (None, QUANT_METHOD) else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read what producers must know before the first weight arrives: names and permutations."""
        self.where = str(model_name)
        if not current_platform.is_cpu():
            refuse_on_gpus(self.schema.pattern, self.where)
        self.rearranged = vllm_quirks.rearranged(hf_config)
        self.scales_head = vllm_quirks.changes_head(hf_config)
        folder = folder_of(self.where, revision)
        files = files_of(folder)
        if not files:
            raise RiaError(
                f"{self.where}: no weights here ({SINGLE_FILE}, or shards with {INDEX_FILE}). Get these files, too. A "
                "model on an object store has to be served from a local copy."
            )
        self._read_names(list(files))
        if self.compressed_tensors is None:
            self._fold(permutations_of(folder, self.schema, files))
        self.names = {name: name for name in self.stored}

    def check_unchanged(self, model_config: ModelConfig) -> None:
        """Check that the folder still is the one that was read before the model was built.

        Raises:
            RiaError: it has been replaced.
        """
        folder = folder_of(self.where, model_config.revision)
        content = dict(quantization_of(read_json(folder / "config.json")))
        now = RiaConfig.from_config(content)
        now.maybe_update_config(self.where, model_config.hf_config, model_config.revision)
        if (now.schema, now.compressed_tensors, now.tensors) != (self.schema, self.compressed_tensors, self.tensors):
            raise RiaError(
                f"{self.where}: these files have been replaced while the server was starting. Start it again."
            )

    def _read_names(self, tensors: list[str]) -> None:
        theirs = self.compressed_tensors
        if theirs is not None:
            check_plain(tensors, self.where)
        self.tensors = self.awaited(tensors)
        parts = [name.rpartition(".")[::2] for name in self.tensors]
        pruned = {linear for linear, part in parts if part == "compressed"}
        int8 = {linear for linear, part in parts if part == INTEGERS}
        self.stored = pruned | {linear for linear, part in parts if part in ("weight", INTEGERS)}
        if pruned or theirs is None:
            self.pruned = pruned
        if lost := sorted(set(self.schema.int8_linears) - int8):
            raise RiaError(f"{self.where}: {lost[0]}.{INTEGERS} is missing. Get all files of one run.")
        self.int8 = int8 - set(self.schema.int8_linears)
        if theirs is None:
            self.experts = stored_experts(self.schema, pruned, self.where)
        self.expert_linears = {name for experts in self.experts.values() for name, _, _ in experts.linears()}
        self.expert_layers = {name: name for name in self.experts}
        scaled = {linear for linear, part in parts if part == "weight_scale"}
        self.required = pruned | (set() if theirs is None else set(filter(self.is_quantized, scaled)))
        if theirs and any(one.linear("up", 0) in theirs.pruned for one in self.dense_experts().values()):
            logger.warning_once(
                "%s: config.json says that experts are 2:4. Those of other programs are served dense: the answers are "
                "right, without the savings. `ria-vllm compress` makes a folder of which they are served pruned.",
                self.where,
            )

    def awaited(self, tensors: Iterable[str]) -> set[str]:
        """The tensors called `tensors` in the files, as layers await them, but those that only describe others.

        Raises:
            RiaError: a packed linear lacks one.
        """
        names = tensors if self.translation is None else self.translation.names(tensors)
        return {name for name in names if name.rpartition(".")[2] not in NOT_SERVED}

    def _fold(self, permutations: dict[str, np.ndarray]) -> None:
        for name in permutations:
            if name not in self.pruned:
                raise RiaError(f"{self.where}: a permutation for {name}, which is not a pruned linear of this model.")
        self.folding = fold(self.schema, permutations, self.pruned.__contains__, self.where)
        self.permutations = permutations

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.expert_layers = {
            new.rsplit(".", 2)[0]: name
            for known, name in self.expert_layers.items()
            for new in hf_to_vllm_mapper.apply_list([f"{known}.0.up_proj"])
        }
        self.names = {new: name for known, name in self.names.items() for new in hf_to_vllm_mapper.apply_list([known])}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # imports kernels for them

        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        self._check_engine()
        prefix = prefix.removeprefix(DRAFT_PREFIX)
        if isinstance(layer, RoutedExperts):
            return self.experts_method(layer, self.expert_layers.get(prefix))
        linears = self.linears_of(prefix)
        return self.sparse_method(prefix, linears) if self.serves_sparse(prefix, linears) else ProvisionalDenseMethod()

    def _check_engine(self) -> None:
        engine = EngineOptions.current()
        if engine.draft_reads_cache:
            raise RiaError(
                "the draft of --speculative-config reads its target's KV cache, in which a pruned model may have "
                "channels in another order. Serve without --speculative-config."
            )
        unfit = self.schema.unlike_dense
        if engine.lora and unfit and os.environ.get(ADAPTERS_VARIABLE) != "1":
            without = " ".join({"smooth": "--smooth 0", "rotate": "--rotate none"}[name] for name in unfit)
            raise RiaError(
                f"{self.where}: this folder's linears read scaled or rotated inputs (`compress "
                f"{' '.join(f'--{name} {value}' for name, value in unfit.items())}`), so LoRA adapters of the dense "
                f"model would give wrong answers. For those, compress the model with {without}. If yours were "
                f"trained on this folder, set {ADAPTERS_VARIABLE}=1."
            )

    def experts_method(self, layer: torch.nn.Module, name: str | None) -> QuantizeMethodBase:
        """The method by which vLLM's MoE `layer` serves the pruned experts `name`, or dense ones."""
        from ria_vllm.serve.experts.dense import DenseExpertsMethod
        from ria_vllm.serve.experts.method import Sparse24MoEMethod, check_count

        if name is None:
            return DenseExpertsMethod(layer)
        experts = self.experts[name]
        check_count(layer, experts)
        permutations = ExpertPermutations.of(experts, self.permutations, self.folding_under(EngineOptions.current()))
        return Sparse24MoEMethod(layer, experts, self.scheme(experts.linear("up", 0)), permutations)

    def sparse_method(self, layer: str, linears: tuple[str, ...]) -> Sparse24LinearMethod:
        """The method by which vLLM's layer called `layer` serves these linears."""
        folding = self.folding_under(EngineOptions.current())
        stored = tuple(self.stored_linear(linear, folding) for linear in linears)
        return Sparse24LinearMethod(layer, stored)

    def serves_sparse(self, layer: str, linears: tuple[str, ...]) -> bool:
        """Whether one of our layers serves these linears, because they are pruned or quantized.

        Raises:
            RiaError: that holds for some of them, but not for all.
        """
        ours = [linear in self.pruned or self.is_quantized(linear) for linear in linears]
        if any(ours) and not all(ours):
            dense = next(linear for linear, is_ours in zip(linears, ours) if not is_ours)
            raise RiaError(
                f"{layer}: vLLM fuses {', '.join(linears)}, but {dense} is not stored like the others. Compress the "
                "model again with all of them pruned, or all of them in --ignore."
            )
        return all(ours)

    def linears_of(self, path: str) -> tuple[str, ...]:
        """The checkpoint's linears that vLLM's layer `path` is made of, in output order, by `packed_modules_mapping`.

        vLLM's own names, if the checkpoint does not know the layer.
        """
        if path in self.names:
            return (self.names[path],)  # fused on disk already, as in Phi-3
        parent, _, leaf = path.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf) or [leaf]
        linears = [f"{parent}.{name}" if parent else name for name in leaves]
        if len(linears) == 3 and set(linears) - set(self.names) == {linears[2]}:
            linears[2] = linears[1]  # no v_proj: the values are the keys, as in Gemma 4, and vLLM loads k_proj twice
        return tuple(self.names.get(name, name) for name in linears)

    def is_quantized(self, name: str) -> bool:
        """Whether integers or fp8 values are stored for this linear, which may be dense."""
        if self.compressed_tensors is not None:
            return self.compressed_tensors.scheme(name).quantized
        return name in self.schema.int8_linears

    def scheme(self, name: str) -> WeightScheme:
        """How the linear `name` is stored."""
        if self.compressed_tensors is not None:
            scheme = self.compressed_tensors.scheme(name)
            return scheme if name in self.pruned else replace(scheme, dense=True)
        if name in self.schema.int8_linears:
            return WeightScheme.of_dense(self.schema)
        return WeightScheme.of(self.schema)

    def file_proofs(self) -> FileProofs | None:
        """Makes proofs of the tensors that are loaded and have none in their checkpoint."""
        kinds = {name: (kind, e) for one in self.dense_experts().values() for name, kind, e in one.linears()}
        if self.compressed_tensors is None:
            if self.schema.proofs is None or not kinds:
                return None
            return FileProofs(lambda _: None, kinds, self.schema.proof_vector, others=False)
        ours = {name: self.scheme(name) for name in self.required}
        signs_only = any(scheme.activations == FP8_DTYPE for scheme in ours.values())
        return FileProofs(ours.get, kinds, partial(foreign_vector, signs_only=signs_only))

    def dense_experts(self) -> dict[str, LayerExperts]:
        """Those that vLLM's own layers serve, by their names, as far as they are stored one by one."""
        found = plain_experts(self.stored - self.required)
        return {name: experts for name, experts in found.items() if name not in self.experts}

    def folding_under(self, engine: EngineOptions) -> Folding:
        """What is folded. With adapters, nothing: they are trained against channels in the model's own order. Nor where
        others read the KV cache, because they may have folded otherwise, or not at all."""
        return Folding() if engine.lora or engine.shares_cache else self.folding

    def stored_linear(self, name: str, folding: Folding) -> StoredLinear:
        """The linear `name`, as a layer loads it."""
        return StoredLinear(
            name,
            self.scheme(name),
            self.permutations.get(name),
            name in folding.folded,
            tuple(folding.row_permutations.get(name, ())),
            claims_24=name not in self.schema.int8_linears
            and (self.compressed_tensors is None or name in self.compressed_tensors.pruned),
        )
