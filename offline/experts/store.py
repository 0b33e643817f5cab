"""The experts of a layer. Pruned ones are in the work folder, each a unit of its own, so that a run can be resumed in
the middle of a layer."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ria_vllm.checkpoint.writer import CheckpointWriter, disk_errors
from ria_vllm.hf.experts_layout import ExpertsLayout
from ria_vllm.offline.experts.routing import RoutedTokens
from ria_vllm.offline.model.experts.files import ExpertFiles
from ria_vllm.offline.model.run.streaming import StreamedModel
from ria_vllm.offline.recipe import Recipe
from ria_vllm.offline.stored_layers import layer_key, linear_tensors, pruned_weights
from ria_vllm.offline.sublayer.pruned_linear import Pruned


@dataclass(frozen=True)
class ExpertStore:
    """Where a run keeps its pruned experts. An expert is named by its layer, the path of its module and its number.

    The experts of the current layer are also kept as dense matrices in files: every chunk of the calibration tokens
    needs them, and decoding takes longer than multiplying.
    """

    model: StreamedModel
    writer: CheckpointWriter
    recipe: Recipe

    def of(self, index: int, path: str) -> "RoutedExperts":
        """The experts of the module at `path` in layer `index`."""
        return RoutedExperts(self.model, self.writer, self.recipe, index, path)

    def forget_dense(self) -> None:
        """Remove the dense matrices, those of a finished layer or of an interrupted run."""
        folder = _dense_folder(self.writer)
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)

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


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of one module: those of the model's files, and what has become of them.

    path: of the module in layer `index`.
    routed: what they read, once they are to be pruned.
    kept: they have the pattern already, and keep their masks.
    """

    model: StreamedModel
    writer: CheckpointWriter
    recipe: Recipe
    index: int
    path: str
    routed: RoutedTokens | None = None
    kept: bool = False

    @property
    def files(self) -> ExpertFiles:
        return self.model.experts[self.index][self.path]

    @property
    def layout(self) -> ExpertsLayout:
        return self.files.layout

    @property
    def module(self) -> nn.Module:
        """Of transformers; its weights are nowhere as a whole."""
        return self.model.layers[self.index].get_submodule(self.path)

    @property
    def tokens(self) -> RoutedTokens:
        assert self.routed is not None
        return self.routed

    def names(self, expert: int) -> dict[str, str]:
        """Linear ("gate", "up", "down") -> its written name."""
        return {kind: self.files.linear(expert, kind) for kind in self.layout.kinds}

    def place(self, name: str) -> str:
        """What an error about the linear with this written name begins with."""
        return f"{self.model.folder}: {name}"

    def dense(self, expert: int) -> Mapping[str, torch.Tensor]:
        """Linear -> weight [out, in] as in the model's files, on the device in the dtype of the computations."""
        return self.model.from_files(self.index, self.path)(expert)

    def has(self, expert: int) -> bool:
        return self.writer.has(_key(self.index, self.path, expert))

    def permutation(self, search: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """The permutation that the experts share.

        It is kept, because another search could find another one: on another machine, for example, or with more
        threads.

        Args:
            search: finds it, if it is not yet there.

        Returns:
            int64 [width] on the CPU; None for the model's own order.
        """
        key = _key(self.index, self.path, "permutation")
        if self.writer.has(key):
            return self.writer.read(key)[0].get("permutation")
        p = search()
        self.writer.write(key, {} if p is None else {"permutation": p})
        return p

    def write(self, expert: int, pruned: Mapping[str, Pruned]) -> None:
        """Keep one expert.

        Args:
            pruned: written name -> pruned linear.
        """
        key = _key(self.index, self.path, expert)
        self._keep_dense(key, {name: linear.weight for name, linear in pruned.items()})
        records = {name: linear.record for name, linear in pruned.items()}
        self.writer.write(key, linear_tensors(pruned, self.recipe), records)

    def weights(self, expert: int) -> dict[str, torch.Tensor]:
        """Linear ("gate", "up", "down") -> weight [out, in] of one expert in the model's own order, on the CPU."""
        key, names = _key(self.index, self.path, expert), self.names(expert)
        if not self._dense(key).is_file():
            stored = self.writer.read(key)[0]
            self._keep_dense(key, pruned_weights(stored, list(names.values()), self.model.stored_dtype, self.recipe))
        found = load_file(self._dense(key))
        return {kind: found[name] for kind, name in names.items()}

    def _keep_dense(self, key: str, weights: Mapping[str, torch.Tensor]) -> None:
        path = self._dense(key)
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: weight.contiguous() for name, weight in weights.items()}, path)

    def _dense(self, key: str) -> Path:
        return _dense_folder(self.writer) / f"{key}.safetensors"


def _dense_folder(writer: CheckpointWriter) -> Path:
    return writer.work / "dense-experts"


def _key(index: int, path: str, what: int | str) -> str:
    """The unit of one expert of the module at `path`, by its number, or of something that they share."""
    what = f"{what:05d}" if isinstance(what, int) else what
    return f"{layer_key(index)}-{path.replace('.', '-')}-{what}"
