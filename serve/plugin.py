"""The entry point that vLLM calls in each of its processes (group `vllm.general_plugins`)."""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch


def register() -> None:
    """Register quant_method "ria" with vLLM.

    Raises:
        RiaError: this vLLM lacks names that are used.
    """
    import vllm

    from ria_vllm.errors import RiaError
    from ria_vllm.serve import vllm_names

    vllm_names.check_version(vllm.__version__)
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        from ria_vllm.format.schema import QUANT_METHOD
        from ria_vllm.serve.model.config import RiaConfig

        if QUANT_METHOD not in QUANTIZATION_METHODS:
            register_quantization_config(QUANT_METHOD)(RiaConfig)
            watch_models()
    except (AttributeError, ImportError) as error:
        if "vllm" not in str(error):
            raise
        raise RiaError(f"vLLM {vllm.__version__}: {error}. {vllm_names.way_out()}") from error


def watch_models() -> None:
    """Make a `ServedModel` of every model that is built with our config, once it is complete and not loaded yet.

    vLLM has no hook for that. The last thing that `initialize_model` does with a model is to record its parameters.
    Models inside a model are built by the same function; only the outermost has the paths that the checkpoint knows.
    """
    import vllm
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.model_loader import utils

    from ria_vllm.serve import vllm_names
    from ria_vllm.serve.model.config import RiaConfig
    from ria_vllm.serve.reload import refuse_other_weights
    from ria_vllm.serve.served_model import ServedModel

    record = utils.record_metadata_for_reloading

    @functools.wraps(record)
    def record_metadata_for_reloading(model: torch.nn.Module) -> None:
        config, calls = get_current_vllm_config().quant_config, models_being_built()
        if isinstance(config, RiaConfig) and len(calls) == 1:
            vllm_names.check_names(vllm.__version__)
            if "vllm.v1.worker.gpu_worker" in sys.modules:  # else it is no worker that builds the model
                from vllm.v1.worker.gpu_worker import Worker

                refuse_other_weights(Worker)
            ServedModel(config, model, calls[0].get("model_config"))
        record(model)

    utils.record_metadata_for_reloading = record_metadata_for_reloading


def models_being_built() -> list[Mapping[str, Any]]:
    """The local variables of each call of vLLM's `initialize_model` on the stack, the innermost first.

    Models inside a model are built by the same function.
    """
    from vllm.model_executor.model_loader import utils

    code = inspect.unwrap(utils.initialize_model).__code__
    calls: list[Mapping[str, Any]] = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is code:
            calls.append(dict(frame.f_locals))
        frame = frame.f_back
    return calls
