"""One of vLLM's models that serves a checkpoint: what happens when it is built, loaded, reloaded and proved."""

import functools

import torch
from vllm.config import ModelConfig

from ria_vllm.errors import RiaError
from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import stored_forms
from ria_vllm.serve.load import stream
from ria_vllm.serve.load.completeness import check_loaded, empty_weights
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.file_proofs import foreign_vector
from ria_vllm.serve.load.load_report import LoadReport
from ria_vllm.serve.load.stream import Taker, Weights
from ria_vllm.serve.model import layer_matching, reload
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.int8_heads import match_heads
from ria_vllm.serve.proving.layers import Prover
from ria_vllm.serve.proving.proved import Vector
from ria_vllm.serve.reload.layerwise import Reloads


class ServedModel:
    """Prepares a model that was just built and not loaded yet, and then stands between vLLM's loaders and the model, at
    the start and in every reload.

    Args:
        config: that it was built with.
        model: complete.
        built_from: vLLM's configuration of it, if the call that built it has one. A draft may be built with the
            configuration of its target, but has files of its own.

    Attributes:
        embeddings: the model has embeddings and a head of its own. A draft may have its target's.
        takers: see `stream.left_to_the_model`.
        translation: of tensors that are stored in a form that no layer takes. It comes before everything else.
        sent: matrix -> its proof, which somebody has sent beside the weights.
        seen: the names of the tensors that have come in this load or reload.
        loaded: the model has weights, perhaps dummies.
        packed: they are packed.
        from_files: those that have come last are of all files, and not proved yet.

    Raises:
        RiaError: the checkpoint cannot be served by this model.
    """

    def __init__(self, config: RiaConfig, model: torch.nn.Module, built_from: ModelConfig | None):
        engine = EngineOptions.current()
        self.config, self.model = config, model
        self.built_with, self.built_from = engine.model_config, built_from or engine.model_config
        self.embeddings = self.built_from is engine.model_config
        layer_matching.match_layers(config, model)
        heads, widened = match_heads(config, model, self.embeddings)
        self.takers = self._takers() | heads
        self.forms = stored_forms(model)
        self.translation = config.translation or widened
        empty_weights(model, self.embeddings)
        self.prover = Prover(config, model, self.takers, self.embeddings)
        self.file_proofs = config.file_proofs() if proofs.wanted() else None
        self.sent: dict[str, torch.Tensor] = {}
        self.seen: set[str] = set()
        self.loaded = engine.dummy_weights
        self.packed = self.from_files = False
        self._load, self._process = model.load_weights, getattr(model, "process_weights_after_loading", lambda: None)
        self.reloads = Reloads(model, self._after_reload, self.embeddings, self._forget, engine.dummy_weights)

        @functools.wraps(self._load)
        def load_weights(weights: Weights, *args: object, **kwargs: object) -> object:
            try:
                return self._load_weights(weights, *args, **kwargs)
            except BaseException:
                self._forget()
                self.reloads.give_up()
                raise

        model.load_weights = load_weights
        model.process_weights_after_loading = self._when_packed
        model.ria_reloads = self.reloads

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

    def _present(self) -> ModelConfig | None:
        """vLLM's present configuration of this model, which a reload may have changed."""
        return (EngineOptions.current().model_config if self.embeddings else None) or self.built_from

    def _forget(self) -> None:
        """A load begins, or has failed."""
        self.sent.clear()
        self.seen.clear()
        if self.file_proofs is not None:
            self.file_proofs.forget()

    def _load_weights(self, weights: Weights, *args: object, **kwargs: object) -> object:
        first, all_files = not self.loaded, stream.are_files(weights)
        self.from_files = False
        if self.packed and not self.reloads.is_on:
            raise RiaError(
                "weights arrive outside of a reload, or after one that was refused or in which the model has computed. "
                "Load them with vLLM's reload_weights or its weight transfer, or start the server again."
            )
        # vLLM's loaders read files lazily. A list is a piece of what a trainer sends; it comes from no file.
        lazy = not isinstance(weights, list | tuple)
        if self.loaded:
            reload.check_reload(self.config, self.built_with, lazy)
        elif all_files and self._is_configured and not proofs.wanted():  # which would show that the folder was replaced
            reload.check_files(self.config, self.built_from)
        self.loaded = True
        weights = stream.once(weights, self.seen, all_files or first)
        if self.translation is not None:
            weights = self.translation.translate(weights, lazy)
        weights = stream.without_proofs(weights, self.sent)
        if lazy and self.file_proofs is not None:
            weights = self.file_proofs.watch(weights)
        result = self._load(stream.left_to_the_model(weights, self.takers, self.forms), *args, **kwargs)
        if not self.reloads.is_on:
            self.seen.clear()
        if first and lazy:
            check_loaded(self.model, self.where, self.embeddings)
        self.from_files = all_files or (first and lazy)  # a loader of another package reads the model's files, too
        self.reloads.from_files = self.from_files
        return result

    def _when_packed(self) -> None:
        """vLLM calls this when all layers of the model are packed."""
        self.packed = True
        LoadReport.of(self.model).finish()
        self._process()
        if self.from_files or self.sent:  # else these are dummies
            self._prove(first=True)

    def _after_reload(self) -> None:
        if self.translation is not None:
            self.translation.finish()
        self._prove(first=False)

    def _prove(self, first: bool) -> None:
        """Prove what has come."""
        from_files, sent = self.from_files, dict(self.sent)
        self.from_files = False
        self.sent.clear()
        present = self.built_from if first else self._present()
        if not proofs.wanted() or present is None or (first and not self._is_configured):
            return
        schema, found, made = self.config.schema, sent, None
        if from_files and self.file_proofs is not None:
            found, of_experts = self.file_proofs.take()
            made = self.file_proofs.vector, of_experts
        if from_files and self.config.compressed_tensors is None:
            schema, found = reload.proofs_of(self.config, present)
        if schema.proofs is not None:
            vector: Vector = schema.proof_vector
        elif made is not None:
            vector = made[0]
        else:  # of which vector proofs would be that somebody has sent is not known
            vector, found = foreign_vector, {}
        self.prover.prove(vector, found, str(present.model), made)
