"""The options of vLLM's engine that pruned layers depend on."""

import os
from dataclasses import dataclass

from vllm.config import ModelConfig, get_current_vllm_config_or_none

# These formats hold weights that a kernel has packed already.
PACKED_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer")

ADAPTERS_VARIABLE = "RIA_VLLM_OWN_ADAPTERS"
"""1 says that the LoRA adapters were trained on the folder that is served, not on the dense model."""


@dataclass(frozen=True)
class EngineOptions:
    """What the engine was started with.

    Attributes:
        load_format: `--load-format`; None outside an engine.
        lora: whether the engine serves LoRA adapters.
        model_config: vLLM's configuration of the model; None outside an engine.
    """

    load_format: str | None = None
    lora: bool = False
    model_config: ModelConfig | None = None

    @classmethod
    def current(cls) -> "EngineOptions":
        """Read them from vLLM's current configuration, which is set while a model is built, loaded or reloaded."""
        config = get_current_vllm_config_or_none()
        if config is None:
            return cls()
        return cls(str(config.load_config.load_format), config.lora_config is not None, config.model_config)

    @property
    def own_adapters(self) -> bool:
        """Whether the user says that the adapters were trained on the folder that is served."""
        return os.environ.get(ADAPTERS_VARIABLE) == "1"

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
