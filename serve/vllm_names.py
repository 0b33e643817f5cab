"""The names of vLLM that the plugin uses although they are no interface for plugins, and why; and which versions have
been tested.

What vLLM's own quantization methods are written against counts as an interface: see `INTERFACE`. `make test-versions`
looks every name up in other versions.
"""

from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger

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
    "vllm.model_executor.layers.quantization.base_config",
    "vllm.model_executor.layers.vocab_parallel_embedding",
    "vllm.model_executor.parameter",
    "vllm.platforms",
)
"""Modules."""

_RELOAD = "vllm.model_executor.model_loader.reload"

NAMES = {
    "vllm._custom_ops": "what latent attention has packed for AMX is proved with the kernel that multiplies it",
    "vllm.model_executor.kernels.linear.init_int8_linear_kernel": "the kernel of dense linears in int8",
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method": "serves the experts that stay dense",
    "vllm.model_executor.layers.quantization": "where a quantization method is registered",
    "vllm.model_executor.model_loader": "its folder: which weights come from files",
    f"{_RELOAD}.layerwise": "reloads are watched: the model has all of its new weights afterwards, or its old ones",
    f"{_RELOAD}.meta": "what arrives for a layer is counted, as vLLM counts it",
    "vllm.model_executor.model_loader.utils": "the only moment at which a model is complete and not loaded yet",
    "vllm.utils.ompmultiprocessing.OMPProcessManager": "`bench` gives llama.cpp as many threads as vLLM takes",
    "vllm.v1.worker.gpu_worker.Worker": "sleep level 2 drops all weights; after refused files it names the former ones",
    "vllm.v1.worker.worker_base.WorkerBase": "`verify --served` asks each worker for its proofs",
}
"""Module, or name in one -> what it is used for. All names below one in this table are covered."""


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
