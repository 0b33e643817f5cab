"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""

import functools

import torch


def register() -> None:
    """Make vLLM know quant_method "ria"."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from ria_vllm.schema import QUANT_METHOD
    from ria_vllm.serve.config import RiaConfig

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(RiaConfig)
        watch_models()


def watch_models() -> None:
    """Let `ria_vllm.serve.claims` see every model that is built with our config, whole and before it is loaded.

    vLLM has no hook for it. Its one function that builds models calls these two, at the beginning and at the end; models
    inside a model are built by it too, and belong to the outermost.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import utils

    from ria_vllm.serve.claims import settle
    from ria_vllm.serve.config import RiaConfig

    configure, record = utils.configure_quant_config, utils.record_metadata_for_reloading
    begun: list[type] = []

    @functools.wraps(configure)
    def configure_quant_config(quant_config: object, model_class: type) -> None:
        if isinstance(quant_config, RiaConfig):
            begun.append(model_class)
        configure(quant_config, model_class)

    @functools.wraps(record)
    def record_metadata_for_reloading(model: torch.nn.Module) -> None:
        if type(model) in begun:
            # What was begun after it and never came here failed on the way.
            del begun[len(begun) - 1 - begun[::-1].index(type(model)) :]
            if not begun:
                config = get_current_vllm_config().quant_config
                settle(config, model)
                config.stream.attach(model, config.check_reload)
        record(model)

    utils.configure_quant_config = configure_quant_config
    utils.record_metadata_for_reloading = record_metadata_for_reloading
