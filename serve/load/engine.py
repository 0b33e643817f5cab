"""The options of vLLM's engine that pruned layers depend on."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config_or_none

from ria_vllm import vllm_quirks
from ria_vllm.errors import RiaError

# These formats hold weights that a kernel has packed already.
PACKED_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer")

# What vLLM calls the type of Gemma 4's drafts.
CACHE_READER = "gemma4_mtp"

ADAPTERS_VARIABLE = "RIA_VLLM_OWN_ADAPTERS"
"""1: all LoRA adapters of the server were trained on the folder that is served."""


@dataclass(frozen=True)
class EngineOptions:
    """What the engine was started with.

    Attributes:
        load_format: `--load-format`; None outside an engine.
        lora: whether the engine serves LoRA adapters. False while a draft is built: only its target takes them.
        model_config: vLLM's configuration of the model; None outside an engine.
        shares_cache: others read what the model keeps in the KV cache: another engine or a store (KV connectors, KV
            offloading), or a draft with an `o_proj` of its own.
        weight_offload: the option by which vLLM keeps weights in the CPU's memory; None if it keeps none there.
        draft_reads_cache: a draft reads what the model keeps in the KV cache. False while the draft itself is built.
        needs_plain_head: why vLLM may read, or replace, the weight of the head or the embedding by itself; None: it
            does not.
    """

    load_format: str | None = None
    lora: bool = False
    model_config: ModelConfig | None = None
    shares_cache: bool = False
    weight_offload: str | None = None
    draft_reads_cache: bool = False
    needs_plain_head: str | None = None

    @classmethod
    def current(cls) -> "EngineOptions":
        """Read them from vLLM's current configuration, which is set while a model is built, loaded or reloaded."""
        config = get_current_vllm_config_or_none()
        if config is None:
            return cls()
        lora = config.lora_config is not None and not _builds_draft(config)
        leaves = config.kv_transfer_config is not None or config.cache_config.kv_offloading_size is not None
        drafted = _draft_reads_cache(config)
        return cls(
            str(config.load_config.load_format), lora, config.model_config, leaves or drafted,
            _weight_offload(config), drafted, _needs_plain_head(config),
        )  # fmt: skip

    @property
    def own_adapters(self) -> bool:
        """Whether the user says that all adapters were trained on the folder that is served.

        Raises:
            RiaError: the variable has a value that means nothing.
        """
        value = os.environ.get(ADAPTERS_VARIABLE, "")
        if value not in ("", "1"):
            raise RiaError(
                f"{ADAPTERS_VARIABLE}={value[:80]}: set it to 1 if all LoRA adapters of this server were trained on "
                "the folder that is served, or leave it unset."
            )
        return value == "1"

    @property
    def dummy_weights(self) -> bool:
        return self.load_format == "dummy"

    @property
    def takes_mistral(self) -> bool:
        """Whether vLLM prefers weights in Mistral's own format to others beside them."""
        return self.load_format in (None, "auto", "mistral")

    @property
    def packed_weights(self) -> bool:
        return self.load_format in PACKED_FORMATS


def models_being_built() -> list[Mapping[str, Any]]:
    """The local variables of each call of vLLM's `initialize_model` on the stack, the innermost first.

    Models inside a model are built by the same function.
    """
    from vllm.model_executor.model_loader import utils

    code = inspect.unwrap(utils.initialize_model).__code__
    calls, frame = [], inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            calls.append(dict(frame.f_locals))
        frame = frame.f_back
    return calls


def _builds_draft(config: VllmConfig) -> bool:
    """Whether the model that is being built is the draft of speculative decoding.

    vLLM builds EAGLE's and MTP's drafts under the configuration of their target, and a part of a model under a copy of
    the model's, so only what was asked to be built tells. Methods without a draft have the target's configuration in
    its place.
    """
    speculative = config.speculative_config
    if speculative is None or speculative.draft_model_config is speculative.target_model_config:
        return False
    calls = models_being_built()
    return bool(calls) and calls[-1].get("model_config") is speculative.draft_model_config


def _draft_reads_cache(config: VllmConfig) -> bool:
    """See `EngineOptions.draft_reads_cache`. Only vLLM's `Gemma4Proposer`, and the V2 runner's `Gemma4Speculator`, have
    such a draft."""
    draft = getattr(getattr(config.speculative_config, "draft_model_config", None), "hf_config", None)
    return getattr(draft, "model_type", None) == CACHE_READER and not _builds_draft(config)


def _needs_plain_head(config: VllmConfig) -> str | None:
    """See `EngineOptions.needs_plain_head`."""
    model, speculative = config.model_config, config.speculative_config
    if config.lora_config is not None:
        return "adapters may change it"
    if speculative is not None and speculative.draft_model_config is not speculative.target_model_config:
        return "a draft may share it"
    if model is not None and model.runner_type != "generate":
        return "a pooling model may take it apart"
    if model is not None and model.head_dtype != model.dtype:
        return "the head has a dtype of its own (head_dtype)"
    if model is not None and vllm_quirks.reads_embedding(model.hf_config):
        return "vLLM's model reads its weight directly"
    return None


def _weight_offload(config: VllmConfig) -> str | None:
    """The option by which vLLM's `create_offloader` moves weights out of the GPU's memory; None if it moves none."""
    offload = config.offload_config
    uva, prefetch = offload.uva.cpu_offload_gb > 0, offload.prefetch.offload_group_size > 0
    if offload.offload_backend == "prefetch" or (offload.offload_backend == "auto" and prefetch):
        return "--offload-group-size"
    return "--cpu-offload-gb" if uva else None
