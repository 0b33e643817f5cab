"""The options of vLLM's engine that pruned layers depend on."""

import os
from dataclasses import dataclass

from vllm.config import ModelConfig, get_current_vllm_config_or_none

from ria_vllm.errors import RiaError

# These formats hold weights that a kernel has packed already.
PACKED_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer")

ADAPTERS_VARIABLE = "RIA_VLLM_OWN_ADAPTERS"
"""Which model the server's LoRA adapters were trained on: 1, the folder that is served; 0, the dense model."""


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
    def own_adapters(self) -> bool | None:
        """Whether all adapters were trained on the folder that is served; None: the user does not say.

        Raises:
            RiaError: the variable has a value that means nothing.
        """
        value = os.environ.get(ADAPTERS_VARIABLE, "")
        if value not in ("", "0", "1"):
            raise RiaError(
                f"{ADAPTERS_VARIABLE}={value[:80]}: set it to 1 if all LoRA adapters of this server were trained on the "
                "folder that is served, to 0 if all were trained on the dense model, or leave it unset."
            )
        return None if value == "" else value == "1"

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
