"""fp8 around the kernel: how activations are quantized, and what the library receives and returns."""

import pytest
import torch
from packed_layers import pack

from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FP8
from ria_vllm.format.token_rounding import FP8_DTYPE, quantize_fp8
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-6, 6e4])
def test_quantized_activations_are_as_near_as_e4m3_allows(dtype, magnitude):
    """e4m3 has three mantissa bits: an error of 1/16 of the value, and below 2^-6 of 2^-10, times the scale."""
    x = (torch.randn(9, 4, 192, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * magnitude).to(dtype)
    values, scales = quantize_fp8(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and values.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (9, 4)
    largest = x.double().abs().amax(-1)
    assert torch.allclose(scales.double() * 448, largest, rtol=1e-6, atol=0)
    assert bool((values.float().abs().amax(-1) == 448).all())
    room = torch.maximum(x.double().abs() / 16, scales.double()[..., None] * 2**-10) * (1 + 1e-6)
    assert bool(((values.double() * scales.double()[..., None] - x.double()).abs() <= room).all())


def test_rows_are_rounded_one_by_one():
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 0], x[3] = 5.0, float("inf"), torch.finfo(torch.float32).tiny / 4
    values, scales = quantize_fp8(x)
    dequantized = values.float() * scales[:, None]
    assert bool((dequantized[0] == 0).all()) and bool((scales > 0).all())
    assert dequantized[1, 3] == pytest.approx(5.0) and dequantized[1].sum() == dequantized[1, 3]
    assert bool(dequantized[2].isnan().any()) and bool(dequantized[[0, 1, 3]].isfinite().all())


def random_weight(out_features, in_features):
    dense = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    compressed, bitmask = sparse24.compress(dense)
    values, scales = quantize_fp8(compressed)
    stored = sparse24.decompress(values.double(), bitmask) * scales.double()[:, None]
    return {"compressed": values, "bitmask": bitmask, "weight_scale": scales[:, None]}, stored


def packed_layer(out_features, in_features):
    return pack(CutlassKernel, random_weight(out_features, in_features)[0], FP8, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "leading", "extras"),
    [
        (torch.bfloat16, (), False),
        (torch.float16, (7,), True),
        (torch.bfloat16, (2, 3), True),
        (torch.float16, (0,), True),
    ],
)
def test_apply_against_float64(hopper, dtype, leading, extras):
    """Against the product of the quantized x and the weight: y may be off by half an ulp."""
    parts, stored = random_weight(72, 192)
    layer = pack(CutlassKernel, parts, FP8, dtype)
    packed = layer.packed
    assert [t.dtype for t in packed] == [torch.float8_e4m3fn, torch.uint8, torch.float32] and hopper.packed_bits == 8
    assert all(tensor.data_ptr() != part.data_ptr() for tensor, part in zip(packed, parts.values()))
    x = torch.randn(*leading, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    p = torch.randperm(192, generator=torch.Generator().manual_seed(3)).int() if extras else None
    bias = torch.randn(72, generator=torch.Generator().manual_seed(4)).to(dtype) if extras else None
    y = layer(x, p, bias)
    assert y.dtype == dtype and y.shape == (*leading, 72) and y.is_contiguous()
    taken = x if p is None else x[..., p.long()]
    values, scales = quantize_fp8(taken)
    exact = (values.double() * scales.double()[..., None]) @ stored.T + (0 if bias is None else bias.double())
    assert bool(((y.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.01).all())
    if leading != (0,):
        assert hopper.used.startswith("fp8_")
        # The quantization itself: a term is off by at most 1/16 of itself, or by half of the smallest step.
        unrounded = taken.double() @ stored.T + (0 if bias is None else bias.double())
        room = (taken.double().abs() / 16 + scales.double()[..., None] * 2**-10) @ stored.abs().T
        assert bool(((exact - unrounded).abs() <= room).all())
        assert not torch.equal(exact, unrounded)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_scales": torch.ones(2)}, r"x's scales are \(2,\) torch.float32, expected \(3,\) float32"),
        ({"scales": torch.ones(72, 1)}, r"the weight's scales are \(72, 1\) torch.float32, expected \(72,\) float32"),
        ({"bias": torch.ones(72)}, r"bias is \(72,\) torch.float32, expected \(72,\) torch.bfloat16"),
        ({"metadata": torch.ones(8, dtype=torch.uint8)}, "8 bytes of metadata do not fit a 72 x 192 weight"),
    ],
)
def test_operands_that_do_not_fit_are_named(hopper, change, message):
    values, metadata, scales = packed_layer(72, 192).packed
    given = {"x": torch.ones(3, 192).to(FP8_DTYPE), "x_scales": torch.ones(3), "values": values, "metadata": metadata}
    given |= {"scales": scales, "bias": None, "dtype": torch.bfloat16}
    with pytest.raises(RiaError, match=message):
        torch.ops.ria.sparse24_linear.cutlass(**given | change)


def test_the_compiler_traces_rounding_and_product_as_one_graph(hopper):
    layer = packed_layer(72, 192)
    traced = torch.compile(lambda x: layer(x), backend="aot_eager", fullgraph=True)
    for tokens in (3, 5):
        x = torch.randn(tokens, 192).bfloat16()
        assert torch.equal(traced(x), layer(x))
