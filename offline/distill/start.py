"""The 2:4 folder that training starts from: one that ria-vllm wrote, or another program's (see `foreign`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.checkpoint.reader import Reader
from ria_vllm.checkpoint.sparse_linear import SparseLinear
from ria_vllm.format.schema import RiaSchema


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]):
        self.read, self.names = read, dict.fromkeys(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Start:
    """What training needs of the folder.

    linears: the names of pruned linears, in the order of the files. linear: reads one of them, checked.
    others: the names of all other tensors -> how to read them.
    dense_names: of the dense model's tensors.
    config: config.json. schema: its quantization_config.
    report: what `compress` measured.
    needs_state: transformers cannot read the folder by itself.
    """

    folder: Path
    linears: list[str]
    linear: Callable[[str], SparseLinear]
    others: Mapping[str, torch.Tensor]
    dense_names: list[str]
    config: dict[str, Any]
    schema: RiaSchema
    report: dict[str, Any]
    needs_state: bool = False

    def state(self) -> dict[str, torch.Tensor] | None:
        """All tensors of the dense model, if transformers must be given them."""
        if not self.needs_state:
            return None
        return {f"{name}.weight": self.linear(name).dense() for name in self.linears} | dict(self.others)


def own_start(folder: Path) -> Start:
    """From a folder that ria-vllm wrote.

    Raises:
        RiaError: it is damaged.
    """
    reader = Reader(folder)
    return Start(
        folder=folder,
        linears=reader.sparse_names,
        linear=reader.linear,
        others=Tensors(reader.dense_names, reader.tensor),
        dense_names=list(reader.dense_tensors()),
        config=reader.config,
        schema=reader.schema,
        report=reader.report(),
    )
