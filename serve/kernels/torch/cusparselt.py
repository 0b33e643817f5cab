"""The linear on NVIDIA GPUs by the cuSPARSELt that torch contains. Needs no compiler."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT8
from ria_vllm.format.token_rounding import quantize_tokens
from ria_vllm.format.weight_format import name_of
from ria_vllm.serve.kernels.base import LinearLayerConfig, no_such_product

_MULTIPLE_TOKENS = 8  # cuSPARSELt requires rows and columns of a multiple of 16 bytes
_MULTIPLE_FEATURES = 16  # and these of the sparse matrix; both are twice as large for int8
_ALIGNMENT = 16  # bytes, of every pointer

_library = torch.library.Library("ria", "FRAGMENT")
_library.define("sparse24_linear.cusparselt(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor")


def _linear(x: torch.Tensor, packed: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    """y [..., out], in x's dtype; the sums in int32 if x is int8, which takes no bias."""
    flat = x.reshape(-1, x.shape[-1])
    tokens, is_int8 = flat.shape[0], x.dtype == torch.int8
    if tokens == 0:
        return _fake_linear(x, packed, out_features, bias)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -tokens % (_MULTIPLE_TOKENS << is_int8))).contiguous()
    if bias is not None and (bias.data_ptr() % _ALIGNMENT or not bias.is_contiguous()):
        bias = bias.clone(memory_format=torch.contiguous_format)
    out_dtype = torch.int32 if is_int8 else None
    y = torch._cslt_sparse_mm(packed, flat.t(), bias=bias, out_dtype=out_dtype, transpose_result=True)
    return y[:tokens].reshape(*x.shape[:-1], out_features).contiguous()


_library.impl("sparse24_linear.cusparselt", _linear, "CUDA")


@torch.library.register_fake("ria::sparse24_linear.cusparselt")
def _fake_linear(x: torch.Tensor, packed: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features, dtype=torch.int32 if x.dtype == torch.int8 else x.dtype)


class CusparseltKernel:
    """See `LinearKernel`. Sums of int8 leave the library as int32; torch scales them."""

    name: ClassVar[str] = "cusparselt"
    is_fallback: ClassVar[bool] = False

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the layer is on {device.type}"
        if not torch.backends.cusparselt.is_available():
            return f"torch {torch.__version__} comes without cuSPARSELt"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"compute capability {major}.{minor}; sparse tensor cores begin with 8.0"
        return None

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        if (config.weight_format, config.input_dtype) not in ((FLOAT, None), (INT8, torch.int8)):
            return no_such_product(config)
        if config.act_dtype not in (torch.bfloat16, torch.float16):
            return f"dtype {name_of(config.act_dtype)}; bfloat16 and float16 only"
        multiple = _MULTIPLE_FEATURES << (config.weight_format == INT8)
        for name, size in (("out", config.out_features), ("in", config.in_features)):
            if size % multiple:
                return f"{name}-features {size} are not a multiple of {multiple}"
        return None

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """cuSPARSELt's own form, and the scales of int8, float32 [out]. The former is made from a dense matrix, which
        exists during this call only."""
        scales = (parts["weight_scale"].flatten().clone(),) if config.weight_format == INT8 else ()
        return torch._cslt_compress(sparse24.decompress(parts["compressed"], parts["bitmask"])), *scales

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
        linear = torch.ops.ria.sparse24_linear.cusparselt
        if config.input_dtype is None:
            return linear(x, packed[0], config.out_features, bias)
        integers, x_scales = quantize_tokens(x)
        sums = linear(integers.to(torch.int8), packed[0], config.out_features, None)
        y = sums.float().mul_(packed[1]).mul_(x_scales)
        return (y if bias is None else y + bias.float()).to(x.dtype)
