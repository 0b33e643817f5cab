"""The product on CPUs: our own C++ kernels (csrc), the instruction set chosen at run time.

`RIA_VLLM_CPU_ISA` forces a lower set: amx, avx512_bf16, avx512_vnni, avx512, avx_vnni, avx2 or portable.
"""

import ctypes
import os
from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import ClassVar

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, INT4, INT8, IntFormat
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat, name_of
from ria_vllm.serve.kernels.base import ExpertsLayerConfig, LinearLayerConfig

INSTRUCTION_SET_VARIABLE = "RIA_VLLM_CPU_ISA"
"""Names the instruction set that the kernels use."""

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
    try:
        library.ria_cpu_ask_for_huge_pages.argtypes = ctypes.c_void_p, ctypes.c_int64
        library.ria_cpu_ask_for_huge_pages.restype = None
    except AttributeError:
        return None, f"{_LIBRARY.name} was built from other sources; install the package again"
    return library, None


_library, _load_error = _load()
LOADED = _library is not None
"""Whether the operators exist."""

if LOADED:

    @torch.library.register_fake("ria::sparse24_linear.cpu")
    def _fake_linear(x: torch.Tensor, packed: object, out_features: int, *_: object) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], out_features)

    @torch.library.register_fake("ria::int8_rows_linear.cpu")
    def _fake_int8_rows(x: torch.Tensor, integers: torch.Tensor, *_: object) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], integers.shape[0])


def multiply_int8_rows(
    x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [..., in] times the matrix of `ria_vllm.format.int8_rows`, [..., out] in x's dtype.

    Inputs are rounded to two int8 numbers with a scale each, the second of which holds what the first one leaves: they
    are off by at most a 64,000th of a token's largest.

    Args:
        integers: int8 [out, in], contiguous; in is a multiple of 64.
        scales: float32 [out, 1].
        bias: [out], of x's dtype.
    """
    return torch.ops.ria.int8_rows_linear.cpu(x, integers, scales, bias)


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Have the memory of a large tensor on the CPU in pages of 2 MB, if the system grants them.

    To be called before anything is written to it. Every token reads a whole weight, and memory in pages of 4 kB gives
    one thread a quarter less.
    """
    assert _library is not None
    _library.ria_cpu_ask_for_huge_pages(tensor.data_ptr(), tensor.nbytes)


MAX_INT8_COLUMNS = 131_072
"""Of a weight whose inputs are rounded to int8. Sums of more could leave 32 bits."""


def unsupported(config: LinearLayerConfig | ExpertsLayerConfig) -> str | None:
    """Why no product here takes these weights and activations, or None."""
    weight_format, act_dtype, input_dtype = config.weight_format, config.act_dtype, config.input_dtype
    if input_dtype not in (None, torch.int8) or (input_dtype and weight_format == FLOAT):
        return f"no {name_of(input_dtype)} inputs with {weight_format.name} weights"
    if weight_format != FLOAT and not isinstance(weight_format, IntFormat):
        return f"no {weight_format.name} weights; {FLOAT.name}, {INT8.name} and {INT4.name} only"
    groups_of_int8 = isinstance(weight_format, IntFormat) and weight_format.num_bits == 8 and weight_format.group_size
    if input_dtype and groups_of_int8:
        return f"no int8 inputs with {weight_format.name} weights; with {INT8.name}, which has a scale per row"
    if act_dtype not in sparse24.VALUE_DTYPES:
        return f"dtype {name_of(act_dtype)}; {', '.join(map(name_of, sparse24.VALUE_DTYPES))} only"
    return None


def activation_arguments(config: LinearLayerConfig | ExpertsLayerConfig) -> tuple[bool, int]:
    """Whether inputs are rounded, and the columns half of which are kept, as these operators take them."""
    return config.input_dtype == torch.int8, 4 if config.pattern == TWO_OF_FOUR else 16


def packing_arguments(
    weight_format: WeightFormat, parts: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
    """`compressed`, `bitmask`, scales and group size (0: rows) as the operators that pack take them.

    Scales are [..., out] of rows, [..., out, in / group_size] of groups, None if the format has none.
    """
    group_size, scales = weight_format.group_size or 0, parts.get("weight_scale")
    if scales is not None:
        scales = (scales if group_size else scales.squeeze(-1)).contiguous()
    return parts["compressed"].contiguous(), parts["bitmask"].contiguous(), scales, group_size


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


def check_forced_instruction_set() -> None:
    """Check RIA_VLLM_CPU_ISA, if it is set, before another kernel serves a layer because this one cannot.

    Raises:
        RiaError: it names an instruction set that does not exist or that this machine does not have.
    """
    if LOADED and os.environ.get(INSTRUCTION_SET_VARIABLE):
        instruction_set()


class CpuKernel:
    """See `LinearKernel`. int8 and int4 weights take activations of any dtype."""

    name: ClassVar[str] = "cpu"
    is_fallback: ClassVar[bool] = False
    patterns: ClassVar[tuple[Pattern, ...]] = tuple(PATTERNS.values())

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the layer is on {device.type}"
        try:
            instruction_set()
        except RiaError as error:
            return str(error)
        return None

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        multiple = lcm(sparse24.IN_FEATURES_MULTIPLE, config.group_size or 1)
        if config.in_features % multiple:
            return f"in-features {config.in_features} are not a multiple of {multiple}"
        if config.input_dtype is not None and config.in_features > MAX_INT8_COLUMNS:
            return f"in-features {config.in_features} with inputs rounded to int8; at most {MAX_INT8_COLUMNS}"
        return unsupported(config)

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One uint8 stream, see csrc/layout.h.

        Raises:
            RuntimeError: shapes or dtypes do not fit, or a group does not keep exactly half of its values; it is named.
        """
        arguments = packing_arguments(config.weight_format, parts)
        return (torch.ops.ria.sparse24_pack.cpu(*arguments, *activation_arguments(config)),)

    @staticmethod
    def apply(
        config: LinearLayerConfig,
        x: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.ria.sparse24_linear.cpu(x, packed[0], config.out_features, input_permutation, bias)
