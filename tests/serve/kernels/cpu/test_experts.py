"""Every kernel for experts that this machine can run: its results against float64, and what its operator promises."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from instruction_sets import said_by
from random_experts import ACTIVATIONS, SILU, random_experts, random_routing
from sweep_experts import check_case, sweep

from ria_vllm.format.formats import FLOAT, FP8, INT4, INT8, IntFormat
from ria_vllm.serve.kernels import reference_experts
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
KERNELS = (CpuExpertsKernel, ReferenceExpertsKernel)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_instruction_set_against_float64(instruction_set):
    assert said_by("sweep_experts.py", instruction_set) == [instruction_set]


def test_reference_against_float64():
    sweep(ReferenceExpertsKernel, (0, 1, 6, 30))
    check_case(ReferenceExpertsKernel, 11, format=FP8, dtype=torch.float16, biased=True)


def test_reference_with_fixed_shapes_against_float64(monkeypatch):
    """As it computes on GPUs."""
    fixed = partial(reference_experts._experts, fixed_shapes=True)
    monkeypatch.setattr(torch.ops.ria, "sparse24_experts", SimpleNamespace(reference=fixed))
    sweep(ReferenceExpertsKernel, (0, 1, 6, 30))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gates_too_large_for_an_exponential(activation):
    experts = random_experts(1, 64, 32, activation, torch.float32)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-30, 5, 11, 88, 200, 1e9]]).T
    weights, ids = torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int32)
    y = CpuExpertsKernel.apply(experts.config, x, weights, ids, experts.packed(CpuExpertsKernel), None, None)
    exact, error = experts.exact(x, weights, ids)
    assert bool(((y.double() - exact).abs() <= error).all())


@pytest.mark.parametrize(("kernel", "permuted"), [(CpuExpertsKernel, True), (ReferenceExpertsKernel, False)])
def test_rounds_of_many_tokens(kernel, permuted):
    """More tokens than a round has: 2048. Permuted ones are copied round by round."""
    experts = random_experts(3, 64, 16, dtype=torch.float32)
    weights, ids = random_routing(4100, 2, 3)
    x, permutation = torch.randn(4100, 64), torch.randperm(64, dtype=torch.int32) if permuted else None
    y = kernel.apply(experts.config, x, weights, ids, experts.packed(kernel), permutation, None)
    exact, error = experts.exact(x, weights, ids, permutation)
    assert bool(((y.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_any_strides_and_kinds_of_ids(kernel):
    experts = random_experts(4, 128, 64)
    packed, wide = experts.packed(kernel), torch.randn(40, 300).bfloat16()
    weights, ids = random_routing(9, 2, 4)
    inputs = {
        "every fourth token": wide[::4, 100:228][:9],
        "every second channel": wide[:9, 5:261:2],
        "transposed": torch.randn(128, 9).bfloat16().T,
        "one token for all": wide[0, :128].expand(9, 128),
    }
    for name, x in inputs.items():
        wanted = kernel.apply(experts.config, x.contiguous(), weights, ids, packed, None, None)
        exact, error = experts.exact(x, weights, ids)
        assert bool(((wanted.double() - exact).abs() <= error).all()), name
        for form in (ids, ids.long(), ids.T.contiguous().T, torch.cat([ids, ids], 1)[:, :2]):
            strided = weights.T.contiguous().T
            assert torch.equal(kernel.apply(experts.config, x, strided, form, packed, None, None), wanted), name


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_router_weights_on_the_input(kernel):
    """vLLM's `apply_router_weight_on_input`: the token is weighted and rounded, its result is not weighted."""
    experts = random_experts(3, 64, 32)
    weights, ids = random_routing(7, 1, 3)
    x = torch.randn(7, 64).bfloat16()
    config = replace(experts.config, router_weight_on_input=True)
    y = kernel.apply(config, x, weights, ids, experts.packed(kernel), None, None)
    exact, error = experts.exact(x * weights.bfloat16(), torch.ones_like(weights), ids)
    assert bool(((y.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_experts_that_do_not_exist_are_refused(kernel):
    experts = random_experts(3, 64, 32)
    packed, x, weights = experts.packed(kernel), torch.randn(2, 64).bfloat16(), torch.ones(2, 1)
    for bad in (3, -2):
        with pytest.raises(RuntimeError, match="topk_ids has an expert that does not exist"):
            kernel.apply(experts.config, x, weights, torch.tensor([[0], [bad]]), packed, None, None)
    ids, wrong_map = torch.tensor([[0], [1]]), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expert_map has an expert that does not exist"):
        kernel.apply(experts.config, x, weights, ids, packed, None, wrong_map)
    with pytest.raises(RuntimeError, match="topk_ids has an expert that does not exist"):
        kernel.apply(experts.config, x, weights, ids + 1, packed, None, wrong_map.clamp(max=2))


def test_wrong_arguments_are_refused():
    experts = random_experts(3, 64, 32, biased=True)
    gate_up, down, gate_up_bias, down_bias = experts.packed(CpuExpertsKernel)
    x, weights, ids = torch.randn(2, 64).bfloat16(), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    other = random_experts(3, 128, 32).packed(CpuExpertsKernel)
    damaged = gate_up.clone()
    damaged[0, 8] += 1  # another number of rows
    good = (x, weights, ids, gate_up, down, gate_up_bias, down_bias, None, None, 0, 1, 1.0, 0.0, 1.0)
    torch.ops.ria.sparse24_experts.cpu(*good)
    wrong = [
        (0, x.half()),
        (0, x[None]),
        (1, weights.double()),
        (2, ids.short()),
        (3, other[0][:, :-1]),
        (3, damaged),
        (4, other[1]),
        (5, gate_up_bias[:, :-1]),
        (5, None),
        (6, down_bias.float()),
        (7, torch.arange(64)),
        (7, torch.arange(1, 65, dtype=torch.int32)),
        (8, torch.arange(3)),
        (9, 5),
    ]
    for place, argument in wrong:
        with pytest.raises(RuntimeError, match="ria::sparse24"):
            torch.ops.ria.sparse24_experts.cpu(*good[:place], argument, *good[place + 1 :])
    damaged = gate_up.clone()
    damaged[2, 0] += 1
    torch.ops.ria.sparse24_experts.cpu(*good[:3], damaged, *good[4:])  # expert 2 is not used
    with pytest.raises(RuntimeError, match="an expert was packed unlike the first"):
        torch.ops.ria.sparse24_experts.cpu(x, weights, ids + 2, damaged, *good[4:])


def test_weights_that_do_not_fit_are_refused_by_name():
    experts = random_experts(3, 64, 32)
    bitmask = experts.gate_up["bitmask"].clone()
    bitmask[2, 41, 7] = 0b01110011
    with pytest.raises(RuntimeError, match="expert 2: .* row 41, columns 60 to 63"):
        CpuExpertsKernel.pack(experts.config, experts.gate_up | {"bitmask": bitmask}, experts.down, None, None)
    compressed, bitmask = experts.gate_up["compressed"], experts.gate_up["bitmask"]
    scales = torch.ones(3, 64)
    for weight in (
        (compressed[0], bitmask[0], None, 0, 1),
        (compressed, bitmask[:2], None, 0, 1),
        (compressed[:, :63].contiguous(), bitmask[:, :63].contiguous(), None, 0, 1),
        (compressed.double(), bitmask, None, 0, 1),
        (compressed.to(torch.int8), bitmask, None, 0, 1),
        (compressed.to(torch.int8), bitmask, scales[:2], 0, 1),
        (compressed.to(torch.int8), bitmask, torch.ones(2, 64, 2), 32, 1),
        (compressed.to(torch.int8), bitmask, torch.ones(3, 64, 2), 64, 1),
    ):
        with pytest.raises(RuntimeError, match="ria::sparse24"):
            torch.ops.ria.sparse24_pack_experts.cpu(*weight)


def test_what_the_cpu_kernel_does_not_take():
    config = random_experts(2, 64, 32).config
    assert CpuExpertsKernel.can_implement(config) is None
    assert "no fp8 weights" in CpuExpertsKernel.can_implement(replace(config, weight_format=FP8))
    assert "dtype float64" in CpuExpertsKernel.can_implement(replace(config, act_dtype=torch.float64))
    other = replace(config, activation=replace(SILU, name="tanh"))
    assert "no activation tanh" in CpuExpertsKernel.can_implement(other)
    assert CpuExpertsKernel.is_supported(torch.device("cuda")) == "the layer is on cuda"


@pytest.mark.parametrize(("kernel", "biased"), [(CpuExpertsKernel, True), (ReferenceExpertsKernel, False)])
def test_compiles_whole_with_dynamic_tokens(kernel, biased):
    experts = random_experts(3, 64, 40, biased=biased)
    packed, permutation = experts.packed(kernel), torch.randperm(64, dtype=torch.int32)

    def layer(x, weights, ids):
        return kernel.apply(experts.config, x * 2, weights, ids, packed, permutation, None) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5, 40):
        inputs = torch.randn(tokens, 64).bfloat16(), *random_routing(tokens, 2, 3)
        assert torch.equal(compiled(*inputs), layer(*inputs))


@pytest.mark.parametrize("format", (FLOAT, INT8, INT4, IntFormat(4, 64)), ids=lambda format: format.name)
def test_operators_pass_opcheck(format):
    experts = random_experts(3, 64, 40, biased=True, format=format)
    weights, ids = random_routing(4, 2, 3)
    arguments = (torch.randn(4, 64).bfloat16(), weights, ids, *experts.packed(CpuExpertsKernel), None, None)
    torch.library.opcheck(torch.ops.ria.sparse24_experts.cpu, (*arguments, 0, 1, 1.0, 0.0, 7.0))
