"""The dense linears that vLLM runs on a CPU, built by vLLM's own code: the baselines of `cpu_kernels`."""

import os
from collections.abc import Callable

import torch

from ria_vllm.format.formats import INT8

Linear = Callable[[torch.Tensor], torch.Tensor]

W4A16_OPERATOR = "cpu_gemm_wna16"

# Environment variables that limit the dense libraries and our kernels to the instructions of an older CPU.
LIMITS = {
    "avx2": {
        "RIA_VLLM_CPU_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
    "avx512": {
        "RIA_VLLM_CPU_ISA": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "ATEN_CPU_CAPABILITY": "avx512",
    },
}


def limit() -> str | None:
    """The key of LIMITS whose variables are set in this process, if any."""
    return next((name for name, variables in LIMITS.items() if variables.items() <= os.environ.items()), None)


def missing(*operators: str) -> str | None:
    """Which of these operators vLLM does not have on this CPU, as a sentence; None if it has them all.

    vLLM has one library each for AVX2, AVX-512 and AVX-512 with BF16, with fewer operators for older CPUs, and loads
    one by CPUID alone (`CpuPlatform.import_kernels`).
    """
    from vllm import _custom_ops  # noqa: F401  (loads the library)

    lacking = [name for name in operators if not hasattr(torch.ops._C, name)]
    return f"vLLM's library for this CPU has no {' and no '.join(lacking)}" if lacking else None


def w4a16_missing() -> str | None:
    """Why vLLM cannot multiply W4A16 on this CPU; None if it can."""
    return missing(W4A16_OPERATOR)


def w4a16_left_out() -> str | None:
    """Why W4A16 is not measured in this process; None if it is."""
    unlimited = f"no variable limits the instructions of vLLM's {W4A16_OPERATOR}" if limit() else None
    return w4a16_missing() or unlimited


def unquantized(weight: torch.Tensor) -> Linear:
    """A linear with this weight [out, in], in the weight's dtype, by oneDNN or, where vLLM uses it, zentorch."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def w8a8(weight: torch.Tensor, dtype: torch.dtype) -> Linear:
    """A linear whose weight [out, in] is rounded to int8 by row. Each call quantizes its input by token.

    By the kernel that vLLM chooses: oneDNN's, or on a CPU with AMX its own, which takes no float32. Where LIMITS apply
    it is oneDNN's, which they reach.

    Args:
        dtype: of inputs and outputs.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    rounded, scales = INT8.quantize(weight, torch.float32)
    values = (rounded / scales).round().to(torch.int8)
    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scales, requires_grad=False)
    layer.input_scale = layer.input_zero_point = layer.azp_adj = layer.bias = None
    layer.logical_widths = [values.shape[0]]
    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    kernel = CPUInt8ScaledMMLinearKernel(config, names)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # vLLM sets it to the model's dtype, and its kernel takes it for the output
    try:
        if limit():
            kernel.linear_method = kernel._apply_weights_onednn
            kernel.process_weights_for_onednn(layer)
        else:
            kernel.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(before)
    return lambda x: kernel.apply_weights(layer, x)


def w4a16(weight: torch.Tensor, group_size: int) -> Linear:
    """A linear whose weight [out, in] is rounded to int4 with a scale for `group_size` columns, as GPTQ stores it.

    Its inputs and outputs are bfloat16. By the kernel that vLLM chooses: `cpu_gemm_wna16`, which rounds its inputs to
    int8 on a CPU with AMX, unless VLLM_CPU_INT4_W4A8=0. If zentorch is installed, it is zentorch's, which rounds them.
    """
    from vllm.model_executor.kernels.linear import choose_mp_linear_kernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    shape = (weight.shape[1], weight.shape[0])
    config = MPLinearLayerConfig(shape, shape, scalar_types.uint4b8, torch.bfloat16, group_size, zero_points=False)
    groups = weight.unflatten(1, (-1, group_size))
    scales = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16()
    nibbles = (groups / scales.float()).round().clamp(-8, 7).flatten(1).int() + 8
    packed = torch.zeros(len(weight), weight.shape[1] // 8, dtype=torch.int32)
    for i in range(8):
        packed |= nibbles[:, i::8] << 4 * i
    layer = torch.nn.Module()
    layer.bias = None
    for name, tensor in (("weight_packed", packed), ("weight_scale", scales.squeeze(-1))):
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        parameter.output_dim, parameter.input_dim, parameter.packed_dim = 0, 1, 1
        setattr(layer, name, parameter)
    kernel = choose_mp_linear_kernel(config)(config, "weight_packed", "weight_scale", "weight_zero_point")
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)
