"""The linear on NVIDIA GPUs by the cuSPARSELt that torch contains. Needs no compiler."""

from collections.abc import Sequence

import torch

from ria_vllm import sparse24

NAME = "cusparselt"

_MULTIPLE_TOKENS = 8  # cuSPARSELt requires rows and columns of a multiple of 16 bytes
_MULTIPLE_FEATURES = 16

_library = torch.library.Library("ria", "FRAGMENT")
_library.define("sparse24_linear.cusparselt(Tensor x, Tensor packed, int out_features, Tensor? bias) -> Tensor")


def _linear(x: torch.Tensor, packed: torch.Tensor, out_features: int, bias: torch.Tensor | None) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -tokens % _MULTIPLE_TOKENS)).contiguous()
    y = torch._cslt_sparse_mm(packed, flat.t(), bias=bias, transpose_result=True)
    return y[:tokens].reshape(*x.shape[:-1], out_features).contiguous()


_library.impl("sparse24_linear.cusparselt", _linear, "CUDA")


@torch.library.register_fake("ria::sparse24_linear.cusparselt")
def _fake_linear(x, packed, out_features, bias):
    return x.new_empty(*x.shape[:-1], out_features)


def unavailable(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if device.type != "cuda":
        return f"the layer is on {device.type}"
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} comes without cuSPARSELt"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}; bfloat16 and float16 only"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor}; sparse tensor cores begin with 8.0"
    for name, size in (("out", out_features), ("in", in_features)):
        if size % _MULTIPLE_FEATURES:
            return f"{name}-features {size} are not a multiple of {_MULTIPLE_FEATURES}"
    return None


def pack(compressed: torch.Tensor, bitmask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """cuSPARSELt's own form. It is made from a dense matrix, which exists during this call only."""
    return (torch._cslt_compress(sparse24.decompress(compressed, bitmask)),)


def apply(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    out_features: int,
    input_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y[..., out] = x[..., p] @ stored^T + bias, accumulated in fp32, in x's dtype."""
    if input_permutation is not None:
        x = x.index_select(-1, input_permutation)
    return torch.ops.ria.sparse24_linear.cusparselt(x, packed[0], out_features, bias)
