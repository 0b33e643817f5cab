"""The header of a GGUF file: its keys, and which tensors it lists."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError

ROPE_FACTORS = "rope_freqs.weight"
# One of the two is used, by the length of the context.
LONG_ROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its tensors.

    architecture: llama.cpp's name for it; "" if the file names none.
    keys: key -> number, text or list of numbers; those of the architecture without its name in front. Without what the
        file says about itself and its tokenizer.
    tensors: name -> number of elements.
    rope_factors: float32 [n], by which the frequencies of rotary embeddings are divided; None: the file has none.
    """

    path: Path
    architecture: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, int]
    rope_factors: torch.Tensor | None = None

    def number(self, key: str, default: float = 0.0) -> float:
        """A key's number.

        Raises:
            RiaError: it is none.
        """
        value = self.keys.get(key, default)
        if not isinstance(value, int | float):
            raise RiaError(f"{self.path}: {self.full(key)} in its header is not a number.")
        return float(value)

    def full(self, key: str) -> str:
        """The key as it is in the file."""
        return key if key.startswith("split.") else f"{self.architecture}.{key}"


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ImportError: the package gguf is not installed.
        Exception: what that package raises about a damaged file.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    name = reader.fields.get("general.architecture")
    architecture = "" if name is None else str(_value(name))
    keys = {}
    for key, field in reader.fields.items():
        if key.startswith("split."):
            keys[key] = _value(field)
        elif architecture and key.startswith(f"{architecture}."):
            keys[key.removeprefix(f"{architecture}.")] = _value(field)
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    found = [dequantize(one.data, one.tensor_type) for one in reader.tensors if one.name == ROPE_FACTORS]
    factors = torch.tensor(found[0]).flatten() if found else None
    return Header(path, architecture, keys, sizes, factors)


def _value(field: Any) -> Any:
    kind, *of_items = (one.name for one in field.types)
    if kind == "ARRAY":
        return [] if of_items[-1:] == ["STRING"] else [field.parts[index].tolist()[0] for index in field.data]
    return bytes(field.parts[-1]).decode() if kind == "STRING" else field.parts[-1].tolist()[0]
