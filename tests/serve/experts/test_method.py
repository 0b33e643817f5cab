"""Pruned experts in one of vLLM's MoE layers, with fixed routing, against a float64 product of their plain weights.

Without a kernel, vLLM's own experts compute.
"""

import functools

import moe_layers
import pytest
import torch
from moe_layers import EXPERTS, Model, StoredMoE, attached, play_rank, route, run, served
from moe_paths import close
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.models.utils import PPMissingLayer

from ria_vllm.format.formats import FORMATS, FP8
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel
from ria_vllm.serve.load.load_report import LoadReport

pytestmark = pytest.mark.usefixtures("ranks")
# The activation of experts with biases.
OAI = {"activation": "swigluoai", "has_bias": True}


def check(stored, model, act=moe_layers.silu):
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids, act))


def over_ranks(monkeypatch, stored, size, placement=None, **settings):
    """The sum over all ranks of tensor parallelism, or of expert parallelism with a placement."""
    x, weights, ids = route()
    current, total = VllmConfig(), 0
    current.parallel_config.enable_expert_parallel = placement is not None
    current.parallel_config.expert_placement_strategy = placement or "linear"
    for rank in range(size):
        play_rank(monkeypatch, rank, size)
        with set_current_vllm_config(current):
            model = served(stored, tp_size=size, **settings)
        assert model.experts.local_num_experts == (EXPERTS // size if placement else EXPERTS)
        total = total + run(model, x, weights, ids)
    return total


@pytest.mark.parametrize(
    ("permuted", "weight_format", "pattern"),
    [
        (False, "float", "2:4"), (True, "float", "2:4"), (True, "int4-g32", "2:4"), (True, "int8-g128", "2:4"),
        (True, "float", "8:16"), (False, "int8", "8:16"),
    ],
)  # fmt: skip
def test_every_format_and_order(experts_path, permuted, weight_format, pattern):
    stored = StoredMoE(permuted, FORMATS[weight_format], pattern=pattern)
    model = served(stored)
    check(stored, model)
    packed = model.experts.ria_experts
    assert (packed is not None) == (experts_path != "vllm")
    if packed is not None:
        assert (packed.input_permutation is not None) == permuted
    names = {name for name, _ in model.experts.named_parameters()}
    assert not any("bitmask" in name or "compressed" in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scales_of_groups_keep_the_dtype_of_the_checkpoint(experts_path, dtype):
    """They have more digits than bfloat16 has."""
    stored = StoredMoE(False, FORMATS["int8-g32"])
    for name in stored.plain:
        parts = {part: stored.tensors[f"{name}.{part}"] for part in ("compressed", "bitmask", "weight_scale")}
        parts["weight_scale"] = (parts["weight_scale"].float() * 1.0013).to(dtype)
        stored.tensors[f"{name}.weight_scale"] = parts["weight_scale"]
        stored.plain[name] = stored.weight_format.decode(parts, torch.float32).double()
    check(stored, served(stored))


@pytest.mark.parametrize(
    ("size", "placement", "weight_format", "folds"),
    [
        (2, None, "float", True), (4, None, "float", False), (4, None, "int8", True), (4, None, "int4-g32", True),
        (2, "linear", "int8", True), (4, "round_robin", "int4-g32", True),
    ],
)  # fmt: skip
def test_ranks(experts_path, monkeypatch, size, placement, weight_format, folds):
    """Rows of gate and up are cut after they were permuted as down's columns are, with a fold and without. Each
    rank has the scales of its own rows and columns."""
    stored = StoredMoE(weight_format=FORMATS[weight_format], bias=True, folds=folds)
    assert bool(stored.config().folding.folded) == folds
    x, weights, ids = route()
    want = stored.expected(x, weights, ids, moe_layers.swigluoai)
    close(over_ranks(monkeypatch, stored, size, placement, **OAI), want)


def test_ranks_with_few_channels(experts_path, monkeypatch):
    """Each holds 8, which no kernel takes without padding."""
    stored = StoredMoE()
    close(over_ranks(monkeypatch, stored, 16), stored.expected(*route()))


def test_experts_that_vllm_does_not_have(monkeypatch):
    """Its experts for CPUs need 32 channels of gpt-oss's activation on each rank."""
    monkeypatch.setattr(registry, "EXPERTS_KERNELS", (ReferenceExpertsKernel,))
    stored = StoredMoE()
    total = over_ranks(monkeypatch, stored, 8, activation="swigluoai")
    close(total, stored.expected(*route(), moe_layers.swigluoai))


@pytest.mark.parametrize(("kernel", "name"), [("cpu", "int4-g32"), ("reference", "int8"), ("cpu", "int4-g128")])
def test_rounded_inputs(monkeypatch, name, kernel):
    """The config says so, and the kernel rounds."""
    stored = StoredMoE(weight_format=FORMATS[name], rounded=True)
    x, weights, ids = route()
    want = stored.expected(x, weights, ids)
    if kernel == "reference":
        monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == f"{kernel} with inputs rounded to int8"
    off = (run(model, x, weights, ids).double() - want).norm() / want.norm()
    assert 1e-3 < off < 3e-2


def test_fp8_weights_whose_inputs_are_not_rounded_are_widened_for_a_kernel(monkeypatch):
    monkeypatch.setenv("RIA_VLLM_BACKEND", "reference")
    stored = StoredMoE(weight_format=FP8)
    model = served(stored)
    assert str(model.experts.ria_experts.choice) == "reference"
    check(stored, model)


def test_a_kernel_for_other_weights_and_unrounded_inputs(monkeypatch):
    """The layer widens its weights, and is more exact."""

    class Floats(ReferenceExpertsKernel):
        name, is_fallback = "floats", False

        @staticmethod
        def can_implement(config):
            return None if config.weight_format.name == "float" and config.input_dtype is None else "floats only"

    monkeypatch.setattr(registry, "EXPERTS_KERNELS", (Floats,))
    stored = StoredMoE(weight_format=FORMATS["int8"], rounded=True)
    model = served(stored)
    choice = str(model.experts.ria_experts.choice)
    assert "int8 widened" in choice and choice.endswith("inputs not rounded to int8")
    check(stored, model)


def test_router_weights_on_the_input(experts_path, monkeypatch):
    monkeypatch.setattr(moe_layers, "TOP", 1)
    stored = StoredMoE()
    model = served(stored, apply_router_weight_on_input=True, top_k=1)
    x, weights, ids = route()
    close(run(model, x, weights, ids), stored.expected(x, weights, ids, on_input=True))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations(experts_path, approximate):
    function = functools.partial(torch.nn.functional.gelu, approximate=approximate)
    stored = StoredMoE()
    model = served(stored, activation="gelu" if approximate == "none" else "gelu_pytorch_tanh")
    x, weights, ids = route()
    want = stored.expected(3 * x, weights, ids, lambda gate, up: function(gate) * up)
    torch.testing.assert_close(run(model, 3 * x, weights, ids).double(), want, rtol=0, atol=2e-4)  # results of about 10


def test_a_limit_of_the_gate(experts_path):
    """vLLM's experts for CPUs do not clamp, and so serve none that have a limit."""
    stored = StoredMoE()
    model = served(stored, swiglu_limit=0.7)
    assert model.experts.ria_experts is not None
    x, weights, ids = route()
    want = stored.expected(x, weights, ids, lambda gate, up: moe_layers.silu(gate.clamp(max=0.7), up.clamp(-0.7, 0.7)))
    torch.testing.assert_close(run(model, x, weights, ids).double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prefix", ["wrong", ""])
def test_the_layer_is_found_by_its_path(prefix):
    stored = StoredMoE()
    config = stored.config()
    model = attached(config, Model(config, prefix=prefix))
    model.load_weights((name, tensor.clone()) for name, tensor in stored.tensors.items())
    model.experts.quant_method.process_weights_after_loading(model.experts)
    assert LoadReport.of(model).kernels.total() == 1
    check(stored, model)


def test_experts_of_another_pipeline_stage():
    stored = StoredMoE()
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

    stored = StoredMoE()
    config = stored.config()
    model = attached(config, Model(config))
    draft = attached(config, Draft())
    rest = {"model.norm.weight": torch.zeros(4)}
    assert draft.load_weights(iter((stored.tensors | rest).items())) == list(rest)
    assert not model.experts.quant_method.loader.loaded
