"""The names of vLLM that the plugin uses although they are no interface for plugins, and why; and which versions have
been tested.

What vLLM's own quantization methods are written against counts as an interface: see `INTERFACE`. `make test-versions`
looks every name up in other versions.
"""

import sys
from functools import reduce
from importlib.util import find_spec
from inspect import isclass, isfunction
from itertools import chain
from typing import Any

from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger

from ria_vllm.errors import RiaError

OLDEST, NEWEST = (0, 30), (0, 32)

INTERFACE = (
    "vllm.config",
    "vllm.distributed",
    "vllm.envs",
    "vllm.logger",
    "vllm.model_executor.layers.fused_moe.activation",
    "vllm.model_executor.layers.fused_moe.fused_moe_method_base",
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.quantization",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.parameter",
    "vllm.platforms",
)
"""Modules."""

_LAYERS = "vllm.model_executor.layers"
_LOADER = "vllm.model_executor.model_loader"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"

NAMES = {
    "vllm._custom_ops:bmm_cpu": "what latent attention has packed for AMX is proved with the kernel that multiplies it",
    "vllm.model_executor.kernels.linear:init_int8_linear_kernel": "the kernel of dense linears in int8",
    f"{_LAYERS}.attention.mla_attention:MLAAttention._v_up_proj": "what latent attention absorbs is proved with it",
    f"{_LAYERS}.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod": "serves experts that stay dense",
    f"{_LOADER}.utils:initialize_model": "whether a model is built inside another one",
    f"{_LOADER}.utils:record_metadata_for_reloading": "the only moment at which a model is complete and not loaded yet",
    "vllm.model_executor.models.utils:WeightsMapper._map_name_with_shard": "which layer loads a tensor, as which part",
    "vllm.v1.attention.backends.mla.amx_mla:AMXMLAImpl._w_uk_packed": "as `bmm_cpu`",
    f"{_WORKER}.reload_weights": "refused: a running server takes no other weights",
    f"{_WORKER}.sleep": "refused at level 2, which drops all weights",
    f"{_WORKER}.start_draft_weight_update": "refused: a running server takes no other weights",
    f"{_WORKER}.start_weight_update": "refused: a running server takes no other weights",
}
"""Module, a colon, and a name in it -> what it is used for."""

OF_BENCH = {"vllm.utils.ompmultiprocessing:OMPProcessManager": "llama.cpp gets as many threads as vLLM takes"}
"""The same of what no server needs."""


def check_names(version: str) -> None:
    """Look all of `NAMES` up; of modules that nobody has imported, which may be costly, only the modules.

    Raises:
        RiaError: this version lacks one.
    """
    for name, use in NAMES.items():
        module, _, path = name.partition(":")
        if not (_has(sys.modules[module], path) if module in sys.modules else _is_there(module)):
            raise RiaError(f"vLLM {version} has no {name} ({use}). {way_out()}")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not
        return False


def _has(module: Any, path: str) -> bool:
    """Attributes of instances count, too: a method of their class names them."""
    *owners, name = path.split(".")
    try:
        owner = reduce(getattr, owners, module)
    except AttributeError:
        return False
    classes = owner.__mro__ if isclass(owner) else ()
    methods = filter(isfunction, chain.from_iterable(vars(one).values() for one in classes))
    return hasattr(owner, name) or any(name in method.__code__.co_names for method in methods)


def check_version(version: str) -> None:
    """Say in the log if this version of vLLM was not tested. What is built from sources may say anything."""
    try:
        release = Version(version)
    except InvalidVersion:
        return
    if not release.is_devrelease and not OLDEST <= release.release[:2] <= NEWEST:
        init_logger("vllm.ria").warning(
            "vLLM %s was not tested with ria-vllm; %s to %s were.", version, _spoken(OLDEST), _spoken(NEWEST)
        )


def way_out() -> str:
    return f"Install vLLM {_spoken(OLDEST)} to {_spoken(NEWEST)}, or a newer ria-vllm."


def _spoken(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
