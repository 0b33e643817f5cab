"""Pruned experts in the work folder, each a unit of its own, so that a run can be resumed in the middle of a layer."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ria_vllm.checkpoint.writer import CheckpointWriter, disk_errors
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.offline.stored_layers import layer_key, linear_tensors, pruned_weights
from ria_vllm.offline.sublayer.pruned_linear import Pruned


@dataclass(frozen=True)
class ExpertStore:
    """Where a run keeps its pruned experts. An expert is named by its layer, the path of its module and its number.

    The experts of the current layer are also kept as dense matrices in files of each rank: every chunk of the
    calibration tokens needs them, and decoding takes longer than multiplying.
    """

    model: StreamedModel
    writer: CheckpointWriter
    recipe: Recipe
    ranks: Ranks

    def has(self, index: int, path: str, expert: int) -> bool:
        return self.writer.has(_key(index, path, expert))

    def order(self, index: int, path: str, search: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The order that the experts of one place share.

        It is kept, because another search could find another one: on another machine, for example, or with more
        threads.

        Args:
            search: finds it, if it is not yet there; all ranks take part.

        Returns:
            int64 [width] on the CPU; None for the model's own order.
        """
        key = _key(index, path, "order")
        if self.ranks.broadcast(self.writer.has(key)):
            return self.ranks.broadcast(self.writer.read(key)[0].get("order") if self.ranks.first else None)
        order = search()
        if self.ranks.first:
            self.writer.write(key, {} if order is None else {"order": order})
        return order

    def write(self, index: int, path: str, expert: int, pruned: Mapping[str, Pruned]) -> None:
        """Keep one expert. Only the first rank writes what stays.

        Args:
            pruned: written name -> pruned linear.
        """
        key = _key(index, path, expert)
        self._keep_dense(key, {name: linear.weight for name, linear in pruned.items()})
        if self.ranks.first:
            records = {name: linear.record for name, linear in pruned.items()}
            self.writer.write(key, linear_tensors(pruned, self.recipe), records)

    def weights(self, index: int, path: str, expert: int) -> dict[str, torch.Tensor]:
        """Linear ("gate", "up", "down") -> weight [out, in] of one expert in the model's own order, on the CPU."""
        key, files = _key(index, path, expert), self.model.experts[index][path]
        names = {kind: files.linear(expert, kind) for kind in files.layout.kinds}
        if not self._dense(key).is_file():
            stored = self.writer.read(key)[0]
            self._keep_dense(key, pruned_weights(stored, list(names.values()), self.model.stored_dtype, self.recipe))
        found = load_file(self._dense(key))
        return {kind: found[name] for kind, name in names.items()}

    def forget_dense(self) -> None:
        """Remove this rank's dense matrices, those of a finished layer or of an interrupted run."""
        with disk_errors(self._folder):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _keep_dense(self, key: str, weights: Mapping[str, torch.Tensor]) -> None:
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous() for name, weight in weights.items()}, self._dense(key))

    @property
    def _folder(self) -> Path:
        return self.writer.work / f"experts-{self.ranks.rank}"

    def _dense(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def keys(self, index: int, paths: Iterable[str]) -> list[str]:
        """The units of the experts of one layer."""
        return [
            _key(index, path, expert)
            for path in sorted(paths)
            for expert in range(self.model.experts[index][path].layout.num_experts)
        ]

    def records(self, index: int, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of the report for the experts of one layer, by their written names."""
        return {name: record for key in self.keys(index, paths) for name, record in self.writer.record(key).items()}


def _key(index: int, path: str, what: int | str) -> str:
    """The unit of one expert of the module at `path`, by its number, or of something that they share."""
    what = f"{what:05d}" if isinstance(what, int) else what
    return f"{layer_key(index)}-{path.replace('.', '-')}-{what}"
