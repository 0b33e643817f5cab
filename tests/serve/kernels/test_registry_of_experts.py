"""Which kernel serves a layer's experts."""

from dataclasses import replace

import pytest
import torch
from random_experts import random_experts

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FP8, INT8, INTEGERS
from ria_vllm.serve.kernels import registry
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

CONFIG = random_experts(2, 64, 32).config


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv(registry.KERNEL_VARIABLE, raising=False)


def test_the_first_kernel_that_can_serve_the_layer():
    assert registry.choose(CONFIG).kernel is CpuExpertsKernel
    assert str(registry.choose(CONFIG)) == "cpu"
    with pytest.raises(RiaError, match=r"no kernel can serve a layer of 2 experts \(64 x 32\) with float weights and"):
        registry.choose(replace(CONFIG, act_dtype=torch.float64))


def test_weights_are_widened_only_where_no_kernel_keeps_them():
    assert str(registry.choose(replace(CONFIG, weight_format=INT8))) == "cpu"
    assert str(registry.choose(replace(CONFIG, weight_format=FP8))) == "cpu with fp8 widened to bfloat16"


def test_inputs_are_rounded_where_a_kernel_does_it():
    for format in INTEGERS.values():
        config = replace(CONFIG, weight_format=format, input_dtype=torch.int8)
        how = "not rounded" if format.num_bits == 8 and format.group_size else "rounded"
        assert str(registry.choose(config)) == f"cpu with inputs {how} to int8"
    float8 = replace(CONFIG, weight_format=INT8, input_dtype=torch.float8_e4m3fn)
    assert str(registry.choose(float8)) == "cpu with inputs not rounded to float8_e4m3fn"


def test_a_forced_kernel(monkeypatch):
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "reference")
    assert registry.choose(CONFIG).kernel is ReferenceExpertsKernel
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "cpu")
    with pytest.raises(RiaError, match="RIA_VLLM_BACKEND=cpu cannot serve a layer of 2 experts .*: dtype float64"):
        registry.choose(replace(CONFIG, act_dtype=torch.float64))
    monkeypatch.setenv(registry.KERNEL_VARIABLE, "cpuu")
    with pytest.raises(
        RiaError, match="RIA_VLLM_BACKEND=cpuu is not a kernel for .* choose from cpu, cutlass, reference"
    ):
        registry.choose(CONFIG)
    for name in ("cusparselt", "cutlass"):  # for linears alone; for experts on GPUs
        monkeypatch.setenv(registry.KERNEL_VARIABLE, name)
        assert registry.choose(CONFIG).kernel is CpuExpertsKernel
