"""A layer's experts by our CUDA kernel for linears: a stand-in for its library, and its tiles in the emulator."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cuda_libraries import emulated
from graph_capture import GraphCapture
from random_experts import ACTIVATIONS, random_experts, random_routing

from ria_vllm.format.formats import FLOAT, FP8, INT4, INT8
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.cuda import experts as cuda_experts
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.cuda.experts import CutlassExpertsKernel
from ria_vllm.serve.kernels.cuda.tiles import WORKSPACE_BYTES
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

EXPERTS = 7
# More tokens than are computed with copies of weights, few, and none.
TOKENS = {9: 2, 1: 2, 0: 2}
WAYS = {"eager": False, "captured": True}
GPU_FORMATS = pytest.mark.parametrize("format", [FLOAT, INT8, FP8], ids=lambda format: format.name)


def rounding(config):
    """As a checkpoint in W8A8 says."""
    return replace(config, input_dtype=torch.int8 if config.weight_format == INT8 else None)


@pytest.fixture(params=WAYS)
def experts(request, monkeypatch):
    """The operator as it runs eagerly, or while a CUDA graph captures."""
    body = partial(cuda_experts._experts, fixed_shapes=WAYS[request.param])
    monkeypatch.setattr(torch.ops.ria, "sparse24_experts", SimpleNamespace(cutlass=body))


def check(layer, tokens, top_k, permuted=True, mapped=True):
    config = rounding(layer.config)
    packed = CutlassExpertsKernel.pack(config, layer.gate_up, layer.down, *(layer.biases or (None, None)))
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, config.hidden_size, generator=generator).to(config.act_dtype)
    weights, ids = random_routing(tokens, top_k, EXPERTS * (2 if mapped else 1), seed=tokens)
    p = torch.randperm(config.hidden_size, generator=generator).int() if permuted else None
    expert_map, local = None, ids
    if mapped:  # half of the experts are another rank's
        expert_map = torch.full((2 * EXPERTS,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(EXPERTS, dtype=torch.int32).flip(0)
        local = torch.where(ids < 0, ids, expert_map[ids.clamp(min=0).long()])
    y = CutlassExpertsKernel.apply(config, x, weights, ids, packed, p, expert_map)
    assert y.shape == x.shape and y.dtype == x.dtype
    exact, error = layer.exact(x, weights, local, p, products_rounded=True)
    if config.weight_format == FLOAT:
        assert bool(((y.double() - exact).abs() <= error).all())
    else:  # inputs are rounded, to 8 bits or to 4
        assert float((y.double() - exact).norm()) <= (0.02 if config.weight_format == INT8 else 0.08) * exact.norm()
    assert bool((y[(local < 0).all(1)] == 0).all())


@GPU_FORMATS
@pytest.mark.parametrize("biased", [False, True])
def test_experts_against_float64(cutlass_on_cpu, hopper, experts, format, biased):
    """With a stand-in for the library; sizes that need padding, tokens without experts, experts of other ranks."""
    hopper.family = 80 if format == INT8 else 90
    hopper.tile_names = ["128x32", "int8_128x32"] if format == INT8 else hopper.tile_names
    for activation in ACTIVATIONS if format == FLOAT else ACTIVATIONS[:1]:
        for tokens, top_k in TOKENS.items():
            for sizes in ((72, 40), (192, 64)):
                check(random_experts(EXPERTS, *sizes, activation, format=format, biased=biased), tokens, top_k)
    check(random_experts(EXPERTS, 64, 32, dtype=torch.float16, format=format), 5, 1, permuted=False, mapped=False)


@pytest.mark.slow
@GPU_FORMATS
def test_experts_in_the_emulator(cutlass_on_cpu, experts, format):
    """Each expert's part of the stacked weights and metadata at its own address, by tiles that the rules choose."""
    library = emulated("90a" if format == FP8 else "80")
    library.seed = 3
    cutlass_on_cpu(library, library.num_sms, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8))
    for tokens in (9, 1):
        check(random_experts(EXPERTS, 72, 40, format=format, biased=True), tokens, 2)


@GPU_FORMATS
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_graph_can_capture_experts(hopper, format, tokens):
    """On tensors without values, see test_capture.py. With biases, a permutation and experts of other ranks."""
    layer = random_experts(EXPERTS, 128, 64, format=format, biased=True)
    config, on_gpu = rounding(layer.config), partial(torch.empty, device="meta")
    packed = [t.to("meta") for t in CutlassExpertsKernel.pack(config, layer.gate_up, layer.down, *layer.biases)]
    x, weights, ids = on_gpu(tokens, 128, dtype=torch.bfloat16), on_gpu(tokens, 2), on_gpu(tokens, 2, dtype=torch.int32)
    p, numbers = on_gpu(128, dtype=torch.int32), on_gpu(2 * EXPERTS, dtype=torch.int32)
    body = partial(cuda_experts._experts, fixed_shapes=True)
    with GraphCapture("meta", {torch.ops.ria.sparse24_experts.cutlass: body}) as capture:
        y = CutlassExpertsKernel.apply(config, x, weights, ids, packed, p, numbers)
    assert y.shape == (tokens, 128) and y.dtype == torch.bfloat16
    assert not capture.kept(y)


def test_which_experts_it_takes(hopper_layers, monkeypatch):
    """vLLM's own experts go first, see `experts.choice`. It is asked as the kernel that multiplies."""
    monkeypatch.delenv(registry.KERNEL_VARIABLE, raising=False)
    registry.self_test.cache_clear()
    config = random_experts(EXPERTS, 128, 64).config
    assert str(registry.choose(config)) == "cutlass" and registry.choose(config).kernel.is_fallback
    assert str(registry.choose(replace(config, weight_format=FP8))) == "cutlass"
    assert registry.choose(replace(config, pattern=PATTERNS["8:16"])).kernel is ReferenceExpertsKernel
    assert dict(registry.explain(replace(config, hidden_size=100)))["cutlass"].startswith("out-features 100 are not")
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "cutlass")
    assert str(registry.choose(replace(config, weight_format=INT4))) == "cutlass with int4 widened to bfloat16"
    monkeypatch.setattr(CutlassKernel, "apply", staticmethod(lambda config, x, *_: x))
    registry.self_test.cache_clear()
    assert "a small product comes out wrong" in dict(registry.explain(config))["cutlass"]
    assert registry.choose(config).kernel is ReferenceExpertsKernel
    registry.self_test.cache_clear()
