"""When the linear method keeps fp8 weights, when it dequantizes them, and what it computes."""

import pytest
import torch
from compressed_tensors_layers import BY_TENSOR, BY_TOKEN, FLOAT, INT, Checkpoint
from stored import Stored
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.utils.torch_utils import set_default_torch_dtype

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FP8
from ria_vllm.format.token_rounding import FP8_DTYPE, quantize_fp8

pytestmark = pytest.mark.usefixtures("ranks")


def packed(layer):
    return [getattr(layer, name) for name in layer.ria_packed.packed]


def check_kept(layer, plain):
    """Its values are fp8, and its result is that of inputs rounded to fp8, up to one ulp."""
    values, _, scales = packed(layer)
    assert values.dtype == FP8_DTYPE and scales.dtype == torch.float32 and scales.shape == (plain.shape[0],)
    x = torch.randn(5, plain.shape[1], generator=torch.Generator().manual_seed(7)).bfloat16()
    rounded, x_scales = quantize_fp8(x)
    exact = (rounded.double() * x_scales.double()[:, None]) @ plain.T
    y = layer(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
    assert not torch.allclose(y.double(), x.double() @ plain.T, rtol=2**-8, atol=1e-6)  # the inputs were rounded


@pytest.mark.parametrize(
    ("columns", "dense", "inputs", "strategy"),
    [(128, False, BY_TOKEN, "channel"), (96, True, BY_TENSOR, "tensor"), (96, False, BY_TENSOR, "channel")],
)
def test_a_hopper_keeps_fp8(hopper_layers, columns, dense, inputs, strategy):
    """Static scales of activations are not needed: every token gets its own."""
    checkpoint = Checkpoint(inputs=inputs, strategy=strategy, dense=dense)
    check_kept(checkpoint.single(columns), checkpoint.plain["fc"])


@pytest.mark.parametrize("rounded", [True, False])
def test_a_folder_of_ours_is_kept_if_it_rounds_inputs(hopper_layers, rounded):
    """As `distill` makes one of compressed-tensors' fp8. Otherwise its weights are served as floating point."""
    stored = Stored(weight_format=FP8, rounded=rounded)
    stored.add("fc", 64, 128, stored.permutation(128))
    layer = ReplicatedLinear(
        128, 64, quant_config=stored.config(), prefix="fc", params_dtype=torch.bfloat16, return_bias=False
    )
    layer = stored.load(layer, {"fc": None})
    if rounded:
        layer.bias.data.zero_()
        check_kept(layer, stored.plain["fc"].double())
    else:
        assert packed(layer)[0].dtype != FP8_DTYPE


def test_fused_linears_keep_their_own_scales(hopper_layers):
    checkpoint = Checkpoint(strategy="tensor")
    layer = MergedColumnParallelLinear(
        128, [64, 32], bias=False, quant_config=checkpoint.config(), prefix="gate_up", params_dtype=torch.bfloat16,
        return_bias=False,
    )  # fmt: skip
    checkpoint.load(layer, {"gate": (0, 64), "up": (1, 32)})
    check_kept(layer, torch.cat([checkpoint.plain["gate"], checkpoint.plain["up"]]))
    scales = packed(layer)[2]
    assert len(set(scales[:64].tolist())) == len(set(scales[64:].tolist())) == 1 and scales[0] != scales[-1]


def test_fused_on_disk_with_one_scale_for_all():
    checkpoint = Checkpoint(strategy="tensor")
    config = checkpoint.config()
    config.stored = {"gate_up"}
    layer = MergedColumnParallelLinear(
        128, [64, 32], bias=False, quant_config=config, prefix="gate_up", params_dtype=torch.float32, return_bias=False
    )
    checkpoint.load(layer, {"gate_up": (None, 96)})
    check_dequantized(layer, checkpoint.plain["gate_up"], torch.float32)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_scales_keep_their_precision_in_a_bfloat16_model(strategy):
    """vLLM builds a model with the model's dtype as torch's default."""
    checkpoint = Checkpoint(strategy=strategy)
    with set_default_torch_dtype(torch.bfloat16):
        layer = ReplicatedLinear(128, 64, bias=False, quant_config=checkpoint.config(), prefix="fc")
    checkpoint.stream(layer, {"fc": (None, 64)})
    assert torch.equal(layer.weight_scale, checkpoint.tensors("fc", 64, 128)["weight_scale"])


def check_dequantized(layer, plain, dtype):
    assert [tensor.dtype for tensor in packed(layer) if tensor.dtype == FP8_DTYPE] == []
    x = torch.randn(5, plain.shape[1], generator=torch.Generator().manual_seed(7)).to(dtype)
    exact = x.double() @ plain.to(dtype).double().T
    torch.testing.assert_close(layer(x).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize(("dense", "inputs"), [(False, None), (True, INT), (False, FLOAT | {"num_bits": 4})])
def test_inputs_that_the_checkpoint_wants_unrounded_stay_so(hopper_layers, dense, inputs):
    checkpoint = Checkpoint(inputs=inputs, dense=dense)
    layer = checkpoint.single()
    check_dequantized(layer, checkpoint.plain["fc"], torch.bfloat16)
    assert str(layer.ria_packed.choice) == "cutlass with fp8 widened to bfloat16"


@pytest.mark.parametrize(("dense", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_elsewhere_fp8_becomes_floating_point(dense, dtype):
    checkpoint = Checkpoint(dense=dense)
    check_dequantized(checkpoint.single(dtype=dtype), checkpoint.plain["fc"], dtype)


def test_fused_linears_that_differ_in_their_inputs_are_refused():
    checkpoint = Checkpoint()
    config = checkpoint.config(
        a=checkpoint.group | {"targets": ["gate"]}, b=checkpoint.group | {"targets": ["up"], "input_activations": None}
    )
    with pytest.raises(RiaError, match="gate_up: vLLM fuses gate, up, but they are not stored alike"):
        MergedColumnParallelLinear(128, [64, 32], quant_config=config, prefix="gate_up")
