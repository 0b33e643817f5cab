"""The product on CPUs: our own C++ kernels (csrc), the instruction set chosen at run time.

`RIA_VLLM_CPU_ISA` forces a lower set: avx512_bf16, avx512, avx2 or portable.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from ria_vllm import sparse24
from ria_vllm.errors import RiaError

NAME = "cpu"

_LIBRARY = Path(__file__).with_name("_cpu.so")


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not _LIBRARY.exists():
        return None, f"{_LIBRARY.name} was not built; install the package with pip on a machine with g++"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return None, f"{_LIBRARY.name} does not load into torch {torch.__version__}: {error}"
    library = ctypes.CDLL(str(_LIBRARY))
    library.ria_cpu_instruction_set.restype = ctypes.c_char_p
    return library, None


_library, _load_error = _load()

if _library is not None:

    @torch.library.register_fake("ria::sparse24_linear.cpu")
    def _fake_linear(x, packed, out_features, input_permutation, bias):
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("ria::sparse24_pack.cpu")
    def _fake_pack(compressed, bitmask, scales):
        return bitmask.new_empty(packed_bytes(compressed.shape[0], compressed.shape[1] * 2, compressed.dtype))


def packed_bytes(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Size of the packed form: 9 bits a weight at 16 bits and 5 at 8, rows rounded up to 16, plus a cache line."""
    rows = -(-out_features // 16) * 16
    scales = 4 * rows if dtype == torch.int8 else 0
    return 64 + rows * in_features * (4 * dtype.itemsize + 1) // 8 + scales


def instruction_set() -> str:
    """Name of the instruction set in use.

    Raises:
        RiaError: the library is missing, or RIA_VLLM_CPU_ISA names a set that this machine does not have.
    """
    if _library is None:
        raise RiaError(_load_error)
    available = ctypes.c_int()
    answer = _library.ria_cpu_instruction_set(ctypes.byref(available)).decode()
    if not available.value:
        raise RiaError(answer)
    return answer


def unavailable(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> str | None:
    """Why this backend cannot serve a layer, or None."""
    if device.type != "cpu":
        return f"the layer is on {device.type}"
    if dtype not in (*sparse24.VALUE_DTYPES, torch.int8):
        return f"no 2:4 weights of dtype {dtype}"
    if in_features % sparse24.IN_FEATURES_MULTIPLE:
        return f"in-features {in_features} are not a multiple of {sparse24.IN_FEATURES_MULTIPLE}"
    try:
        instruction_set()
    except RiaError as error:
        return str(error)
    return None


def pack(
    compressed: torch.Tensor, bitmask: torch.Tensor, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Repack from the checkpoint's form (compressed [out, in/2], bitmask [out, in/8]) to one uint8 stream.

    Args:
        scales: float32 [out], for int8 values and only for them.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or a group keeps other than two values (row and columns named).
    """
    scales = None if scales is None else scales.contiguous()
    return (torch.ops.ria.sparse24_pack.cpu(compressed.contiguous(), bitmask.contiguous(), scales),)


def apply(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    out_features: int,
    input_permutation: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y[..., out] = x[..., p] @ stored^T + bias, accumulated in fp32, in x's dtype: the weights', bfloat16 for int8."""
    return torch.ops.ria.sparse24_linear.cpu(x, packed[0], out_features, input_permutation, bias)
