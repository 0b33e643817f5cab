"""The kernel cpu with inputs that it rounds to int8, in every instruction set that this machine can run."""

from dataclasses import replace

import pytest
import torch
from instruction_sets import said_by
from packed_layers import pack
from sweep import RandomWeight, assert_close_to_float64, random_weight
from sweep_int8 import OF_16, assert_equal, formula, packed

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT4, INT8, IntFormat
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, packing_arguments

INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx_vnni", "avx2", "portable")


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_bit_is_that_of_the_formula(instruction_set):
    assert said_by("sweep_int8.py", instruction_set) == [instruction_set]


def test_any_leading_dimensions_and_strides():
    torch.manual_seed(5)
    weight = random_weight(37, 128, IntFormat(4, 64))
    layer, permutation = packed(weight), torch.randperm(128, dtype=torch.int32)
    wide = torch.randn(6, 5, 256).to(torch.bfloat16)
    for x in (wide[0, 0, :128], wide[..., 64:192], wide[::2, 0, :128], wide[..., ::2], wide[:0, :, :128]):
        want = formula(weight, x.reshape(-1, 128), permutation).reshape(*x.shape[:-1], 37)
        assert_equal(layer(x, permutation), want, str(x.shape))


@pytest.mark.parametrize(
    ("format", "pack"),
    [(INT8, packed), (IntFormat(4, 32), packed), (INT4, RandomWeight.packed_by), (FLOAT, RandomWeight.packed_by)],
)
def test_a_bitmask_without_eight_of_16_is_refused_by_name(format, pack):
    weight = random_weight(45, 192, format, pattern=OF_16)
    bitmask = weight.parts["bitmask"].view(torch.int16)
    for row, group, bits in ((41, 7, 0x7FF0), (41, 3, 0x007F), (3, 11, 0), (3, 0, -1)):
        bitmask[row, group] = bits
        with pytest.raises(RuntimeError, match=f"8:16: row {row}, columns {16 * group} to {16 * group + 15} must"):
            pack(weight)


@pytest.mark.parametrize("name", ("2:4", "4:8"))
def test_stricter_patterns_are_8_of_16(name):
    torch.manual_seed(8)
    weight = random_weight(50, 192, IntFormat(4, 64), pattern=PATTERNS[name])
    loose = replace(weight, pattern=OF_16)
    for tokens in (1, 9, 50):
        x = weight.x(tokens)
        assert_equal(packed(loose)(x), formula(weight, x), f"{name}, {tokens} tokens")
        assert_equal(packed(weight)(x), formula(weight, x), f"{name}, {tokens} tokens")
        assert_close_to_float64(weight.packed_by()(x), x, weight)


def test_scales_without_a_common_divisor_are_refused_by_name():
    weight = random_weight(45, 192, IntFormat(4, 64), torch.float32)
    scales = weight.parts["weight_scale"]
    for row, values in ((41, (0.5, 8.5, 1.0)), (40, (1.0, 1.0 + 2**-20, 1.0)), (3, (0.5, -0.5, 0.5)), (2, (0.5, 0, 1))):
        scales[row] = torch.tensor(values)
        with pytest.raises(RuntimeError, match=f"row {row}: .* must be multiples, 1 to 15, of one number"):
            packed(weight)
    with pytest.raises(RuntimeError, match="int8 weights have one scale per row"):
        packed(random_weight(16, 64, IntFormat(8, 64)))


@pytest.mark.parametrize("divisor", range(1, 16))
def test_any_multiples_are_taken(divisor):
    """Multiples of which the least is `divisor`, so that the row's scale is that part of it; padding has any scale."""
    weight = random_weight(33, 512, IntFormat(4, 32), torch.float32)
    scales, unit = weight.parts["weight_scale"], torch.rand(33, 1).to(torch.bfloat16).float() + 2**-9
    scales[:] = unit * torch.randint(divisor, 16, scales.shape)
    scales[:, 5:6] = unit * divisor
    weight.parts["compressed"][:, -8:] = 0x88
    scales[:, -1] = torch.pi
    x = weight.x(7)
    assert_equal(packed(weight)(x), formula(weight, x), str(divisor))


def test_the_packed_weight_says_which_inputs_it_is_for():
    weight = random_weight(16, 64, INT8, torch.float32)
    x = torch.randn(2, 64)
    (rounded,) = packed(weight).packed
    (other,) = pack(CpuKernel, weight.parts, INT8, torch.bfloat16).packed
    call = torch.ops.ria.sparse24_linear.cpu
    assert_equal(call(x, rounded, 16, None, None), formula(weight, x), "float32")
    unrounded = call(x, other, 16, None, None)
    assert not torch.equal(unrounded, call(x, rounded, 16, None, None))
    assert torch.allclose(unrounded.double(), x.double() @ weight.dense.T, atol=1e-4)
    for refused in ((x.double(), other), (x.double(), rounded), (x.to(torch.int8), rounded)):
        with pytest.raises(RuntimeError, match="x must have"):
            call(*refused, 16, None, None)
    with pytest.raises(RuntimeError, match="bias must be"):
        call(x, rounded, 16, None, torch.zeros(16, dtype=torch.bfloat16))
    compressed, bitmask = sparse24.compress(torch.randn(16, 64))
    with pytest.raises(RuntimeError, match="only int8 and int4"):
        torch.ops.ria.sparse24_pack.cpu(compressed, bitmask, None, 0, True)
    parts = random_weight(16, 64, INT8, pattern=OF_16).parts
    for rounds, pattern in ((False, 8), (True, 8), (True, 4), (False, 4)):
        with pytest.raises(RuntimeError, match="pattern must be|is not 2:4"):
            torch.ops.ria.sparse24_pack.cpu(*packing_arguments(INT8, parts), rounds, pattern)


def test_which_layers_are_taken():
    def reason(format, act_dtype, input_dtype, columns=128, pattern=TWO_OF_FOUR):
        config = LinearLayerConfig(torch.device("cpu"), act_dtype, format, 16, columns, input_dtype, pattern)
        return CpuKernel.can_implement(config)

    for pattern in CpuKernel.patterns:
        assert reason(INT4, torch.bfloat16, torch.int8, pattern=pattern) is None
        assert reason(FLOAT, torch.bfloat16, None, pattern=pattern) is None

    for dtype in sparse24.VALUE_DTYPES:
        assert reason(INT8, dtype, torch.int8) is None and reason(INT4, dtype, torch.int8) is None
        assert "no int8 inputs with float weights" in reason(FLOAT, dtype, torch.int8)
        assert reason(INT8, dtype, None) is None
    assert "no float8_e4m3fn inputs" in reason(INT8, torch.bfloat16, torch.float8_e4m3fn)
    assert "no int8 inputs with int8-g64 weights" in reason(IntFormat(8, 64), torch.bfloat16, torch.int8)
    assert reason(IntFormat(4, 64), torch.bfloat16, torch.int8) is None
    assert "not a multiple of 128" in reason(IntFormat(4, 128), torch.float16, torch.int8, columns=64)


def test_operators_pass_opcheck_and_compile():
    torch.manual_seed(6)
    weight = random_weight(24, 64, IntFormat(4, 32), torch.float16)
    layer, permutation, bias = packed(weight), torch.randperm(64, dtype=torch.int32), weight.bias()
    arguments = weight.x(3), layer.packed[0], 24, permutation, bias
    torch.library.opcheck(torch.ops.ria.sparse24_linear.cpu, arguments)
    compiled = torch.compile(lambda x: layer(x, permutation, bias), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5, 40):
        x = weight.x(tokens)
        assert torch.equal(compiled(x), layer(x, permutation, bias))


def test_more_columns_than_the_sums_can_hold_are_refused():
    with pytest.raises(RuntimeError, match="too many columns"):
        packed(random_weight(1, 131072 + 64, INT8))
