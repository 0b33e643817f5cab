"""One of vLLM's models that serves a checkpoint: what happens when it is built, loaded and proved."""

import functools

import torch
from vllm.config import ModelConfig, get_current_vllm_config_or_none
from vllm.logger import init_logger

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import stored_linears
from ria_vllm.serve.load import stream
from ria_vllm.serve.load.completeness import check_loaded, empty_weights
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.file_proofs import foreign_vector
from ria_vllm.serve.load.load_report import LoadReport
from ria_vllm.serve.load.stream import Taker, Weights
from ria_vllm.serve.model import checkpoint_files, layer_matching
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.int8_heads import match_heads
from ria_vllm.serve.proving.layers import Prover
from ria_vllm.serve.proving.proved import Vector
from ria_vllm.serve.reload import WAY_OUT

logger = init_logger("vllm.ria")


class ServedModel:
    """Prepares a model that was just built and not loaded yet, and then stands between vLLM's loaders and the model.

    Args:
        config: that it was built with.
        model: complete.
        built_from: vLLM's configuration of it, if the call that built it has one. A draft may be built with the
            configuration of its target, but has files of its own.

    Attributes:
        embeddings: the model has embeddings and a head of its own. A draft may have its target's.
        takers: see `stream.left_to_the_model`.
        translation: of tensors that are stored in a form that no layer takes. It comes before everything else.
        packed: the model is loaded, and its weights are packed.

    Raises:
        RiaError: the checkpoint cannot be served by this model.
    """

    def __init__(self, config: RiaConfig, model: torch.nn.Module, built_from: ModelConfig | None):
        engine = EngineOptions.current()
        _refuse_dummies(config)
        self.config, self.model = config, model
        self.built_from = built_from or engine.model_config
        self.embeddings = self.built_from is engine.model_config
        layer_matching.match_layers(config, model)
        heads, widened = match_heads(config, model, self.embeddings)
        self.takers = self._takers() | heads
        self.ours = stored_linears(model)
        self.translation = config.translation or widened
        empty_weights(model, self.embeddings)
        self.prover = Prover(config, model, self.takers, self.embeddings)
        self.file_proofs = config.file_proofs() if proofs.wanted() else None
        self.packed = False
        self._load, self._process = model.load_weights, getattr(model, "process_weights_after_loading", lambda: None)

        @functools.wraps(self._load)
        def load_weights(weights: Weights, *args: object, **kwargs: object) -> object:
            return self._load_weights(weights, *args, **kwargs)

        model.load_weights = load_weights
        model.process_weights_after_loading = self._when_packed
        model.ria_served = True

    @property
    def where(self) -> str:
        """The folder or repository of its first weights."""
        return self.config.where if self.built_from is None else str(self.built_from.model)

    @property
    def _is_configured(self) -> bool:
        """vLLM's configuration is that of its files. A draft may have been built with its target's."""
        return self.built_from is not None and str(self.built_from.model) == self.config.where

    def _takers(self) -> dict[str, Taker | None]:
        """Modules are imported where they are needed: they import kernels."""
        found: dict[str, Taker | None] = {}
        if self.config.rearranged:
            from ria_vllm.serve.model import rearranged

            linears = self.config.required | (set(self.config.schema.int8_linears) - self.config.int8)
            found |= rearranged.takers(self.model, linears)
        if self.config.experts:
            from ria_vllm.serve.model import experts_matching

            found |= experts_matching.takers(self.config, self.model)
        return found

    def _load_weights(self, weights: Weights, *args: object, **kwargs: object) -> object:
        if self.packed:
            raise RiaError(f"{self.where}: weights arrive after the model was loaded, which takes none. {WAY_OUT}")
        if self._is_configured and not proofs.wanted():  # which would show that the folder was replaced
            self.config.check_unchanged(self.built_from)
        weights = stream.once(weights)
        if self.translation is not None:
            weights = self.translation.translate(weights)
        if self.file_proofs is not None:
            weights = self.file_proofs.watch(weights)
        result = self._load(stream.left_to_the_model(weights, self.takers, self.ours), *args, **kwargs)
        check_loaded(self.model, self.where, self.embeddings)
        return result

    def _when_packed(self) -> None:
        """vLLM calls this when all layers of the model are packed."""
        self.packed = True
        LoadReport.of(self.model).finish()
        self._process()
        if not proofs.wanted():
            return
        if self._is_configured:
            self._prove()
        else:
            logger.warning("%s: its layers are not proved, as vLLM built it with another model's config.", self.where)

    def _prove(self) -> None:
        """Prove what was loaded."""
        vector: Vector = foreign_vector
        found: dict[str, torch.Tensor] = {}
        of_experts: dict[str, torch.Tensor] = {}
        if self.file_proofs is not None:
            vector = self.file_proofs.vector
            found, of_experts = self.file_proofs.take()
        made = vector, of_experts
        if self.config.schema.proofs is not None:
            vector, found = self.config.schema.proof_vector, self._stored_proofs()
        self.prover.prove(vector, found, self.where, made)

    def _stored_proofs(self) -> dict[str, torch.Tensor]:
        """The proof of each matrix; none where ria-vllm did not write the files."""
        revision = None if self.built_from is None else self.built_from.revision
        return checkpoint_files.proofs_of(self.config.schema, self.where, revision)


def _refuse_dummies(config: RiaConfig) -> None:
    current = get_current_vllm_config_or_none()
    if current is not None and str(current.load_config.load_format) == "dummy":
        raise RiaError(
            f"{config.where}: --load-format dummy: a pruned model has no dummy weights. Leave the option out, or serve "
            "the dense model with it."
        )
