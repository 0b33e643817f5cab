"""The product on NVIDIA GPUs: our own kernels (csrc) on the sparse tensor cores, CUTLASS inside.

`values` is the checkpoint's `compressed` as it is; `metadata` is its bitmask in the order the tensor cores read. The
activation gather stays outside the operators, so that torch.compile can fuse it into the norm before it; so does the
rounding of activations to fp8 or int8.

Products may run at the same time on several streams of a device, as vLLM computes shared experts beside the others:
each stream has a workspace, see `workspace`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.formats import FLOAT, FP8, INT8
from ria_vllm.format.token_rounding import FP8_DTYPE, quantize_fp8, quantize_tokens
from ria_vllm.format.weight_format import name_of
from ria_vllm.serve.kernels.base import LinearLayerConfig, no_such_product
from ria_vllm.serve.kernels.cuda.bindings import library_of, num_sms_of
from ria_vllm.serve.kernels.cuda.tiles import COUNTER_BYTES, WORKSPACE_BYTES, choose_tile

_ALIGNMENT = 16  # bytes, of every pointer
_INT8_COLUMNS = 128  # int8 tiles take K in such steps

# Of a device, on which products may run at the same time. vLLM uses up to three beside the main one.
STREAMS = 4
# Device -> stream -> the number of its workspace; the stream that was used last comes last.
_used: dict[int, dict[int, int]] = {}

_library = torch.library.Library("ria", "FRAGMENT")
_library.define(
    "sparse24_linear.cutlass(Tensor x, Tensor values, Tensor metadata, Tensor? bias, Tensor? x_scales=None,"
    " Tensor? scales=None, ScalarType? dtype=None) -> Tensor"
)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y [..., out] in x's dtype; of 8-bit x and values in `dtype`, by the scales of tokens and of the weight's rows."""
    dtype = dtype or x.dtype
    for name, tensor, shape in (("x's", x_scales, x.shape[:-1]), ("the weight's", scales, values.shape[:1])):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != shape):
            raise RiaError(f"{name} scales are {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shape)} float32")
    out_features, in_features = values.shape[0], 2 * values.shape[1]
    tokens = x.numel() // in_features
    library = library_of(x.device.index)
    if x.shape[-1] != in_features or x.dtype != values.dtype:
        raise RiaError(f"x is {tuple(x.shape)} {x.dtype}, the weight {out_features} x {in_features} {values.dtype}")
    if metadata.numel() != library.metadata_bytes(out_features, in_features, values.itemsize * 8):
        raise RiaError(f"{metadata.numel()} bytes of metadata do not fit a {out_features} x {in_features} weight")
    if (x_scales is None) != (scales is None):
        raise RiaError("scales of both x and the weight, or of neither")
    if bias is not None and (bias.dtype != dtype or bias.shape != (out_features,)):
        raise RiaError(f"bias is {tuple(bias.shape)} {bias.dtype}, expected ({out_features},) {dtype}")
    y = x.new_empty(*x.shape[:-1], out_features, dtype=dtype)
    if tokens:
        tile, split_k = choose_tile(library, x.dtype, out_features, in_features, tokens, num_sms_of(x.device.index))
        library.linear(
            tile,
            split_k,
            _aligned(x).view(tokens, in_features),
            values,
            metadata,
            None if bias is None else _aligned(bias),
            y.view(tokens, out_features),
            workspace(x.device.index),
            None if x_scales is None or scales is None else (_aligned(scales), _aligned(x_scales).flatten()),
        )
    return y


_library.impl("sparse24_linear.cutlass", _linear, "CUDA")


@torch.library.register_fake("ria::sparse24_linear.cutlass")
def _fake_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    x_scales: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0], dtype=dtype or x.dtype)


@lru_cache
def workspaces(device_index: int) -> tuple[torch.Tensor, ...]:
    """The device's workspaces, uint8; zero, as the kernels' counters must be."""
    device = torch.device("cuda", device_index)
    return torch.zeros(STREAMS, WORKSPACE_BYTES, dtype=torch.uint8, device=device).unbind()


def workspace(device_index: int) -> torch.Tensor:
    """That of the device's current stream. A new stream gets the one that was not used for longest."""
    stream, used = torch.cuda.current_stream(device_index).cuda_stream, _used.setdefault(device_index, {})
    if stream in used:
        number = used.pop(stream)
    else:
        number = len(used) if len(used) < STREAMS else used.pop(next(iter(used)))
    used[stream] = number
    return workspaces(device_index)[number]


def round_tokens(x: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] as it is multiplied by 8-bit `values` [N, K/2], in their dtype, and the scale of each token, float32
    [...].

    int8 values may have more columns: x gets zeros there.
    """
    if values.dtype == FP8_DTYPE:
        return quantize_fp8(x)
    integers, scales = quantize_tokens(x)
    integers, padding = integers.to(torch.int8), 2 * values.shape[1] - x.shape[-1]
    if padding:  # else it would copy
        integers = torch.nn.functional.pad(integers, (0, padding))
    return integers, scales.squeeze(-1)


def product(x: torch.Tensor, packed: Sequence[torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times what `CutlassKernel.pack` returned, and a bias [N] or None; [..., N], in x's dtype."""
    values, metadata, *scales = packed
    if not scales:
        return torch.ops.ria.sparse24_linear.cutlass(x, values, metadata, bias)
    quantized, x_scales = round_tokens(x, values)
    return torch.ops.ria.sparse24_linear.cutlass(quantized, values, metadata, bias, x_scales, *scales, x.dtype)


class CutlassKernel:
    """See `LinearKernel`. With fp8 weights, each token of x is rounded to fp8 too, with a scale of its own."""

    name: ClassVar[str] = "cutlass"
    is_fallback: ClassVar[bool] = False

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the layer is on {device.type}"
        if torch.version.hip:
            return "ROCm has no such kernel"
        try:
            library_of(_index(device))
        except RiaError as error:
            return str(error)
        return None

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        operands = {(FLOAT, None): config.act_dtype, (FP8, None): FP8_DTYPE, (INT8, torch.int8): torch.int8}
        dtype = operands.get((config.weight_format, config.input_dtype))
        if dtype is None:
            return no_such_product(config)
        if config.act_dtype not in (torch.bfloat16, torch.float16):
            return f"dtype {name_of(config.act_dtype)}; bfloat16 and float16 only"
        if config.out_features % 8:
            return f"out-features {config.out_features} are not a multiple of 8 (rows of 16 bytes)"
        if config.in_features % 64:
            return f"in-features {config.in_features} are not a multiple of 64"
        index, in_features = _index(config.device), config.in_features
        if dtype == torch.int8:
            in_features += -in_features % _INT8_COLUMNS
        try:
            choose_tile(library_of(index), dtype, config.out_features, in_features, 1, num_sms_of(index))
        except RiaError as error:
            return str(error)
        return None

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """(values [out, in/2], metadata uint8[, scales float32 [out]]), on the GPU; one pass over the bitmask.

        int8 values are padded with zeros to a multiple of 64 columns.
        """
        values, bitmask = parts["compressed"], parts["bitmask"]
        library = library_of(values.device.index)
        # Here, so that no capture of a CUDA graph allocates them; and cleared again, because vLLM's sleep mode may have
        # lost their contents.
        for one in workspaces(values.device.index):
            one[:COUNTER_BYTES].zero_()
        metadata = library.pack_metadata(bitmask, values.itemsize * 8)
        padding = -values.shape[1] % (_INT8_COLUMNS // 2) if config.weight_format == INT8 else 0
        scales = (parts["weight_scale"].flatten().clone(),) if config.weight_format != FLOAT else ()
        if padding:
            return torch.nn.functional.pad(values, (0, padding)), metadata, *scales
        return values.clone(memory_format=torch.contiguous_format), metadata, *scales

    @staticmethod
    def apply(
        config: LinearLayerConfig,
        x: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if input_permutation is not None:
            x = x.index_select(-1, input_permutation)
        return product(x, packed, bias)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
