"""vLLM's models of types that it does not run on CPUs, built and loaded without an engine.

What vLLM checks while it builds them is stubbed here. The rest is vLLM's own code.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

EXPERTS, TOKENS = 8, 12


def routed(hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a layer of experts is given: x [T, hidden], and of each token's two experts the weights and numbers."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:2] for _ in range(TOKENS)]).int()
    return torch.randn(TOKENS, hidden, generator=draw), torch.rand(TOKENS, 2, generator=draw) + 0.2, ids


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Lets vLLM build experts without a gate, sparse attention as if it were dense, and Kimi without its kernels."""
    from vllm.model_executor.layers.fused_moe import config as moe_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    class Platform:
        def __getattr__(self, name: str) -> Any:
            return getattr(current_platform, name)

        def is_cuda_alike(self) -> bool:
            return True

    choose = current_platform.get_attn_backend_cls

    def get_attn_backend_cls(selected_backend: Any, attn_selector_config: Any, num_heads: int | None) -> str:
        dense = attn_selector_config._replace(use_sparse=False)
        if dense.use_mla:  # the attention for AMX takes no arguments of sparse attention
            selected_backend = AttentionBackendEnum.CPU_MLA
        return choose(selected_backend, attn_selector_config=dense, num_heads=num_heads)

    with (
        mock.patch.dict(os.environ, VLLM_KIMI_K3_GEMM_AR="0"),
        mock.patch.object(moe_config, "current_platform", Platform()),
        mock.patch.object(type(current_platform), "get_attn_backend_cls", staticmethod(get_attn_backend_cls)),
    ):
        yield


def load(folder: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Build the model of a compressed folder, and load it.

    Returns:
        "linears": path of vLLM's layer -> the checkpoint's linears that it serves. "experts": name of the experts of a
        layer -> what that layer gives for `routed`. "taken": linears of experts whose tensors a layer takes.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.network_utils import get_distributed_init_method, get_ip, get_open_port
    from vllm.utils.torch_utils import set_default_torch_dtype

    from ria_vllm.serve.experts.method import Sparse24MoEMethod
    from ria_vllm.serve.linear.method import Sparse24LinearMethod
    from ria_vllm.serve.model.experts_matching import takers

    settings = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 128}
    config = EngineArgs(folder, enable_prefix_caching=False, **(settings | engine)).create_engine_config()
    with as_on_gpus(), set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        init_distributed_environment(1, 0, get_distributed_init_method(get_ip(), get_open_port()), 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        model = initialize_model(config)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        linears, experts = {}, {}
        for path, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, Sparse24LinearMethod):
                linears[path] = method.names
            elif isinstance(method, Sparse24MoEMethod):
                method.process_weights_after_loading(layer)
                x, weights, ids = routed(layer.moe_config.hidden_dim)
                x = x.to(config.model_config.dtype)
                experts[method.experts.name] = method.apply(layer, x, weights, ids, None, None).float().tolist()
    taken = [linear for linear, taker in takers(config.quant_config, model).items() if taker is not None]
    return {"linears": linears, "experts": experts, "taken": taken}
