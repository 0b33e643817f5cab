"""Checkpoints of compressed-tensors with scales for an fp8 cache, against vLLM's own serving of the same model, dense.

Rounding keys and values to eight bits moves logprobs by about 0.1 here, so lost scales would show.
"""

from types import SimpleNamespace

import compressed_tensors_checkpoints
import pytest
import torch
from compare import generate, prompts
from vllm.config import LoadConfig, get_current_vllm_config
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema, SparsityConfig
from ria_vllm.serve.load.layerwise import left_out
from ria_vllm.serve.model.config import RiaConfig
from ria_vllm.serve.model.kv_cache import KVCacheScales

served = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM has no fp8 cache on this CPU and says so"
)
SCALES = {"k_scale": 16.0, "v_scale": 64.0}  # coarse enough to make most values subnormal


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv-cache")
    model = compressed_tensors_checkpoints.write(folder / "pruned", "sparse-24-bitmask")
    compressed_tensors_checkpoints.write(folder / "other", "sparse-24-bitmask")
    compressed_tensors_checkpoints.write_dense(folder / "dense", model)
    compressed_tensors_checkpoints.add_kv_scales(folder / "pruned", **SCALES)
    compressed_tensors_checkpoints.add_kv_scales(folder / "dense", **SCALES)
    compressed_tensors_checkpoints.add_kv_scales(folder / "other", k_scale=1.0, v_scale=1.0)
    jobs = {
        "dense": {},
        "pruned": {},
        "reloaded": {"model": "pruned", "first": "reload"},
        "other": {},
    }
    todo = [
        {"prompts": prompts(), "tokens": 6}
        | job
        | {"model": str(folder / job.get("model", name)), "engine": {"dtype": "float32"}}
        for name, job in jobs.items()
    ]
    return dict(zip(jobs, generate(folder / "run", todo), strict=True))


def prompt_logprobs(results):
    assert "error" not in results, results
    return torch.tensor([logprob for result in results for logprob in result["prompt"]])


@served
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruned", "reloaded"])
def test_scales_are_used(runs, name):
    want = prompt_logprobs(runs["dense"])
    assert (prompt_logprobs(runs[name]) - want).abs().max() < 1e-3
    assert (prompt_logprobs(runs["other"]) - want).abs().mean() > 0.05


class Scales(torch.nn.Module, AttentionLayerBase):
    """A layer of attention, which vLLM's reloads take for one, as far as its scales go."""

    def __init__(self):
        super().__init__()
        self.layer_name = "model.layers.3.attn"
        set_default_quant_scales(self, register_buffer=True)
        self.quant_method = KVCacheScales(RiaConfig(RiaSchema(sparsity_config=SparsityConfig())))
        self.quant_method.create_weights(self)

    def process_weights_after_loading(self, dtype):
        pass

    def get_attn_backend(self):
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config):
        raise NotImplementedError

    def load(self, **scales):
        for part, value in scales.items():
            param = getattr(self, part)
            getattr(param, "weight_loader", default_weight_loader)(param, torch.tensor([value]))

    def used(self):
        buffers, numbers = (self._k_scale, self._v_scale), (self._k_scale_float, self._v_scale_float)
        assert [float(scale) for scale in buffers] == list(numbers)
        return numbers


@pytest.fixture(params=["auto", "dummy"])
def started(request, engine):
    """A layer of a server that was started so, in a model of which it is the layer "attn"; see `reload`."""
    get_current_vllm_config().load_config.load_format = request.param
    model = torch.nn.ModuleDict({"attn": Scales()})
    layer = model["attn"]
    record_metadata_for_reloading(model)
    if request.param == "dummy":
        DummyModelLoader(LoadConfig(load_format="dummy")).load_weights(model, None)
    else:
        layer.load(k_scale=0.25, v_scale=0.125)
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.quant_config.model_built = True
    assert layer.used() == ((1.0, 1.0) if request.param == "dummy" else (0.25, 0.125))
    return layer, model


def reload(layer, model, **scales):
    """What vLLM does with scales that somebody sends. Returns the layers that got nothing."""
    initialize_layerwise_reload(model)
    layer.load(**scales)
    left = left_out(model)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float32))
    return left


def test_scales_that_a_trainer_sends(started):
    layer, model = started
    buffer = layer._k_scale
    for sent in ((0.5, 2.0), (4.0, 0.25)):
        assert reload(layer, model, k_scale=sent[0], v_scale=sent[1]) == []
        assert layer.used() == sent
    assert reload(layer, model) == ["attn"]
    assert layer.used() == sent
    assert layer._k_scale is buffer  # of which a CUDA graph knows the address


@pytest.mark.parametrize("sent", [{"k_scale": 0.5}, {"v_scale": 0.5}])
def test_half_a_pair(sent, started):
    absent = "v_scale" if "k_scale" in sent else "k_scale"
    with pytest.raises(RiaError, match=rf"model\.layers\.3\.attn\.{absent} did not come with .* send them together"):
        reload(*started, **sent)


def a_layer(config, **parts):
    """An attention layer's scales on any CPU, before and after `parts` were loaded."""
    layer = torch.nn.Module()
    layer.layer_name, layer.kv_cache_dtype, layer.calculate_kv_scales = "model.layers.3.attn", "fp8", False
    layer.q_range = layer.k_range = layer.v_range = torch.tensor(1.0)
    method = KVCacheScales(config)
    method.create_weights(layer)
    for part, value in parts.items():
        getattr(layer, part).data.fill_(value)
    return method, layer


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"k_scale": 0.5}, r"model\.layers\.3\.attn\.v_scale is in none of the weight files.*kv_cache_scheme"),
        ({"k_scale": 0.5, "v_scale": float("inf")}, r"model\.layers\.3\.attn\.v_scale is inf, but"),
    ],
)
def test_scales_that_no_cache_can_have_are_refused(scales, message):
    method, layer = a_layer(RiaConfig(RiaSchema(sparsity_config=SparsityConfig())), **scales)
    with pytest.raises(RiaError, match=message):
        method.process_weights_after_loading(layer)
