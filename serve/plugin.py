"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""

import functools
import inspect
from types import CodeType

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

    vLLM has no hook for it. The last thing that `initialize_model` does with a model it has built is to record its
    parameters. Models inside a model are built by the same function; their paths are those of the outermost.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import utils

    from ria_vllm.serve.claims import settle
    from ria_vllm.serve.config import RiaConfig

    record, building = utils.record_metadata_for_reloading, inspect.unwrap(utils.initialize_model).__code__

    @functools.wraps(record)
    def record_metadata_for_reloading(model: torch.nn.Module) -> None:
        current = get_current_vllm_config()
        if isinstance(current.quant_config, RiaConfig) and _running(building) == 1:
            settle(current.quant_config, model)
            made_up = current.load_config.load_format == "dummy"
            current.quant_config.stream.attach(model, current.quant_config.check_reload, made_up)
        record(model)

    utils.record_metadata_for_reloading = record_metadata_for_reloading


def _running(code: CodeType) -> int:
    """How many calls of a function the caller is in."""
    count, frame = 0, inspect.currentframe()
    while frame is not None:
        count += frame.f_code is code
        frame = frame.f_back
    return count
