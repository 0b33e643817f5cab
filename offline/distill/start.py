"""The 2:4 checkpoint that training starts from: one of our own. See `foreign` for others."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint import Reader
from ria_vllm.schema import RiaSchema
from ria_vllm.sparse_linear import SparseLinear


class Start:
    """A folder that ria-vllm wrote.

    Attributes:
        files: tensor name -> file.
        linears: the names of pruned linears, in the order of the files.
        others: the names of all other tensors -> how to read them.
        config: config.json.
        schema: its quantization_config.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.reader = Reader(folder)
        self.files = self.reader.files
        self.config: dict[str, Any] = self.reader.config
        self.schema: RiaSchema = self.reader.schema
        self.linears: list[str] = self.reader.sparse_names
        self.others: Mapping[str, torch.Tensor] = Tensors(self.reader.dense_names, self.reader.tensor)

    def linear(self, name: str) -> SparseLinear:
        """One pruned linear, checked."""
        return self.reader.linear(name)

    def dense_names(self) -> list[str]:
        """The names of the dense model's tensors."""
        return list(self.reader.dense_tensors())

    def state(self) -> dict[str, torch.Tensor] | None:
        """All tensors of the dense model, if transformers cannot read the folder by itself."""
        return None

    def report(self) -> dict[str, Any]:
        """What `compress` measured."""
        return self.reader.report()


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]):
        self.read, self.names = read, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
