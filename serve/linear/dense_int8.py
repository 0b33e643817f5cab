"""Dense linears in int8 (`ria_vllm.format.int8_rows`): by vLLM's kernel if inputs are rounded and it is right, else by
that of heads.

The latter multiplies twice to leave inputs as they are: as fast as vLLM's for a few tokens, and a third as fast for
prompts. It also takes what vLLM's does not.
"""

import torch
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.format import int8_rows
from ria_vllm.format.token_rounding import round_tokens
from ria_vllm.serve.kernels.cpu.backend import LOADED, multiply_int8_rows
from ria_vllm.serve.linear.parameters import set_parameter

# vLLM's latent attention and LoRA look for the first name.
NAMES = WEIGHT, SCALE, *_OF_INPUTS = ["weight_packed", "packed_scale", "no_input_scale", "no_zero_point", "azp_adj"]


def dense_int8(
    layer: LinearBase, integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, rounds: bool
) -> "DenseInt8 | None":
    """Register on `layer` what a kernel needs. The result multiplies with the weights as they are stored; None where no
    kernel does.

    Args:
        integers: int8 [out, in], of this rank.
        scales: float32 [out, 1].
        dtype: of the activations.
        rounds: each token is rounded to int8.
    """
    on_cpu = integers.device.type == "cpu"
    if on_cpu:
        # Without VNNI, the sums of vLLM's kernel have 16 bits and saturate. With AMX it chooses one that refuses
        # float32, and crashes on float16.
        fits = dtype == torch.bfloat16 or not torch.cpu._is_amx_tile_supported()
        theirs = torch.cpu._is_vnni_supported() and fits
    else:  # CUTLASS's int8 ends before Blackwell
        theirs = dtype != torch.float32 and torch.cuda.get_device_capability(integers.device)[0] < 10
    if rounds and theirs:
        try:
            return _VllmMethod(layer, integers, scales, dtype)
        except ValueError:  # vLLM has none for this device
            return None
    if not on_cpu or not LOADED or integers.shape[1] % int8_rows.COLUMNS_MULTIPLE:
        return None
    set_parameter(layer, WEIGHT, integers)
    set_parameter(layer, SCALE, scales)
    return _RowsMethod(rounds)


class _RowsMethod:
    def __init__(self, rounds: bool):
        self.rounds = rounds
        self.kernel_name = f"ria::int8_rows_linear with inputs {'rounded to int8' if rounds else 'unrounded'}"

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out], both of this rank."""
        x = round_tokens(x, torch.int8) if self.rounds else x
        return multiply_int8_rows(x, getattr(layer, WEIGHT), getattr(layer, SCALE), bias)


class _VllmMethod:
    def __init__(self, layer: LinearBase, integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        self.kernel = init_int8_linear_kernel(
            is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="ria-vllm"
        )
        self.kernel_name = f"vLLM's {type(self.kernel).__name__}"
        # A layer still has the parameters of its stored form, some of which have the names that vLLM's schemes use.
        self.kernel.layer_param_names = NAMES
        set_parameter(layer, WEIGHT, integers)
        set_parameter(layer, SCALE, scales)
        for name in _OF_INPUTS:
            layer.register_parameter(name, None)
        layer.logical_widths = [len(integers)]
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # of the outputs for which oneDNN packs
        try:
            self.kernel.process_weights_after_loading(layer)
        finally:
            torch.set_default_dtype(before)
        # oneDNN has their address.
        self.scales = getattr(layer, SCALE)
        if getattr(layer, WEIGHT) is None:  # oneDNN keeps its own
            set_parameter(layer, WEIGHT, integers.new_empty(0))

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # One of vLLM's kernels takes matrices only.
        return self.kernel.apply_weights(layer, x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])


DenseInt8 = _RowsMethod | _VllmMethod
