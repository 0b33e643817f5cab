"""One of vLLM's models that serves a checkpoint: what happens when it is built, loaded, reloaded and proved."""

import functools
from collections.abc import Mapping

import torch
from vllm.config import ModelConfig

from ria_vllm.format import proofs
from ria_vllm.serve.linear.method import stored_forms
from ria_vllm.serve.load.completeness import check_loaded, empty_weights
from ria_vllm.serve.load.engine import EngineOptions
from ria_vllm.serve.load.file_proofs import foreign_vector
from ria_vllm.serve.load.stream import Hooks, Taker, WeightStream
from ria_vllm.serve.model import layer_matching, reload
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.int8_heads import match_heads
from ria_vllm.serve.proving.layers import Prover


class ServedModel:
    """Prepares a model that was just built, and not loaded yet.

    Args:
        config: that it was built with.
        model: complete.
        built_from: vLLM's configuration of it, if the call that built it has one. A draft may be built with the
            configuration of its target, but has files of its own.

    Raises:
        RiaError: the checkpoint cannot be served by this model.
    """

    def __init__(self, config: RiaConfig, model: torch.nn.Module, built_from: ModelConfig | None):
        engine = EngineOptions.current()
        self.config, self.model = config, model
        self.built_from = built_from or engine.model_config
        self.embeddings = self.built_from is engine.model_config
        layer_matching.match_layers(config, model)
        heads, widened = match_heads(config, model, self.embeddings)
        takers = self._takers() | heads
        empty_weights(model, self.embeddings)
        self.prover = Prover(config, model, takers, self.embeddings)
        self.file_proofs = config.file_proofs() if proofs.wanted() else None
        model.ria_prove = self.prove_served
        hooks = Hooks(
            before_reload=functools.partial(reload.check_reload, config, engine.model_config),
            after_load=functools.partial(check_loaded, model, self.where, self.embeddings),
            prove=self.prove, file_proofs=self.file_proofs, forms=stored_forms(model), takers=takers,
            translation=config.translation or widened, loaded=engine.dummy_weights, embeddings=self.embeddings,
        )  # fmt: skip
        WeightStream(model, hooks)

    @property
    def where(self) -> str:
        """The folder or repository of its first weights."""
        return self.config.where if self.built_from is None else str(self.built_from.model)

    def _takers(self) -> dict[str, Taker | None]:
        """See `Hooks`. Modules are imported where they are needed: they import kernels."""
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

    def prove(self, sent: Mapping[str, torch.Tensor] | None, first: bool) -> None:
        # At first, the present configuration may be that of the model's target.
        present = self.built_from if first else self._present()
        if not proofs.wanted() or present is None or (first and str(present.model) != self.config.where):
            return
        schema, found, made = self.config.schema, sent or {}, None
        if sent is None and self.file_proofs is not None:
            found, of_experts = self.file_proofs.take()
            made = self.file_proofs.vector, of_experts
        if sent is None and self.config.compressed_tensors is None:
            schema, found = reload.proofs_of(self.config, present)
        if schema.proofs is not None:
            vector = schema.proof_vector
        elif made is not None:
            vector = made[0]
        else:  # of which vector proofs would be that somebody has sent is not known
            vector, found = foreign_vector, {}
        self.prover.prove(vector, found, str(present.model), made)

    def prove_served(self) -> tuple[str | None, int]:
        """(the digest of the proofs of the files that are served, how many matrices have been proved)."""
        schema, stored = reload.proofs_of(self.config, EngineOptions.current().model_config)
        return schema.proofs and schema.proofs.digest, self.prover.prove(schema.proof_vector, stored, self.where)
