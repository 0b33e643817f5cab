"""Weights that arrive again, or at the wrong time, at an MoE layer with pruned experts."""

from types import SimpleNamespace

import mixture_layers
import pytest
import torch
from mixture_layers import LAYER, Model, StoredMixture, attached, play_rank, route, run
from mixture_paths import close
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from ria_vllm.errors import RiaError

pytestmark = pytest.mark.usefixtures("ranks")


def test_a_reload(experts_path):
    first, second = StoredMixture(bias=True), StoredMixture(bias=True)
    for name, tensor in second.tensors.items():
        if name.endswith("compressed"):
            tensor.mul_(-1.5)
    second.plain = {name: -1.5 * plain for name, plain in second.plain.items()}
    config = first.config()
    model = attached(config, Model(config, activation="swigluoai", has_bias=True))
    record_metadata_for_reloading(model)
    model.load_weights((name, tensor.clone()) for name, tensor in first.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    x, weights, ids = route()
    act = mixture_layers.swigluoai
    for stored in (second, first):
        model.ria_reloads.begin(initialize_layerwise_reload)
        model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
        close(run(model, x, weights, ids), stored.expected(x, weights, ids, act))
    missing = f"{LAYER}.2.up_proj.bitmask"
    model.ria_reloads.begin(initialize_layerwise_reload)
    model.load_weights((name, tensor.clone()) for name, tensor in first.tensors.items() if name != missing)
    with pytest.raises(RiaError, match=f"{missing} did not come with the other experts' tensors"):
        finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))


def test_a_reload_of_one_rank_of_expert_parallel(experts_path, monkeypatch):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    stored = StoredMixture()
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
