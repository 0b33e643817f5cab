"""Which kernel serves a layer's experts."""

from dataclasses import replace

import pytest
import torch
from random_experts import ACTIVATIONS, random_experts

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FP8, INT8, INTEGERS
from ria_vllm.format.pattern import PATTERNS
from ria_vllm.serve.kernels import choice, experts_registry
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

CONFIG = random_experts(2, 64, 32).config


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(choice.KERNEL_VARIABLE, raising=False)
    experts_registry.self_test.cache_clear()
    yield
    experts_registry.self_test.cache_clear()


def test_the_first_kernel_that_can_serve_the_layer():
    assert experts_registry.choose(CONFIG).kernel is CpuExpertsKernel
    assert str(experts_registry.choose(CONFIG)) == "cpu"
    with pytest.raises(RiaError, match=r"no kernel can serve a layer of 2 experts \(64 x 32\) with float weights and"):
        experts_registry.choose(replace(CONFIG, act_dtype=torch.float64))


def test_weights_are_widened_only_where_no_kernel_keeps_them():
    assert str(experts_registry.choose(replace(CONFIG, weight_format=INT8))) == "cpu"
    assert str(experts_registry.choose(replace(CONFIG, weight_format=FP8))) == "cpu with fp8 widened to bfloat16"


def test_inputs_are_rounded_where_a_kernel_does_it():
    for format in INTEGERS.values():
        config = replace(CONFIG, weight_format=format, input_dtype=torch.int8)
        how = "not rounded" if format.num_bits == 8 and format.group_size else "rounded"
        assert str(experts_registry.choose(config)) == f"cpu with inputs {how} to int8"
    float8 = replace(CONFIG, weight_format=INT8, input_dtype=torch.float8_e4m3fn)
    assert str(experts_registry.choose(float8)) == "cpu with inputs not rounded to float8_e4m3fn"


def test_a_forced_kernel(monkeypatch):
    monkeypatch.setenv(choice.KERNEL_VARIABLE, "reference")
    assert experts_registry.choose(CONFIG).kernel is ReferenceExpertsKernel
    monkeypatch.setenv(choice.KERNEL_VARIABLE, "cpu")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cpu cannot serve a layer of 2 experts .*: dtype float64"):
        experts_registry.choose(replace(CONFIG, act_dtype=torch.float64))
    monkeypatch.setenv(choice.KERNEL_VARIABLE, "cpuu")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cpuu is not a kernel for .* choose from cpu, reference"):
        experts_registry.choose(CONFIG)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kernel", experts_registry.KERNELS, ids=lambda kernel: kernel.name)
def test_each_kernel_passes_the_self_test(kernel, activation):
    for dtype, format, inputs in (
        (torch.bfloat16, INT8, None),
        (torch.float16, CONFIG.weight_format, None),
        (torch.float16, INT8, torch.int8),
        (torch.bfloat16, INTEGERS[4, 128], torch.int8),
    ):
        assert experts_registry.self_test(kernel, CONFIG.device, dtype, format, activation, inputs) is None
    for pattern in PATTERNS.values():
        config = replace(CONFIG, weight_format=INT8, input_dtype=torch.int8, pattern=pattern, activation=activation)
        if choice.reason_against_pattern(kernel, config) is None:
            assert experts_registry.reason_against(kernel, config) is None


def wrong_experts(config, gate_up, down, *biases):
    return CpuExpertsKernel.pack(config, gate_up, {name: part.roll(1, 0) for name, part in down.items()}, *biases)


def broken(*_):
    raise RuntimeError("illegal instruction\nsomewhere")


@pytest.mark.parametrize(
    "pack, reason",
    [
        (wrong_experts, "a few small experts come out wrong on this device"),
        (broken, "a few small experts fail on this device: illegal instruction"),
    ],
)
def test_a_kernel_that_is_wrong_is_passed_over(monkeypatch, pack, reason):
    class Wrong(CpuExpertsKernel):
        pass

    Wrong.pack = staticmethod(pack)
    monkeypatch.setattr(experts_registry, "KERNELS", (Wrong, ReferenceExpertsKernel))
    assert experts_registry.choose(CONFIG).kernel is ReferenceExpertsKernel
    assert dict(experts_registry.explain(CONFIG)) == {"cpu": reason, "reference": None}


@pytest.mark.parametrize(("format", "activation"), [(INT8, ACTIVATIONS[0]), (INTEGERS[4, 32], ACTIVATIONS[-3])])
def test_a_kernel_that_does_not_round_its_inputs_is_passed_over(format, activation):
    class Unrounded(ReferenceExpertsKernel):
        @staticmethod
        def apply(config, *arguments):
            return ReferenceExpertsKernel.apply(replace(config, input_dtype=None), *arguments)

    config = replace(CONFIG, weight_format=format, activation=activation, input_dtype=torch.int8)
    assert experts_registry.reason_against(ReferenceExpertsKernel, config) is None
    assert experts_registry.reason_against(Unrounded, config) == "a few small experts come out wrong on this device"


@pytest.mark.parametrize("ignored", ["biases", "input_permutation", "expert_map"])
def test_a_kernel_that_ignores_an_argument_is_passed_over(ignored):
    class Ignoring(ReferenceExpertsKernel):
        @staticmethod
        def apply(config, x, topk_weights, topk_ids, packed, input_permutation, expert_map):
            if ignored == "biases":
                packed = [*packed[:-2], *map(torch.zeros_like, packed[-2:])]
            elif ignored == "input_permutation":
                input_permutation = None
            else:
                expert_map, topk_ids = None, topk_ids.clamp(max=config.num_experts - 1)
            arguments = (x, topk_weights, topk_ids, packed, input_permutation, expert_map)
            return ReferenceExpertsKernel.apply(config, *arguments)

    reason = experts_registry.reason_against(Ignoring, CONFIG)
    assert reason == "a few small experts come out wrong on this device"
