"""The compiled CUDA libraries as Python objects: ctypes over the C functions of csrc/library.cu."""

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

from ria_vllm.errors import RiaError
from ria_vllm.serve.kernels.cuda.architectures import for_capability

LIBRARY_FOLDER_VARIABLE = "RIA_VLLM_CUDA_FOLDER"

# (dtype of x and W, dtype of y): its number in csrc/interface.h.
DATA_TYPES = {
    (torch.bfloat16, torch.bfloat16): 0,
    (torch.float16, torch.float16): 1,
    (torch.float8_e4m3fn, torch.bfloat16): 2,
    (torch.float8_e4m3fn, torch.float16): 3,
    (torch.int8, torch.bfloat16): 4,
    (torch.int8, torch.float16): 5,
}
# For questions that the output's dtype does not change.
_BY_OPERANDS = {operands: code for (operands, _), code in reversed(DATA_TYPES.items())}

_RESULTS = {
    1: "bad argument (a null or misaligned pointer, or a size that is not positive)",
    2: "this tile cannot compute a product of these sizes",
    3: "the workspace is too small",
}
_CUDA_ERROR = 4  # ria_last_error() has the text

# As in csrc/library.cu. A library with another version was built from other sources.
_ABI_VERSION = 4

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "ria_abi_version": (_INT, []),
    "ria_last_error": (ctypes.c_char_p, []),
    "ria_family": (_INT, []),
    "ria_num_tiles": (_INT, []),
    "ria_tile_name": (ctypes.c_char_p, [_INT]),
    "ria_metadata_bytes": (_LONG, [_INT] * 3),
    "ria_metadata_offset": (_LONG, [_INT] * 5),
    "ria_pack_metadata_host": (_INT, [_INT] + [_POINTER] * 2 + [_INT] * 2),
    "ria_pack_metadata": (_INT, [_INT] + [_POINTER] * 2 + [_INT] * 3 + [_POINTER]),
    "ria_can_implement": (_INT, [_INT] * 7),
    "ria_workspace_bytes": (_LONG, [_INT] * 7),
    "ria_linear": (_INT, [_INT] * 8 + [_POINTER] * 8 + [_LONG, _POINTER]),
}


class CudaLibrary:
    """One loaded library. `sizes` are (out_features, in_features) of the layer; `tile` is an index into `tile_names`.

    `split_k` says how K is divided among thread blocks: a number of parts, or one of the constants of tiles.py.
    """

    def __init__(self, path: Path):
        self.path = path
        self._c = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        if self._c.ria_abi_version() != _ABI_VERSION:
            raise OSError("built from another version of these sources; run `ria-vllm build-kernels` again")
        self.family: int = self._c.ria_family()
        self.tile_names: list[str] = [self._c.ria_tile_name(i).decode() for i in range(self._c.ria_num_tiles())]

    def metadata_bytes(self, out_features: int, in_features: int, value_bits: int = 16) -> int:
        """Size of the metadata for values of 16 or 8 bits; -1 if there is no such layout."""
        return self._c.ria_metadata_bytes(value_bits, out_features, in_features)

    def metadata_offset(
        self, out_features: int, in_features: int, row: int, byte_column: int, value_bits: int = 16
    ) -> int:
        """Byte offset of the metadata of `row`, columns 8 * byte_column and the next seven; -1 outside the matrix."""
        return self._c.ria_metadata_offset(value_bits, out_features, in_features, row, byte_column)

    def pack_metadata(self, bitmask: torch.Tensor, value_bits: int = 16) -> torch.Tensor:
        """uint8 metadata from bitmask [out, in/8], on the bitmask's device, which may be a CPU.

        Args:
            value_bits: bits of the values that the metadata belongs to: 16 for bf16 and fp16, 8 for fp8 and int8.

        Raises:
            RiaError: there is no layout for such a matrix or such values.
        """
        bitmask = bitmask.contiguous()
        out_features, in_features = bitmask.shape[0], bitmask.shape[1] * 8
        size = self.metadata_bytes(out_features, in_features, value_bits)
        if size < 0:
            raise RiaError(
                f"{self.path.name}: cannot lay out the metadata of a {out_features} x {in_features} matrix of "
                f"{value_bits}-bit values"
            )
        metadata = torch.empty(size, dtype=torch.uint8, device=bitmask.device)
        arguments = value_bits, bitmask.data_ptr(), metadata.data_ptr(), out_features, in_features
        if bitmask.is_cuda:
            stream = torch.cuda.current_stream(bitmask.device).cuda_stream
            self._check(self._c.ria_pack_metadata(*arguments, bitmask.device.index, stream))
        else:
            self._check(self._c.ria_pack_metadata_host(*arguments))
        return metadata

    def can_implement(
        self, tile: int, dtype: torch.dtype, sizes: tuple[int, int], tokens: int, split_k: int, num_sms: int
    ) -> bool:
        """Whether the tile can compute a product of these sizes with x and W in `dtype`."""
        return bool(self._c.ria_can_implement(tile, _BY_OPERANDS[dtype], *sizes, tokens, split_k, num_sms))

    def workspace_bytes(
        self, tile: int, dtype: torch.dtype, sizes: tuple[int, int], tokens: int, split_k: int, num_sms: int
    ) -> int:
        """Size of the workspace that the tile needs for such a product; -1 if the arguments make no sense."""
        return self._c.ria_workspace_bytes(tile, _BY_OPERANDS[dtype], *sizes, tokens, split_k, num_sms)

    def linear(  # noqa: PLR0913  # what the compiled function takes
        self,
        tile: int,
        split_k: int,
        x: torch.Tensor,
        values: torch.Tensor,
        metadata: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        workspace: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """y [tokens, out] = x [tokens, in] @ W^T + bias, on the current stream of x's device.

        All tensors are contiguous and aligned to 16 bytes.

        Args:
            bias: [out], in y's dtype.
            y: in x's dtype; bfloat16 or float16 if x and values are float8_e4m3fn or int8.
            scales: float32 [out] of W's rows and [tokens] of the tokens, if x and values have 8 bits, else None.

        Raises:
            RiaError: the library refused, or the launch failed.
        """
        tokens, in_features = x.shape
        num_sms, device, stream = self._place(x)
        code = self._c.ria_linear(
            tile,
            DATA_TYPES[x.dtype, y.dtype],
            y.shape[1],
            in_features,
            tokens,
            split_k,
            num_sms,
            device,
            x.data_ptr(),
            values.data_ptr(),
            metadata.data_ptr(),
            *((None, None) if scales is None else (tensor.data_ptr() for tensor in scales)),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            stream,
        )
        if code:
            name = self.tile_names[tile]
            self._check(code, f"tile {name}, {y.shape[1]} x {in_features}, {tokens} tokens: ")

    def _place(self, x: torch.Tensor) -> tuple[int, int, int | None]:
        """Number of SMs, index and current stream of the device that x is on."""
        return num_sms_of(x.device.index), x.device.index, torch.cuda.current_stream(x.device).cuda_stream

    def _check(self, code: int, where: str = "") -> None:
        if code == _CUDA_ERROR:
            raise RiaError(f"{self.path.name}: {where}CUDA refused: {self._c.ria_last_error().decode()}")
        if code:
            raise RiaError(f"{self.path.name}: {where}{_RESULTS.get(code, f'error {code}')}")


def library_folder() -> Path:
    """The folder of the libraries: RIA_VLLM_CUDA_FOLDER, or that of this file."""
    return Path(os.environ.get(LIBRARY_FOLDER_VARIABLE) or Path(__file__).parent)


@lru_cache
def load(path: Path) -> CudaLibrary:
    """The library at `path`, loaded once.

    Raises:
        RiaError: it is missing or does not load.
    """
    if not path.exists():
        arch = path.stem.removeprefix("_cuda_sm")
        raise RiaError(f"{path.name} was not built; run `ria-vllm build-kernels --arch {arch}`")
    try:
        return CudaLibrary(path)
    except (OSError, AttributeError) as error:  # AttributeError: a library of older sources lacks a function
        raise RiaError(f"{path} does not load: {error}") from error


@lru_cache
def library_of(device_index: int) -> CudaLibrary:
    """The library for a GPU.

    Raises:
        RiaError: there are no kernels for its architecture, or they were not built.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    target = for_capability(major, minor)
    if target is None:
        raise RiaError(f"no kernels for compute capability {major}.{minor}")
    return load(library_folder() / target.library)


@lru_cache
def num_sms_of(device_index: int) -> int:
    """Number of streaming multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count
