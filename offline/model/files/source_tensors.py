"""The tensors of a dense model, read from its files one by one. The only place where quantized ones are dequantized."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ria_vllm.errors import RiaError
from ria_vllm.files.json_file import read_json
from ria_vllm.files.open_files import OpenFiles
from ria_vllm.offline.model.files.compressed_tensors import CompressedTensors, StoredLinear
from ria_vllm.offline.model.files.dequantize import Dequantized, Fp8, Mxfp4, Scheme, find_quantized, scheme_of
from ria_vllm.offline.model.files.tensors import MOST_BYTES, Header, each_in_its_file, opened, reading
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
        self.files = files
        if self.scheme is not None:
            headers = {
                name: Header(part.get_dtype(), tuple(part.get_shape()), files[name])
                for name, file in each_in_its_file(files)
                for part in [file.get_slice(name)]
            }
            self.quantized, unused = find_quantized(self.scheme, headers)
            unused = unused.union(*(one.parts for one in self.quantized.values()))
            plain = {name: path for name, path in files.items() if name not in unused}
            self.files = plain | {name: files[one.values] for name, one in self.quantized.items()}
        self.dtype = self._largest() if dtype is None else dtype

    def read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """One tensor or, of a stack, its part with this index, on the CPU. It is not mapped from its file.

        Of one that is not quantized, `index` may also be some rows.

        Raises:
            RiaError: the file cannot be read, or a scale is no number.
        """
        found = self.quantized.get(name)
        if found is None:
            return self._read(name, index)
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

    def close(self) -> None:
        """Close all files: what was read of an open one counts as memory of the process."""
        self._open.close()

    def shapes(self, names: Iterable[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each name with the shape of its tensor, from the headers."""
        names = list(names)
        yield from ((name, self.quantized[name].shape) for name in names if name in self.quantized)
        for name, file in each_in_its_file({name: self.files[name] for name in names if name not in self.quantized}):
            yield name, tuple(file.get_slice(name).get_shape())

    def _read(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        with reading(self._where[name]):
            return self._open.read(self._where[name], name, index)

    def _largest(self) -> torch.dtype:
        sizes = {name: math.prod(shape) for name, shape in self.shapes(self.files.keys() - self.quantized.keys())}
        largest = max(sorted(sizes), key=sizes.__getitem__)
        with opened(self.files[largest]) as file:
            return file.get_tensor(largest).dtype
