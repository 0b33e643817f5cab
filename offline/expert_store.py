"""Pruned experts in the work folder, each a unit of its own, so that a run can be resumed in the middle of a layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ria_vllm.offline.model.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.solve import Pruned
from ria_vllm.offline.units import expert_key, linear_tensors, pruned_weights
from ria_vllm.writer import CheckpointWriter


@dataclass(frozen=True)
class ExpertStore:
    """Where a run keeps its pruned experts. An expert is named by its layer, the path of its module and its number.

    writes: whether this rank is the one that writes.
    """

    model: StreamedModel
    writer: CheckpointWriter
    recipe: Recipe
    writes: bool

    def has(self, index: int, path: str, expert: int) -> bool:
        return self.writer.has(expert_key(index, path, expert))

    def write(self, index: int, path: str, expert: int, pruned: Mapping[str, Pruned]) -> None:
        """Keep one expert.

        Args:
            pruned: written name -> pruned linear.
        """
        if self.writes:
            records = {name: linear.record for name, linear in pruned.items()}
            self.writer.write(expert_key(index, path, expert), linear_tensors(pruned, self.recipe), records)

    def weights(self, index: int, path: str, expert: int, names: list[str]) -> dict[str, torch.Tensor]:
        """Written name -> weight [out, in] of one expert in the model's own order, on the CPU."""
        tensors, _ = self.writer.read(expert_key(index, path, expert))
        return pruned_weights(tensors, names, self.model.stored_dtype, self.recipe)

    def keys(self, index: int, paths: Iterable[str]) -> list[str]:
        """The units of the experts of one layer."""
        return [
            expert_key(index, path, expert)
            for path in sorted(paths)
            for expert in range(self.model.experts[index][path].layout.num_experts)
        ]

    def written(self, index: int, paths: Iterable[str]) -> list[str]:
        """The units with the tensors of one layer's experts as the checkpoint has them.

        These are the experts. If no kernel serves the pattern, the checkpoint is dense, and what the files stack is
        stacked here, one tensor in memory at a time.
        """
        keys = []
        for path in sorted(paths):
            stacks = {} if self.recipe.served else self.model.experts[index][path].stacked
            if not stacks:
                keys += self.keys(index, [path])
            for parameter, tensor in stacks.items():
                keys.append(f"{expert_key(index, path, 0)}-{parameter}")
                self.writer.write(keys[-1], {tensor: self._stacked(index, path, parameter)})
        return keys

    def _stacked(self, index: int, path: str, parameter: str) -> torch.Tensor:
        files = self.model.experts[index][path]
        layout, kinds = files.layout, files.layout.parameters[parameter]
        stacked: list[torch.Tensor] = []
        for expert in range(layout.num_experts):
            names = [files.linear(expert, kind) for kind in kinds]
            found = self.weights(index, path, expert, names)
            rows = torch.stack([found[n] for n in names], 1).flatten(0, 1) if layout.interleaved else None
            rows = torch.cat([found[n] for n in names]) if rows is None else rows
            stacked.append(rows.T if files.transposed else rows)
        return torch.stack(stacked)

    def records(self, index: int, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The records of the report for the experts of one layer, by their written names."""
        return {name: record for key in self.keys(index, paths) for name, record in self.writer.record(key).items()}
