"""The weights of a layer's experts in the model's files: where they are, one by one or stacked, and how one is read."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter
from transformers.pytorch_utils import Conv1D

from ria_vllm.errors import RiaError
from ria_vllm.hf.experts_layout import ExpertsLayout, experts_modules
from ria_vllm.offline.model.files.source_tensors import SourceTensors

if TYPE_CHECKING:
    from ria_vllm.offline.model.run.names import Names

# An expert's number is the last but one part of the name of its linear.
_NUMBERED = re.compile(r"(?P<experts>.+)\.(?P<expert>[0-9]{1,9})\.(?P<leaf>[^.]+)\.weight")


@dataclass(frozen=True)
class ExpertFiles:
    """The tensors of one layer's experts.

    layout: of the module in transformers.
    module: what a checkpoint calls the experts; their linears are `{module}.{expert}.{leaf}`.
    leaves: kind of linear -> the last part of its name.
    stacked: parameter of the module -> the tensor in the files that holds it; empty if the experts are apart there.
    transposed: the stacked tensors are [experts, in, out].
    biases: parameter -> the tensor in the files with its biases.
    """

    layout: ExpertsLayout
    module: str
    leaves: Mapping[str, str]
    stacked: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    biases: Mapping[str, str] = field(default_factory=dict)

    def linear(self, expert: int, kind: str) -> str:
        """The written name of an expert's linear."""
        return f"{self.module}.{expert}.{self.leaves[kind]}"

    def linears_of(self, kinds: Sequence[str]) -> list[str]:
        """The written names of the linears of these kinds, expert by expert."""
        return [self.linear(expert, kind) for expert in range(self.layout.num_experts) for kind in kinds]

    @property
    def linears(self) -> list[str]:
        return self.linears_of(self.layout.kinds)

    @property
    def in_stack(self) -> dict[str, list[str]]:
        """Stacked tensor -> the written names of all linears in it."""
        parameters = self.layout.parameters
        return {tensor: self.linears_of(parameters[parameter]) for parameter, tensor in self.stacked.items()}

    @property
    def sources(self) -> list[str]:
        """The written names of the tensors that hold the weights."""
        return list(self.stacked.values()) or [f"{linear}.weight" for linear in self.linears]


class _NotApart(Exception):
    """Why experts cannot be read one by one."""


class ExpertWeights:
    """The experts of all decoder layers, which are read one at a time.

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
        RiaError: the files have other experts than config.json asks for, or of other shapes.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        layers_path: str,
        width: int,
        names: "Names",
        tensors: SourceTensors,
    ):
        self.names, self.tensors, self.folder = names, tensors, names.folder
        self.experts: list[dict[str, ExpertFiles]] = []
        self.dense: list[dict[str, str]] = []
        self.parameters: set[str] = set()
        self._checked: set[str] = set()  # what is known to be finite
        for index, layer in enumerate(layers):
            self.experts.append({})
            self.dense.append(other_experts(layer, width))
            for path, layout in experts_modules(layer).items():
                prefix = f"{layers_path}.{index}.{path}."
                try:
                    self.experts[index][path] = self._find(prefix, layout)
                    self.parameters |= {prefix + name for name in layout.parameters}
                except _NotApart as error:
                    self.dense[index][path] = str(error)

    def read(self, index: int, path: str, expert: int) -> dict[str, torch.Tensor]:
        """One expert of layer `index`: linear ("gate", "up", "down") -> [out, in] on the CPU, stored or dequantized.

        Args:
            path: of the experts, relative to the layer; one of `experts[index]`.

        Raises:
            RiaError: NaN or infinite values, or a dtype as in a quantized model.
        """
        files = self.experts[index][path]
        layout = files.layout
        if not files.stacked:
            return {kind: self._read(f"{files.linear(expert, kind)}.weight") for kind in layout.kinds}
        weights: dict[str, torch.Tensor] = {}
        for parameter, written in files.stacked.items():
            part = self._read(written, expert)
            weights |= layout.parted(part.T if files.transposed != layout.transposed else part, parameter)
        return weights

    def _read(self, written: str, expert: int | None = None) -> torch.Tensor:
        key, tensor = f"{written} {expert}", self.tensors.read(written, expert)
        if key not in self._checked:
            self.tensors.check_values(written, tensor, floating=True)
            self._checked.add(key)
        return tensor

    def _find(self, prefix: str, layout: ExpertsLayout) -> ExpertFiles:
        """Where the experts whose parameters' names begin with `prefix` are.

        Raises:
            _NotApart: they cannot be read one by one.
        """
        sources = {name: self._sources(prefix + name) for name in layout.parameters}
        if any(len(found) != 1 or _NUMBERED.fullmatch(found[0]) for found in sources.values()):
            if layout.has_bias:
                raise _NotApart("the files have them apart, with biases")
            return self._apart(layout, sources)
        stacked = {name: found[0] for name, found in sources.items()}
        transposed = {self._is_transposed(layout, name, tensor) for name, tensor in stacked.items()}
        if None in transposed or len(transposed) != 1:
            raise _NotApart("the files have them stacked in an unknown way")
        module = next(iter(stacked.values())).removesuffix(".weight").rpartition(".")[0]
        module = module if module.rpartition(".")[2] == "experts" else f"{module}.experts"
        leaves = {kind: f"{kind}_proj" for kind in layout.kinds}
        direct = self.names.direct
        biases = {name: direct[bias] for name in layout.parameters if (bias := f"{prefix}{name}_bias") in direct}
        return ExpertFiles(layout, module, leaves, stacked, bool(transposed.pop()), biases)

    def _sources(self, inside: str) -> list[str]:
        """The tensors in the files from which a parameter of the model is made."""
        if inside in self.names.direct:
            return [self.names.direct[inside]]
        return self.names.made_of.get(inside, [])

    def _is_transposed(self, layout: ExpertsLayout, parameter: str, tensor: str) -> bool | None:
        """Whether a stacked tensor in the files is [experts, in, out]; None: it is stored in an unknown way."""
        if tensor not in self.names.converted:
            return layout.transposed
        converter, _ = self.names.converted[tensor]
        if [type(operation) for operation in converter.operations] != [Transpose]:
            return None
        operation: Any = converter.operations[0]
        if {operation.dim0, operation.dim1} != {1, 2}:
            return None
        experts, *wanted = layout.stacked_shape(parameter)
        found = self.tensors.shape(tensor)
        if operation.check_dims and found == (experts, *wanted):  # so transformers leaves it as it is
            return layout.transposed
        self.tensors.check_shape(tensor, found, (experts, *reversed(wanted)))
        return not layout.transposed

    def _apart(self, layout: ExpertsLayout, sources: Mapping[str, Sequence[str]]) -> ExpertFiles:
        unknown = _NotApart("the files have them apart in an unknown way")
        modules: set[str] = set()
        leaves: dict[str, str] = {}
        present: set[tuple[int, str]] = set()
        for parameter, found in sources.items():
            kinds = layout.parameters[parameter]
            for written in found:
                converter, number = self.names.converted.get(written, (None, 0))
                match = _NUMBERED.fullmatch(written)
                if converter is None or match is None or not _stacks(converter, len(kinds)):
                    raise unknown
                kind = kinds[number]
                if leaves.setdefault(kind, match["leaf"]) != match["leaf"]:
                    raise unknown
                modules.add(match["experts"])
                present.add((int(match["expert"]), kind))
        if len(modules) != 1 or layout.interleaved or layout.transposed:
            raise unknown
        leaves = {kind: leaves.get(kind, f"{kind}_proj") for kind in layout.kinds}
        files = ExpertFiles(layout, modules.pop(), leaves)
        wanted = {(expert, kind) for expert in range(layout.num_experts) for kind in layout.kinds}
        if present != wanted:
            expert, kind = min(present ^ wanted)
            has = "have" if (expert, kind) in present else "do not have"
            raise RiaError(
                f"{self.folder}: config.json says that {files.module} has {layout.num_experts} experts, but the files "
                f"{has} {files.linear(expert, kind)}. Get the model again."
            )
        for expert, kind in sorted(wanted):
            written = f"{files.linear(expert, kind)}.weight"
            self.tensors.check_shape(written, self.tensors.shape(written), layout.shape(kind))
        return files


def _stacks(converter: WeightConverter, linears: int) -> bool:
    """Whether a conversion stacks the experts, and the linears of each one below each other."""
    operations: list[Any] = converter.operations
    dims = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    wanted = [(MergeModulelist, 0), (Concatenate, 1)] if linears > 1 else [(MergeModulelist, 0)]
    return dims == wanted and len(converter.source_patterns) == linears


def other_experts(layer: nn.Module, width: int) -> dict[str, str]:
    """Modules that hold experts in some other way, and so stay dense: path relative to the layer -> why.

    Args:
        width: of the residual stream.
    """
    known = experts_modules(layer)
    return {
        path: f"transformers' {type(module).__name__} does not run its experts one by one"
        for path, module in layer.named_modules()
        if path not in known and other_weights(module, width)
    }


def other_weights(module: nn.Module, width: int) -> list[nn.Parameter]:
    """The module's own weights, if it is none of those that everything knows, such as nn.Linear.

    A router's weights and those of Mamba's scan are fewer than `width` * `width`, and do not count.
    """
    if isinstance(module, nn.Linear | nn.Embedding | _ConvNd | Conv1D):
        return []
    return [p for p in module.parameters(recurse=False) if p.dim() in (2, 3) and p.numel() >= width * width]
