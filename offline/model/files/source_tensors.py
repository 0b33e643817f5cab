"""The tensors of a dense model, read from its files one by one, and checked. The only place where quantized ones are
dequantized."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.offline.model.files.compressed_tensors import CompressedTensors, StoredLinear
from ria_vllm.offline.model.files.dequantize import Dequantized, Fp8, Mxfp4, Scheme, find_quantized, scheme_of
from ria_vllm.offline.model.files.tensors import MOST_BYTES, check_values, headers_of, reading
from ria_vllm.offline.model.files.which_weights import find_tensors


class SourceTensors:
    """Every tensor under the name that it has in an unquantized model.

    Args:
        folder: a Hugging Face folder with safetensors. Its config.json says how the weights are quantized, if they are.
        dtype: of the weights, as config.json names it; None: it names none.

    Attributes:
        files: name -> file; of a quantized weight, the file with its values.
        quantized: the weights that are dequantized as they are read.
        scheme: how they are quantized; None: there are none.
        dtype: `dtype` or, for None, that of the largest tensor that is not quantized. Quantized weights get it.

    Raises:
        RiaError: a damaged folder, weights quantized in an unknown way, or values and scales that do not go together.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None):
        files = find_tensors(folder)
        self.scheme: Scheme | None = scheme_of(read_json(folder / "config.json").get("quantization_config"), folder)
        self.quantized: dict[str, Dequantized] = {}
        self._where, self._open = files, OpenFiles(MOST_BYTES)
        self._headers = {name: header for path in dict.fromkeys(files.values()) for name, header in headers_of(path)}
        self._stored: Mapping[str, str] = {}  # other names -> those in the files
        self.files = files
        if self.scheme is not None:
            self.quantized, unused = find_quantized(self.scheme, self._headers)
            unused = unused.union(*(one.parts for one in self.quantized.values()))
            plain = {name: path for name, path in files.items() if name not in unused}
            self.files = plain | {name: files[one.values] for name, one in self.quantized.items()}
        self.dtype = self._largest() if dtype is None else dtype

    def renamed(self, names: Mapping[str, str]) -> "SourceTensors":
        """The same tensors under other names.

        Args:
            names: other name -> the one here.
        """
        found = copy.copy(self)
        found._stored = names
        found.files = {name: self.files[own] for name, own in names.items()}
        found.quantized = {name: self.quantized[own] for name, own in names.items() if own in self.quantized}
        return found

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """One tensor or, of a stack, its part with this index, on the CPU. It is not mapped from its file.

        Of one that is not quantized, `index` may also be some rows.

        Raises:
            RiaError: the file cannot be read, or a scale is no number.
        """
        found = self.quantized.get(name)
        if found is None:
            return self._read(self._stored.get(name, name), index)
        if isinstance(found, StoredLinear):
            assert isinstance(self.scheme, CompressedTensors)
            return self.scheme.dequantized(found, self._read, self.dtype)
        if index is None and len(found.shape) == 3:
            stack = torch.empty(found.shape, dtype=self.dtype)
            for number in range(len(stack)):
                stack[number] = self.read(name, number)
            return stack
        assert isinstance(self.scheme, Mxfp4 | Fp8)
        scales = self._read(found.scales, index)
        if self.scheme.is_damaged(scales):
            raise RiaError(
                f"{self._where[found.scales]}: {found.scales}: NaN or infinite values in the scales of {name}. Get the "
                "model again."
            )
        return self.scheme.dequantized(self._read(found.values, index), scales, self.dtype)

    def each(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name, file by file. No file is left open, and so mapped."""
        try:
            for name in sorted(names, key=self.files.__getitem__):
                yield name, self.read(name)
        finally:
            self.close()

    def close(self) -> None:
        """Close all files: what was read of an open one counts as memory of the process."""
        self._open.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """That of a tensor, from its header."""
        found = self.quantized.get(name)
        return self._headers[self._stored.get(name, name)].shape if found is None else found.shape

    def check_shape(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
        """Refuse a tensor of another shape than the model's.

        Raises:
            RiaError: it is.
        """
        if tuple(found) != tuple(wanted):
            raise RiaError(
                f"{self.files[name]}: {name} has shape {tuple(found)}, config.json asks for {tuple(wanted)}. Get the "
                "model again."
            )

    def check_values(self, name: str, tensor: torch.Tensor, floating: bool) -> None:
        """See `tensors.check_values`."""
        check_values(self.files[name], name, tensor, floating)

    def _read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        with reading(self._where[name]):
            return self._open.read(self._where[name], name, index)

    def _largest(self) -> torch.dtype:
        sizes = {name: math.prod(self.shape(name)) for name in self.files.keys() - self.quantized.keys()}
        largest = max(sorted(sizes), key=sizes.__getitem__)
        return self._read(largest, slice(1) if self.shape(largest) else None).dtype
