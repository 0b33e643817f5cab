"""Reads the weights of a model's routed experts from its files, one expert at a time."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ria_vllm.offline.model.expert_files import ExpertFiles, find_expert_files
from ria_vllm.offline.model.experts import experts_modules, other_experts
from ria_vllm.offline.model.names import Names
from ria_vllm.offline.model.source_tensors import SourceTensors
from ria_vllm.offline.model.tensors import check_values


class ExpertWeights:
    """The experts of all decoder layers.

    Args:
        layers: their weights may be on the meta device.
        layers_path: of the list of these layers in the model.
        width: of the residual stream.
        names: of the tensors in the folder.
        tensors: reads them.

    Attributes:
        experts: for each layer, path of experts relative to it -> where they are in the files.
        dense: for each layer, path of experts that cannot be read one by one -> why.
        parameters: the parameters of `experts`, by their names in the model.

    Raises:
        RiaError: an expert is missing in the files, or has another shape than config.json asks for.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        layers_path: str,
        width: int,
        names: Names,
        tensors: SourceTensors,
        folder: Path,
    ):
        self.names, self.tensors = names, tensors
        self.experts: list[dict[str, ExpertFiles]] = []
        self.dense: list[dict[str, str]] = []
        self.parameters: set[str] = set()
        self._checked: set[str] = set()  # what is known to be finite
        for index, layer in enumerate(layers):
            prefix = f"{layers_path}.{index}."
            self.experts.append({})
            self.dense.append(other_experts(layer, width))
            for path, layout in experts_modules(layer).items():
                found = find_expert_files(names, prefix, layout, self._shapes(f"{prefix}{path}."), folder)
                if isinstance(found, str):
                    self.dense[index][path] = found
                    continue
                self.experts[index][path] = found
                self.parameters |= {f"{prefix}{path}.{name}" for name in layout.parameters}

    def read(self, index: int, path: str, expert: int) -> dict[str, torch.Tensor]:
        """One expert of layer `index`: linear ("gate", "up", "down") -> [out, in] on the CPU, stored or dequantized.

        Args:
            path: of the experts, relative to the layer; one of `experts[index]`.

        Raises:
            RiaError: NaN or infinite values, or a dtype as in a quantized model.
        """
        files = self.experts[index][path]
        layout = files.layout
        weights: dict[str, torch.Tensor] = {}
        for kind in () if files.stacked else layout.kinds:
            written = f"{files.linear(expert, kind)}.weight"
            weights[kind] = self._read(written)
            self._check(written, written, weights[kind])
        for parameter, written in files.stacked.items():
            part = self._read(written, expert)
            self._check(f"{written} {expert}", written, part)
            as_module = part.T if files.transposed != layout.transposed else part
            weights |= layout.parted(as_module, parameter)
        return weights

    def _read(self, written: str, index: int | None = None) -> torch.Tensor:
        return self.tensors.read(self.names.files[written], index)

    def _check(self, key: str, written: str, tensor: torch.Tensor) -> None:
        if key not in self._checked:
            check_values(self._file_of(written), written, tensor, floating=True)
            self._checked.add(key)

    def _file_of(self, written: str) -> Path:
        return self.tensors.files[self.names.files[written]]

    def _shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors from which the parameters under `prefix` are made, by their written names."""
        names = self.names
        found = {names.files[written]: written for written, at in names.inside.items() if at.startswith(prefix)}
        return {found[name]: shape for name, shape in self.tensors.shapes(found)}
