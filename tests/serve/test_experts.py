"""Pruned experts in one of vLLM's mixture layers, with fixed routing, against a float64 product of their plain weights.

Without a kernel, vLLM's own experts compute. With one, the layer must hand it what the interface promises; the one here
decompresses what it gets.
"""

import functools

import mixture_layers
import pytest
import torch
from mixture_layers import EXPERTS, Model, StoredMixture, attached, play_rank, route, run, served
from mixture_paths import DecompressingKernel, close
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.ep_weight_filter import compute_local_expert_ids

from ria_vllm.format.formats import FORMATS, WRITTEN
from ria_vllm.serve.kernels import experts_registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel
from ria_vllm.serve.model.experts_matching import takers

pytestmark = pytest.mark.usefixtures("ranks")


@pytest.mark.parametrize("weight_format", WRITTEN)
@pytest.mark.parametrize("orders", ["none", "shared", "linear"])
def test_every_format_and_order(experts_path, orders, weight_format):
    """If each linear has its own order, no kernel serves it, and the dense weights need none."""
    stored = StoredMixture(orders, FORMATS[weight_format])
    model = served(stored)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))
    packed = model.experts.ria_experts
    assert (packed is not None) == (experts_path != "vllm" and orders != "linear")
    if packed is not None:
        assert (packed.input_permutation is not None) == (orders == "shared")
    names = {name for name, _ in model.experts.named_parameters()}
    assert not any("bitmask" in name or "compressed" in name for name in names)


def test_widened_weights(monkeypatch):
    monkeypatch.setattr(experts_registry, "KERNELS", (DecompressingKernel,))
    monkeypatch.setattr(DecompressingKernel, "formats", ("float",))
    stored = StoredMixture(weight_format=FORMATS["int8"])
    model = served(stored)
    assert "int8 widened" in str(model.experts.ria_experts.choice)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


def with_scales_of(dtype, rounded=False):
    """Experts whose scales of groups have more digits than bfloat16 has."""
    stored = StoredMixture("none", FORMATS["int8-g32"], rounded=rounded)
    for name in stored.plain:
        parts = {part: stored.tensors[f"{name}.{part}"] for part in ("compressed", "bitmask", "weight_scale")}
        parts["weight_scale"] = (parts["weight_scale"].float() * 1.0013).to(dtype)
        stored.tensors[f"{name}.weight_scale"] = parts["weight_scale"]
        stored.plain[name] = stored.weight_format.decode(parts, torch.float32).double()
    return stored


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scales_of_groups_keep_the_dtype_of_the_checkpoint(experts_path, dtype):
    stored = with_scales_of(dtype)
    x, weights, ids = route()
    close(run(served(stored), x, weights, ids), stored.expected(x, weights, ids))


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensor_parallel(experts_path, monkeypatch, size, folds):
    """Rows of gate and up are cut after they were put into the order of down's columns, with a fold and without."""
    stored = StoredMixture(bias=True, folds=folds)
    assert bool(stored.config().folding.folded) == folds
    x, weights, ids = route()
    total = 0
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        model = served(stored, tp_size=size, activation="swigluoai", has_bias=True)
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


@pytest.mark.parametrize("name, size", [("int8", 4), ("int4", 4), ("int4-g32", 4), ("int4-g64", 2), ("int8-g64", 2)])
def test_tensor_parallel_with_scales(experts_path, monkeypatch, name, size):
    """Each rank has the scales of its own columns of down, and of its own rows of gate and up."""
    stored = StoredMixture(weight_format=FORMATS[name], bias=True)
    x, weights, ids = route()
    total = 0
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        model = served(stored, tp_size=size, activation="swigluoai", has_bias=True)
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


@pytest.mark.parametrize("name", ["int4-g32", "int8"])
def test_expert_parallel_with_scales(experts_path, monkeypatch, name):
    stored = StoredMixture(weight_format=FORMATS[name])
    x, weights, ids = route()
    total = 0
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    for rank in range(2):
        play_rank(monkeypatch, rank, 2)
        with set_current_vllm_config(current):
            total = total + run(served(stored, tp_size=2), x, weights, ids)
    close(total, stored.expected(x, weights, ids))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["int4-g32", "int4", "int8", "int8-g128"])
def test_rounded_inputs(monkeypatch, name, kernel):
    """The config says so, and the kernel rounds; where none can, the layer is more exact."""
    stored = StoredMixture(weight_format=FORMATS[name], rounded=True)
    x, weights, ids = route()
    want = stored.expected(x, weights, ids)
    with monkeypatch.context() as patch:
        patch.setattr(experts_registry, "KERNELS", (DecompressingKernel,))
        model = served(stored)
        assert str(model.experts.ria_experts.choice).endswith("inputs not rounded to int8")
        close(run(model, x, weights, ids), want)
    if kernel == "reference":
        monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == f"{kernel} with inputs rounded to int8"
    off = (run(model, x, weights, ids).double() - want).norm() / want.norm()
    assert 1e-3 < off < 3e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rounded_inputs_with_scales_of_groups_in_the_dtype_of_the_checkpoint(dtype):
    """The kernel multiplies the integers themselves with such scales."""
    stored = with_scales_of(dtype, rounded=True)
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == "cpu with inputs rounded to int8"
    x, weights, ids = route()
    want = stored.expected(x, weights, ids)
    off = (run(model, x, weights, ids).double() - want).norm() / want.norm()
    assert 1e-3 < off < 3e-2


def test_ranks_with_few_channels(experts_path, monkeypatch):
    """Each holds 8, which no kernel takes without padding."""
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    for rank in range(16):
        play_rank(monkeypatch, rank, 16)
        total = total + run(served(stored, tp_size=16), x, weights, ids)
    close(total, stored.expected(x, weights, ids))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_parallel(experts_path, monkeypatch, size, placement):
    stored = StoredMixture(bias=True)
    x, weights, ids = route()
    total = 0
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    current.parallel_config.expert_placement_strategy = placement
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        with set_current_vllm_config(current):
            model = served(stored, tp_size=size, activation="swigluoai", has_bias=True)
        assert model.experts.local_num_experts == EXPERTS // size
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


class ReadNumbers(TorchDispatchMode):
    """Counts how often a single number of a tensor is read, for which a GPU would have to finish its work."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [0, 1])
def test_takers_of_expert_parallel(monkeypatch, rank):
    current = VllmConfig()
    current.parallel_config.enable_expert_parallel = True
    play_rank(monkeypatch, rank, 2)
    with set_current_vllm_config(current):
        config = StoredMixture().config()
        model = attached(config, Model(config, tp_size=2))
    with ReadNumbers() as read:
        found = takers(config, model)
    here = {int(name.split(".")[-2]) for name, taker in found.items() if taker is not None}
    assert here == compute_local_expert_ids(EXPERTS, 2, rank)
    assert read.count <= 1 and len(found) == 3 * EXPERTS


def test_router_weights_on_the_input(experts_path, monkeypatch):
    monkeypatch.setattr(mixture_layers, "TOP", 1)
    stored = StoredMixture()
    model = served(stored, apply_router_weight_on_input=True, top_k=1)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids, on_input=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations(experts_path, activation):
    if experts_path == "torch" and activation != "silu":
        pytest.skip("it knows no other")
    function = {
        "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    }[activation]  # fmt: skip
    stored = StoredMixture()
    model = served(stored, activation=activation)
    x, weights, ids = route()
    want = stored.expected(3 * x, weights, ids, lambda gate, up: function(gate) * up)
    torch.testing.assert_close(run(model, 3 * x, weights, ids).double(), want, rtol=0, atol=2e-4)  # results of about 10


def test_experts_that_vllm_does_not_have(monkeypatch):
    """Its experts for CPUs need 32 channels of gpt-oss's activation on each rank."""
    monkeypatch.setattr(experts_registry, "KERNELS", (ReferenceExpertsKernel,))
    stored = StoredMixture()
    x, weights, ids = route()
    total = 0
    for rank in range(8):
        play_rank(monkeypatch, rank, 8)
        model = served(stored, tp_size=8, activation="swigluoai")
        assert model.experts.ria_experts.choice.kernel is ReferenceExpertsKernel
        total = total + run(model, x, weights, ids)
    close(total, stored.expected(x, weights, ids, mixture_layers.swigluoai))


def test_a_forced_kernel_of_linears(monkeypatch):
    """It says nothing about experts."""
    monkeypatch.setenv("RIA_VLLM_BACKEND", "cutlass")
    stored = StoredMixture()
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == "cpu"
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


def test_a_limit_of_the_gate(experts_path):
    """vLLM's experts for CPUs do not clamp, and so serve none that have a limit."""
    stored = StoredMixture()
    model = served(stored, swiglu_limit=0.7)
    assert model.experts.ria_experts is not None
    x, weights, ids = route()

    def act(gate, up):
        return mixture_layers.silu(gate.clamp(max=0.7), up.clamp(-0.7, 0.7))

    torch.testing.assert_close(
        run(model, x, weights, ids).double(), stored.expected(x, weights, ids, act), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("prefix", ["layers.1.mlp.experts", "wrong", ""])
def test_the_layer_is_found_by_its_path(experts_path, prefix):
    stored = StoredMixture()
    config = stored.config()
    model = attached(config, Model(config, prefix=prefix))
    model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    assert config.report.expected == config.report.loaded == 1
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids))


def test_experts_of_another_pipeline_stage():
    from vllm.model_executor.models.utils import PPMissingLayer

    stored = StoredMixture()
    config = stored.config()
    model = Model(config)
    model.layers[1] = PPMissingLayer()
    attached(config, model)
    assert not model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())


def test_a_draft_leaves_the_experts_of_its_target_alone():
    """A multi-token prediction model is built with the target's config and reads the same files."""

    class Draft(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(4)

        def load_weights(self, weights):
            return [name for name, _ in weights]

    stored = StoredMixture()
    config = stored.config()
    model = attached(config, Model(config))
    draft = attached(config, Draft())
    rest = {"model.norm.weight": torch.zeros(4)}
    assert draft.load_weights(iter((stored.tensors | rest).items())) == list(rest)
    assert not model.experts.quant_method.loader.loaded
