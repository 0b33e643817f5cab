"""The options of vLLM's engine that pruned layers depend on."""

from dataclasses import dataclass

from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config_or_none

from ria_vllm import vllm_quirks

# What vLLM calls the type of Gemma 4's drafts, which attend to their target's keys and values.
CACHE_READER = "gemma4_mtp"


@dataclass(frozen=True)
class EngineOptions:
    """What the engine was started with.

    Attributes:
        lora: the engine serves LoRA adapters.
        model_config: vLLM's configuration of the model; None outside an engine.
        shares_cache: other engines or a store read what the model keeps in the KV cache (KV connectors, KV offloading).
        draft_reads_cache: a draft does.
        needs_plain_head: why vLLM may read, or replace, the weight of the head or the embedding by itself; None: it
            does not.
    """

    lora: bool = False
    model_config: ModelConfig | None = None
    shares_cache: bool = False
    draft_reads_cache: bool = False
    needs_plain_head: str | None = None

    @classmethod
    def current(cls) -> "EngineOptions":
        """Read them from vLLM's current configuration, which is set while a model is built and loaded."""
        config = get_current_vllm_config_or_none()
        if config is None:
            return cls()
        draft = getattr(getattr(config.speculative_config, "draft_model_config", None), "hf_config", None)
        return cls(
            lora=config.lora_config is not None,
            model_config=config.model_config,
            shares_cache=config.kv_transfer_config is not None or config.cache_config.kv_offloading_size is not None,
            draft_reads_cache=getattr(draft, "model_type", None) == CACHE_READER,
            needs_plain_head=_needs_plain_head(config),
        )


def _needs_plain_head(config: VllmConfig) -> str | None:
    """See `EngineOptions.needs_plain_head`."""
    model, speculative = config.model_config, config.speculative_config
    if config.lora_config is not None:
        return "adapters may change it"
    drafts = speculative is not None and speculative.method != "draft_model"  # which has a head of its own
    if drafts and speculative.draft_model_config is not speculative.target_model_config:
        return "a draft may share it"
    if model is not None and model.runner_type != "generate":
        return "a pooling model may take it apart"
    if model is not None and model.head_dtype != model.dtype:
        return "the head has a dtype of its own (head_dtype)"
    if model is not None and vllm_quirks.reads_embedding(model.hf_config):
        return "vLLM's model reads its weight directly"
    return None
