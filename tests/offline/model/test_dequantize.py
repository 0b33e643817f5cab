"""Quantized weights become the numbers that a formula in float64, or transformers, makes of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantized_sources import E2M1, from_mxfp4, grid_of, to_fp8, to_mxfp4

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.files.dequantize import Fp8, Mxfp4, find_quantized, scheme_of
from ria_vllm.offline.model.files.tensors import Header
from ria_vllm.offline.model.run.hf import dequantized_from

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
@pytest.mark.parametrize(("block", "shape"), [((128, 128), (300, 200)), ((7, 1), (129, 5)), ((1, 10**12), (129, 5))])
def test_blocks_of_fp8_of_which_the_last_ones_may_be_smaller(shape, block, dtype):
    torch.manual_seed(0)
    parts = to_fp8(torch.randn(shape) * torch.rand(shape[0], 1), block)
    found = Fp8(block).dequantized(parts[""], parts["_scale_inv"], dtype)
    exact = parts[""].double() * grid_of(parts["_scale_inv"], block, shape)
    assert found.dtype == dtype and torch.equal(found, exact.float().to(dtype))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, None),
        ({}, None),
        ({"quant_method": "mxfp4"}, Mxfp4()),
        ({"quant_method": "fp8", "weight_block_size": [128, 64]}, Fp8((128, 64))),
        ({"quant_method": "fp8", "weight_block_size": None}, Fp8(None)),
    ],
)
def test_how_weights_are_quantized(words, expected):
    assert scheme_of(words, "m") == expected
    assert dequantized_from(SimpleNamespace(quantization_config=words)) == (
        None if expected is None else expected.method
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"quant_method": "gptq"},
            r"m: its weights are quantized \(gptq\), says config.json; of such models, only mxfp4",
        ),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, r"quantized \(compressed-tensors\)"),
        ({"quant_method": ["x"]}, r"quantized \(\['x'\]\)"),
        (["junk"], r"quantized \(something\)"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "m: config.json: .* not two positive whole numbers"),
        ({"quant_method": "fp8", "weight_block_size": [True, 2.0]}, "not two positive whole numbers"),
    ],
)
def test_other_ways_are_refused_by_name(words, message):
    with pytest.raises(RiaError, match=message):
        scheme_of(words, "m")
    assert dequantized_from(SimpleNamespace(quantization_config=words)) is None


def headers_of(tensors):
    return {name: Header(dtype, tuple(shape), Path("f.safetensors")) for name, (dtype, shape) in tensors.items()}


LINEAR = {"l.up.weight": ("F8_E4M3", (64, 32)), "l.up.weight_scale": ("F32", (1,))}
KV = ["l.attn.k_scale", "l.self_attn.attn.v_scale", "l.self_attn.q_scale", "l.self_attn.kv_scale", "x.k_scale"]
KV += ["l.self_attn.qkv_proj.k_scale", "l.self_attn.k_proj.k_scale", "l.self_attn.k_cache.scale", "k_scale"]


@pytest.mark.parametrize(
    ("scheme", "weight"),
    [
        (Fp8(None), LINEAR),
        (Mxfp4(), {"e.down_proj_blocks": ("U8", (2, 64, 1, 16)), "e.down_proj_scales": ("U8", (2, 64, 1))}),
    ],
)
def test_scales_of_the_kv_cache_are_dropped_wherever_they_are(scheme, weight):
    """In vLLM's words, from `maybe_remap_kv_scale_name`. Attention itself need not be quantized."""
    headers = headers_of(weight | dict.fromkeys(KV, ("F32", ())))
    found, unused = find_quantized(scheme, headers)
    assert len(found) == 1 and unused == set(KV)


# Gemma 4, Gemma 3n, Zaya, DeepSeek-V4 and a tower of CLIP have such parameters.
PARAMETERS = ["l.router.per_expert_scale", "l.attn.per_dim_scale", "l.altup.correct_output_scale", "logit_scale"]
PARAMETERS += ["l.residual_scale", "l.hc_scale", "l.router.scale", "v.layer_scale", "l.up_scales"]


def test_parameters_that_are_called_scales_are_the_models():
    headers = headers_of(LINEAR | dict.fromkeys(PARAMETERS, ("BF16", (8,))))
    assert find_quantized(Fp8(None), headers)[1] == set()


@pytest.mark.parametrize("name", ["l.down.weight_scale", "e.down_proj_scale_inv"])
def test_scales_without_a_weight_are_refused(name):
    headers = headers_of(LINEAR | {name: ("F32", (1,))})
    with pytest.raises(RiaError, match=f"f.safetensors: {name} is in the files, but not the fp8 weight that it scales"):
        find_quantized(Fp8(None), headers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l.up.weight_scale": ("F8_E8M0", (1,))}, r"weight_scale is F8_E8M0 \[1\]"),
        ({"l.down.weight": ("F8_E5M2", (8, 8))}, r"l.down.weight is F8_E5M2 \[8, 8\]"),
        ({"l.up.weight_scale": ("F32", (3,))}, r"weight_scale is F32 \[3\]; by quantization_config"),
    ],
)
def test_variants_of_fp8_that_are_not_read_are_named(changes, message):
    with pytest.raises(RiaError, match=f"f.safetensors: .*{message}.*Get the model again, or an unquantized one."):
        find_quantized(Fp8(None), headers_of(LINEAR | changes))


def stack(gate_up, down, scales):
    return headers_of(
        {
            "e.gate_up_proj": ("F8_E4M3", gate_up),
            "e.gate_up_proj_scale_inv": ("F32", scales),
            "e.gate_up_proj_activation_scale": ("F32", gate_up[:1]),
            "e.down_proj": ("BF16", down),
        }
    )


@pytest.mark.parametrize("scales", [(4,), (4, 1, 1), (4, 2, 1)])
def test_scales_of_a_stack_of_experts(scales):
    """One for each expert, or for gate and up each; scales of inputs are left out."""
    found, unused = find_quantized(Fp8(None), stack((4, 64, 48), (4, 48, 32), scales))
    assert found["e.gate_up_proj"].shape == (4, 64, 48) and unused == {"e.gate_up_proj_activation_scale"}


@pytest.mark.parametrize(
    ("gate_up", "down", "scales"),
    [
        ((4, 48, 64), (4, 32, 48), (4, 2, 1)),  # [experts, in, out]: halves of the rows are not gate and up
        ((4, 64, 48), (4, 64, 48), (4, 2, 1)),
        ((4, 64, 48), (4, 48, 32), (4, 3, 1)),
        ((4, 64, 48), (4, 48, 32), (1,)),
    ],
)
def test_scales_of_a_stack_that_mean_nothing_known(gate_up, down, scales):
    with pytest.raises(RiaError, match="f.safetensors: e.gate_up_proj_scale_inv is F32 .* Get the model again, or an"):
        find_quantized(Fp8(None), stack(gate_up, down, scales))


@pytest.mark.parametrize("scales", [(), (1, 1), (2, 1)])
def test_each_scale_belongs_to_an_equal_part_as_in_transformers(scales):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    torch.manual_seed(0)
    values, scale = torch.randn(64, 48).to(torch.float8_e4m3fn), torch.rand(scales) + 0.5
    found = Fp8(None).dequantized(values, scale, torch.bfloat16)
    assert torch.equal(found, Fp8Dequantize(None)._dequantize_one(values, scale, torch.bfloat16))
