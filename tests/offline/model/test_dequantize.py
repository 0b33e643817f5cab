"""Quantized weights become the numbers that a formula in float64, or transformers, makes of them."""

import pytest
import torch
from quantized_sources import E2M1, from_fp8, from_mxfp4, grid_of, to_fp8, to_mxfp4

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.dequantize import Fp8, Mxfp4, is_readable, scheme_of

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_byte_of_mxfp4_with_each_scale(dtype):
    """e2m1 times a power of two, by a formula. 6 * 2^126 and more are infinite in every dtype."""
    bytes_of_a_row = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    values, scales = bytes_of_a_row.expand(255, -1, -1), torch.arange(255, dtype=torch.uint8)[:, None].expand(-1, 16)
    found = Mxfp4().dequantized(values, scales, dtype)
    codes = torch.stack([bytes_of_a_row % 16, bytes_of_a_row // 16], -1).flatten().long()
    numbers = E2M1[codes % 8] * (1 - 2 * (codes // 8))
    expected = numbers[:, None] * (torch.arange(255).double() - 127).exp2()
    assert found.shape == (512, 255) and found.is_contiguous() and found.dtype == dtype
    assert torch.equal(found, expected.float().to(dtype))


@pytest.mark.parametrize("shape", [(3, 64, 96), (1, 32, 1), (2, 96, 300)])
def test_mxfp4_is_what_transformers_makes_of_it(shape):
    torch.manual_seed(0)
    parts = to_mxfp4(torch.randn(shape))
    expected = from_mxfp4(parts)
    for expert in range(shape[0]):
        found = Mxfp4().dequantized(parts["_blocks"][expert], parts["_scales"][expert], torch.bfloat16)
        assert torch.equal(found.view(torch.int16), expected[expert].view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128), (200, 300), (7, 1), (129, 1000), (1, 10**12)])
@pytest.mark.parametrize("shape", [(300, 200), (128, 256), (1, 1), (129, 5)])
def test_blocks_of_fp8_of_which_the_last_ones_may_be_smaller(shape, block, dtype):
    torch.manual_seed(0)
    parts = to_fp8(torch.randn(shape) * torch.rand(shape[0], 1), block)
    found = Fp8("fp8", block).dequantized(parts[""], parts["_scale_inv"], dtype)
    exact = parts[""].double() * grid_of(parts["_scale_inv"], block, shape)
    assert found.dtype == dtype and torch.equal(found, exact.float().to(dtype))


@pytest.mark.parametrize("scales", ["one", "row", "column of rows"])
def test_fp8_with_one_scale_or_one_for_each_row(scales):
    torch.manual_seed(0)
    block = (1, 96) if scales == "column of rows" else (300, 96)
    parts = to_fp8(torch.randn(300, 96), block)
    stored = parts["_scale_inv"].flatten()[0] if scales == "one" else parts["_scale_inv"]
    found = Fp8("fp8", None).dequantized(parts[""], stored, torch.bfloat16)
    assert torch.equal(found, from_fp8(parts, block))


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def compressed_tensors(*groups, **changes):
    described = {str(number): {"weights": WEIGHTS | group} for number, group in enumerate(groups)}
    words = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": described}
    return words | changes


BLOCK = {"strategy": "block", "block_structure": [128, 64]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "mxfp4"}, Mxfp4()),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, Fp8("fp8", (128, 64))),
        ({"quant_method": "fp8", "weight_block_size": None}, Fp8("fp8", None)),
        (compressed_tensors({}, {"strategy": "tensor"}), Fp8("float-quantized", None)),
        (compressed_tensors(BLOCK), Fp8("float-quantized", (128, 64))),
        (compressed_tensors({}, sparsity_config={"format": "dense"}), Fp8("float-quantized", None)),
    ],
)
def test_how_weights_are_quantized(words, expected):
    assert scheme_of(words, "m") == expected and is_readable(words) == (expected is not None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"quant_method": "gptq"}, r"m: its weights are quantized \(gptq\); of such models, only mxfp4, fp8 and"),
        ({"quant_method": ["x"]}, r"quantized \(\['x'\]\)"),
        (["junk"], r"quantized \(something\)"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "m: config.json: .* not two positive whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "not two positive whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [True, 2.0]}, "not two positive whole numbers"),
        (compressed_tensors({}, format="pack-quantized"), r"quantized \(compressed-tensors, pack-quantized\)"),
        (compressed_tensors(), r"quantized \(compressed-tensors, float-quantized\)"),
        (compressed_tensors({"num_bits": 4}), "quantized"),
        (compressed_tensors({"type": "int"}), "quantized"),
        (compressed_tensors({"symmetric": False}), "quantized"),
        (compressed_tensors({"strategy": "group"}), "quantized"),
        (compressed_tensors(BLOCK, {}), "quantized"),
        (compressed_tensors({"strategy": "block"}), "quantized"),
        (compressed_tensors(BLOCK, BLOCK | {"block_structure": [64, 64]}), "quantized"),
        (compressed_tensors({}, sparsity_config={"format": "sparse-24-bitmask"}), "quantized"),
        (compressed_tensors({}, config_groups={"0": {"weights": None}}), "quantized"),
        (compressed_tensors({}, config_groups=[]), "quantized"),
    ],
)
def test_other_ways_are_refused_by_name(words, message):
    with pytest.raises(RiaError, match=message):
        scheme_of(words, "m")
    assert not is_readable(words)
