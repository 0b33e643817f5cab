"""What a CUDA graph can capture: no shape that depends on a value, no value read by the host, no copy between devices.

The layer is computed on tensors without values, whose device torch calls "meta".
"""

import functools

import pytest
import torch
from graph_capture import GraphCapture

from ria_vllm.format.formats import FLOAT, FP8, INT4, INT8, INTEGERS
from ria_vllm.format.token_rounding import FP8_DTYPE
from ria_vllm.serve.kernels import reference, reference_experts
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig, LinearLayerConfig
from ria_vllm.serve.kernels.cuda.backend import CutlassKernel
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel
from ria_vllm.serve.kernels.registry import LinearChoice
from ria_vllm.serve.kernels.torch import cusparselt
from ria_vllm.serve.kernels.torch.cusparselt import CusparseltKernel
from ria_vllm.serve.linear import packing
from ria_vllm.serve.linear.packing import PackedLinear
from ria_vllm.serve.linear.parameters import set_parameter

GPU = "meta"
BODIES = {
    torch.ops.ria.sparse24_linear.reference: reference._linear,
    torch.ops.ria.sparse24_linear.cusparselt: cusparselt._linear,
    torch.ops.ria.sparse24_experts.reference: reference_experts._experts,
}


def on_gpu(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=GPU)


def stored(rows, columns, dtype=torch.bfloat16):
    return on_gpu(rows, columns // 2, dtype=dtype), on_gpu(rows, columns // 8, dtype=torch.uint8)


def in_format(weight_format, rows, columns):
    """The stored tensors of a weight, as the reference kernels keep them."""
    return [on_gpu(*part.shape(rows, columns), dtype=part.dtypes[0]) for part in weight_format.parts]


def for_cutlass(dtype, rows, columns):
    values, bitmask = stored(rows, columns, dtype)
    return values, bitmask.flatten(), on_gpu(rows, dtype=torch.float32)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: on_gpu(4, 4)[on_gpu(4, 4, dtype=torch.bool)],
        lambda: on_gpu(1).item(),
        lambda: on_gpu(4).cpu(),
        lambda: torch.empty(4).to(GPU),
    ],
)
def test_the_capture_refuses(refused):
    """Otherwise the tests below would prove nothing."""
    with pytest.raises(AssertionError, match="the host waits for a value|: on {.*cpu"), GraphCapture(GPU, BODIES):
        refused()


ROWS, COLUMNS = 2048 + 96, 96  # more rows than are decompressed at a time; columns that need padding
LAYERS = {
    f"reference, {one.name}": (ReferenceKernel, one, functools.partial(in_format, one))
    for one in (FLOAT, INT8, INT4, INTEGERS[4, 32])
} | {
    "cusparselt": (CusparseltKernel, FLOAT, lambda rows, columns: (on_gpu(rows, columns * 9 // 16),)),
    "cusparselt, int8": (
        CusparseltKernel,
        INT8,
        lambda rows, columns: (on_gpu(rows, columns * 5 // 8, dtype=torch.int8), on_gpu(rows, dtype=torch.float32)),
    ),
    "cutlass, fp8": (CutlassKernel, FP8, functools.partial(for_cutlass, FP8_DTYPE)),
    "cutlass, int8": (CutlassKernel, INT8, functools.partial(for_cutlass, torch.int8)),
}


ROUNDING = "cusparselt, int8", "cutlass, int8"  # they take int8 with int8 inputs only


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(
    "name, input_dtype",
    [(name, None) for name in LAYERS if name not in ROUNDING]
    + [(name, torch.int8) for name in LAYERS if "int" in name],
)
def test_a_layer(monkeypatch, name, input_dtype, gathered):
    """With padding, a permutation, a bias and, if `gathered`, the channels of all ranks."""
    kernel, weight_format, packed = LAYERS[name]
    monkeypatch.setattr(packing, "tensor_model_parallel_all_gather", lambda x: torch.cat([x, x], -1))
    layer, tensors = torch.nn.Module(), packed(ROWS, COLUMNS + 32)
    names = tuple(f"packed_{i}" for i in range(len(tensors)))
    for parameter, tensor in zip(names, tensors):
        set_parameter(layer, parameter, tensor)
    set_parameter(layer, "permutation", on_gpu(COLUMNS + 32, dtype=torch.int32))
    set_parameter(layer, "channels", on_gpu(COLUMNS, dtype=torch.int32))
    config = LinearLayerConfig(torch.device(GPU), torch.bfloat16, weight_format, ROWS, COLUMNS + 32, input_dtype)
    packed_linear = PackedLinear(
        LinearChoice(kernel, config), names, "permutation", "channels" if gathered else None, 32
    )
    x, bias = on_gpu(2, 9, COLUMNS), on_gpu(ROWS)
    with GraphCapture(GPU, BODIES) as capture:
        y = packed_linear.apply(layer, x, bias)
    assert y.shape == (2, 9, ROWS) and y.dtype == x.dtype
    assert not capture.kept(y)


@pytest.mark.parametrize(
    "weight_format, input_dtype",
    [(INT8, None), (INT4, None), (INTEGERS[4, 64], torch.int8)],
)
def test_experts(weight_format, input_dtype):
    """With biases, a permutation, a limit, and experts of other ranks."""
    config = ExpertsLayerConfig(
        torch.device(GPU), torch.bfloat16, weight_format, 4, 128, 64, Activation("silu", limit=7.0), has_bias=True,
        input_dtype=input_dtype,
    )  # fmt: skip
    packed = []
    for rows, columns in ((128, 128), (128, 64)):
        packed += [t.expand(4, *t.shape) for t in in_format(weight_format, rows, columns)]
    packed += [on_gpu(4, 128), on_gpu(4, 128)]
    ids, p, numbers = (on_gpu(*shape, dtype=torch.int32) for shape in ((9, 2), (128,), (8,)))
    weights = on_gpu(9, 2, dtype=torch.float32)
    with GraphCapture(GPU, BODIES) as capture:
        y = ReferenceExpertsKernel.apply(config, on_gpu(9, 128), weights, ids, packed, p, numbers)
    assert y.shape == (9, 128) and y.dtype == torch.bfloat16
    assert not capture.kept(y)
