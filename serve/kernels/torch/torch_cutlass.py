"""The product on Ampere and Ada through the sparse CUTLASS kernel inside torch. Needs no compiler.

It writes y^T, so each call ends with a transposition; our own kernels (cutlass.py) do not.
"""

from collections.abc import Sequence

import torch

NAME = "torch_cutlass"

_MULTIPLE_TOKENS = 8
_MULTIPLE_OUT, _MULTIPLE_IN = 32, 64

_library = torch.library.Library("ria", "FRAGMENT")
_library.define("sparse24_linear.torch_cutlass(Tensor x, Tensor values, Tensor metadata, Tensor? bias) -> Tensor")


def _linear(
    x: torch.Tensor, values: torch.Tensor, metadata: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    tokens, out_features = flat.shape[0], values.shape[0]
    if tokens == 0:
        return x.new_empty(*x.shape[:-1], out_features)
    columns = torch.nn.functional.pad(flat, (0, 0, 0, -tokens % _MULTIPLE_TOKENS)).contiguous().t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, metadata, columns)
    else:
        y = torch._sparse_semi_structured_addmm(bias, values, metadata, columns)
    return y[:, :tokens].t().contiguous().view(*x.shape[:-1], out_features)


_library.impl("sparse24_linear.torch_cutlass", _linear, "CUDA")


@torch.library.register_fake("ria::sparse24_linear.torch_cutlass")
def _fake_linear(x, values, metadata, bias):
    return x.new_empty(*x.shape[:-1], values.shape[0])


def unavailable(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if device.type != "cuda":
        return f"the layer is on {device.type}"
    if torch.version.hip:
        return "ROCm has no such kernel"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}; bfloat16 and float16 only"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 8:
        return f"compute capability {major}.{minor}; torch compiles this kernel for 8.x only"
    if out_features % _MULTIPLE_OUT:
        return f"out-features {out_features} are not a multiple of {_MULTIPLE_OUT}"
    if in_features % _MULTIPLE_IN:
        return f"in-features {in_features} are not a multiple of {_MULTIPLE_IN}"
    return None


def pack(compressed: torch.Tensor, bitmask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(values [out, in/2], metadata int16 [out, in/16]) in mma.sp's order; out must be a multiple of 32.

    Each group of four gives its two kept indices, two bits each, the smaller one low; four groups make an element.
    Rows of each 32 are dealt out (row 8a + b to place 4b + a), 2 x 2 blocks of elements transposed, and the columns
    interleaved by two.
    """
    rows, elements = bitmask.shape[0], bitmask.shape[1] // 2
    table = torch.tensor([_byte_of(mask) for mask in range(256)], dtype=torch.uint8, device=bitmask.device)
    metadata = table[bitmask.long()].view(torch.int16)
    blocks = metadata.view(rows // 32, 4, 8, elements).transpose(1, 2).reshape(rows // 2, 2, elements // 2, 2)
    interleaved = blocks.permute(2, 0, 3, 1).contiguous()
    return compressed.clone(memory_format=torch.contiguous_format), interleaved.view(rows, elements)


def _byte_of(mask: int) -> int:
    halves = []
    for group in (mask & 15, mask >> 4):
        kept = [i for i in range(4) if group >> i & 1]
        # Anything but two kept cannot come from a valid checkpoint: "the first two", which is legal for the hardware.
        halves.append(kept[0] | kept[1] << 2 if len(kept) == 2 else 0b0100)
    return halves[0] | halves[1] << 4


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
    values, metadata = packed
    return torch.ops.ria.sparse24_linear.torch_cutlass(x, values, metadata, bias)
