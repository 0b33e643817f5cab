"""Weights that arrive again, or at the wrong time, at an MoE layer with pruned experts."""

from types import SimpleNamespace

import pytest
import torch
from moe_layers import Model, StoredMoE, attached, play_rank, route, run
from moe_paths import close
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

pytestmark = pytest.mark.usefixtures("ranks")


def test_a_reload_of_one_rank_of_expert_parallel(experts_path, monkeypatch):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    stored = StoredMoE()
    x, weights, ids = route()
    total = 0
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            config = stored.config()
            model = attached(config, Model(config, tp_size=2))
            record_metadata_for_reloading(model)
            zeros = {n: t.clone() if n.endswith("bitmask") else torch.zeros_like(t) for n, t in stored.tensors.items()}
            model.load_weights(iter(zeros.items()))
            model.experts.quant_method.process_weights_after_loading(model.experts)
            assert not run(model, x, weights, ids).any()
            model.ria_reloads.begin(initialize_layerwise_reload)
            model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
            finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids))
