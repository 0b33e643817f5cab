"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""


def register() -> None:
    """Make vLLM know quant_method "ria"."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from ria_vllm.schema import QUANT_METHOD
    from ria_vllm.serve.config import RiaConfig

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(RiaConfig)
