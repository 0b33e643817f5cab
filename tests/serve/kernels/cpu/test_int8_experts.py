"""The kernel cpu for experts whose inputs it rounds to int8, in every instruction set that this machine can run."""

from dataclasses import replace

import pytest
import torch
from instruction_sets import said_by
from random_experts import ACTIVATIONS, random_experts, random_routing
from sweep_int8 import OF_16, assert_equal
from sweep_int8_experts import EXACT, digest, formula, random_x, rounding_experts

from ria_vllm.format.formats import FLOAT, INT4, INT8, IntFormat
from ria_vllm.format.sparse24 import VALUE_DTYPES
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_bit_is_that_of_the_formula(instruction_set):
    assert said_by("sweep_int8_experts.py", instruction_set) == [instruction_set, digest()]


@pytest.mark.parametrize(("activation", "dtype"), list(zip(ACTIVATIONS, 3 * VALUE_DTYPES)), ids=str)
def test_any_activation_is_close_to_torch(activation, dtype):
    """A last bit of the activation may round a channel to the next integer."""
    torch.manual_seed(4)
    experts = random_experts(3, 192, 96, activation, dtype, IntFormat(4, 64), biased=True)
    experts = replace(experts, config=replace(experts.config, input_dtype=torch.int8))
    arguments = random_x(experts, 40), *random_routing(40, 2, 3)
    y, want = (
        kernel.apply(experts.config, *arguments, experts.packed(kernel), None, None)
        for kernel in (CpuExpertsKernel, ReferenceExpertsKernel)
    )
    unrounded = replace(experts.config, input_dtype=None)
    packed = ReferenceExpertsKernel.pack(unrounded, experts.gate_up, experts.down, *experts.biases)
    off = ReferenceExpertsKernel.apply(unrounded, *arguments, packed, None, None)
    error = (y.float() - want.float()).norm()
    assert error <= 1e-3 * want.float().norm() and (off.float() - want.float()).norm() > 4 * error


def test_any_strides_and_router_weights_on_the_input():
    torch.manual_seed(5)
    experts = rounding_experts(format=IntFormat(4, 64), experts=3)
    packed, wide = experts.packed(CpuExpertsKernel), (torch.randn(40, 300) / 12).bfloat16()
    weights, ids = random_routing(9, 1, 3)
    for x in (wide[::4, 100:228][:9], wide[:9, 5:261:2], wide[:9, :128].T.contiguous().T, wide[0, :128].expand(9, 128)):
        y = CpuExpertsKernel.apply(experts.config, x, weights, ids.long(), packed, None, None)
        assert_equal(y, formula(experts, x, weights, ids), str(x.stride()))
        config = replace(experts.config, router_weight_on_input=True)
        y = CpuExpertsKernel.apply(config, x, weights, ids, packed, None, None)
        want = formula(experts, x * weights.bfloat16(), torch.ones_like(weights), ids)
        assert_equal(y, want, f"{x.stride()}, weights on the input")


def test_rounds_of_many_tokens():
    """More tokens than a round has: 2048. Each round's tokens are rounded by themselves."""
    torch.manual_seed(6)
    experts = rounding_experts(EXACT[0], torch.float32, experts=3, hidden=64, intermediate=16)
    x, (weights, ids) = random_x(experts, 4100), random_routing(4100, 2, 3)
    permutation = torch.randperm(64, dtype=torch.int32)
    y = CpuExpertsKernel.apply(experts.config, x, weights, ids, experts.packed(CpuExpertsKernel), permutation, None)
    assert_equal(y, formula(experts, x, weights, ids, permutation), "4100 tokens")


def test_the_packed_experts_say_which_inputs_they_are_for():
    rounding, others = rounding_experts(hidden=64), random_experts(hidden=64, format=INT8, biased=True)
    rounded, other = rounding.packed(CpuExpertsKernel), others.packed(CpuExpertsKernel)
    of_16 = rounding_experts(hidden=64, pattern=OF_16).packed(CpuExpertsKernel)
    assert rounded[0].shape == of_16[0].shape
    x, weights, ids = torch.randn(2, 64).bfloat16(), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    call, rest = torch.ops.ria.sparse24_experts.cpu, (None, None, 0, 1, 1.0, 0.0, 1.0)
    call(x, weights, ids, *rounded, *rest)
    call(x, weights, ids, *other, *rest)
    for packed in ((*rounded[:1], *other[1:]), (*other[:1], *rounded[1:]), (*of_16[:1], *rounded[1:])):
        with pytest.raises(RuntimeError, match="the packed down does not fit"):
            call(x, weights, ids, *packed, *rest)
    for packed in (rounded, other):
        with pytest.raises(RuntimeError, match="x must be"):
            call(x.double(), weights, ids, *packed, *rest)
        with pytest.raises(RuntimeError, match="biases must be"):
            call(x.half(), weights, ids, *packed, *rest)


def test_which_layers_are_taken():
    config = rounding_experts(hidden=64).config
    for dtype in VALUE_DTYPES:
        for format in (INT8, INT4, IntFormat(4, 128)):
            assert CpuExpertsKernel.can_implement(replace(config, act_dtype=dtype, weight_format=format)) is None
    assert "no int8 inputs with float weights" in CpuExpertsKernel.can_implement(replace(config, weight_format=FLOAT))
    fp8 = replace(config, input_dtype=torch.float8_e4m3fn)
    assert "no float8_e4m3fn inputs" in CpuExpertsKernel.can_implement(fp8)
    for size in ("hidden_size", "intermediate_size"):
        assert "at most 131072" in CpuExpertsKernel.can_implement(replace(config, **{size: 131136}))
        assert CpuExpertsKernel.can_implement(replace(config, input_dtype=None, **{size: 131136})) is None


def test_operators_pass_opcheck_and_compile():
    torch.manual_seed(7)
    experts = rounding_experts(dtype=torch.float16, format=IntFormat(4, 32), hidden=64, intermediate=40)
    packed, permutation = experts.packed(CpuExpertsKernel), torch.randperm(64, dtype=torch.int32)
    arguments = (random_x(experts, 4), *random_routing(4, 2, 4), *packed, permutation, None)
    torch.library.opcheck(torch.ops.ria.sparse24_experts.cpu, (*arguments, 0, 1, 1.0, 0.0, 7.0))

    def layer(x, weights, ids):
        return CpuExpertsKernel.apply(experts.config, x, weights, ids, packed, permutation, None)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5, 40):
        inputs = random_x(experts, tokens), *random_routing(tokens, 2, 4)
        assert torch.equal(compiled(*inputs), layer(*inputs))
