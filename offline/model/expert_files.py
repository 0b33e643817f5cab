"""Where the files have the weights of a layer's experts, one by one or stacked, and what a checkpoint calls them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from ria_vllm.errors import RiaError
from ria_vllm.offline.model.experts import KINDS, ExpertsLayout
from ria_vllm.offline.model.names import Names

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

    @property
    def linears(self) -> list[str]:
        return [self.linear(expert, kind) for expert in range(self.layout.num_experts) for kind in self.layout.kinds]

    @property
    def in_stack(self) -> dict[str, list[str]]:
        """Stacked tensor -> the written names of all linears in it."""
        experts, parameters = range(self.layout.num_experts), self.layout.parameters
        return {
            tensor: [self.linear(expert, kind) for expert in experts for kind in parameters[parameter]]
            for parameter, tensor in self.stacked.items()
        }

    @property
    def sources(self) -> list[str]:
        """The written names of the tensors that hold the weights."""
        return list(self.stacked.values()) or [f"{linear}.weight" for linear in self.linears]


def find_expert_files(
    names: Names, prefix: str, layout: ExpertsLayout, shapes: Mapping[str, Sequence[int]], folder: Path
) -> ExpertFiles | str:
    """The files' tensors of the experts of one layer.

    Args:
        prefix: of the layer's names in the model, with the dot.
        shapes: written name -> shape, for the tensors that could be meant.

    Returns:
        These, or why the experts cannot be read one by one.

    Raises:
        RiaError: an expert is missing, or one has another shape than config.json asks for.
    """
    parameters = {name: f"{prefix}{layout.path}.{name}" for name in layout.parameters}
    biases = {name: names.direct.get(f"{full}_bias") for name, full in parameters.items()}
    sources = {name: _sources(names, full) for name, full in parameters.items()}
    if all(len(found) == 1 and not _NUMBERED.fullmatch(found[0]) for found in sources.values()):
        stacked = {name: found[0] for name, found in sources.items()}
        transposed = {_is_transposed(names, name, stacked[name], layout, shapes, folder) for name in stacked}
        if None in transposed or len(transposed) != 1:
            return "the files have them stacked in an unknown way"
        module = next(iter(stacked.values())).removesuffix(".weight").rpartition(".")[0]
        module = module if module.rpartition(".")[2] == "experts" else f"{module}.experts"
        leaves = {kind: f"{kind}_proj" for kind in layout.kinds}
        found = {name: bias for name, bias in biases.items() if bias is not None}
        return ExpertFiles(layout, module, leaves, stacked, transposed.pop() or False, found)
    if layout.has_bias:
        return "the files have them apart, with biases"
    return _apart(names, layout, sources, shapes, folder)


def _sources(names: Names, inside: str) -> list[str]:
    if inside in names.direct:
        return [names.direct[inside]]
    return names.made_of.get(inside, [])


def _is_transposed(
    names: Names,
    parameter: str,
    tensor: str,
    layout: ExpertsLayout,
    shapes: Mapping[str, Sequence[int]],
    folder: Path,
) -> bool | None:
    """Whether a stacked tensor in the files is [experts, in, out]; None: it is stored in an unknown way.

    Raises:
        RiaError: transformers would transpose it into another shape than config.json asks for.
    """
    converter = names.converter_of(tensor)
    if converter is None:
        return layout.transposed
    rows = layout.inner * len(layout.first) if parameter != "down_proj" else layout.width
    columns = layout.width if parameter != "down_proj" else layout.inner
    wanted = [rows, columns] if not layout.transposed else [columns, rows]
    operations = converter.operations
    if len(operations) != 1 or not isinstance(operations[0], Transpose):
        return None
    operation = operations[0]
    if {operation.dim0, operation.dim1} != {1, 2}:
        return None
    found, as_module = list(shapes[tensor]), [layout.num_experts, *wanted]
    if operation.check_dims and found == as_module:
        return layout.transposed
    if found != [layout.num_experts, *reversed(wanted)]:
        raise RiaError(
            f"{folder}: {tensor} has shape {tuple(found)}, config.json asks for {tuple(as_module)} or its transpose. "
            "Get the model again."
        )
    return not layout.transposed


def _apart(
    names: Names,
    layout: ExpertsLayout,
    sources: Mapping[str, Sequence[str]],
    shapes: Mapping[str, Sequence[int]],
    folder: Path,
) -> ExpertFiles | str:
    unknown = "the files have them apart in an unknown way"
    modules: set[str] = set()
    leaves: dict[str, str] = {}
    present: dict[str, set[int]] = {}
    for parameter, found in sources.items():
        kinds = layout.parameters[parameter]
        for written in found:
            converter, match = names.converter_of(written), _NUMBERED.fullmatch(written)
            if converter is None or match is None or not _stacks(converter, len(kinds)):
                return unknown
            kind = kinds[names.source_number(written)]
            if leaves.setdefault(kind, match["leaf"]) != match["leaf"]:
                return unknown
            modules.add(match["experts"])
            present.setdefault(kind, set()).add(int(match["expert"]))
    if len(modules) != 1 or layout.interleaved or layout.transposed:
        return unknown
    files = ExpertFiles(layout, modules.pop(), {kind: leaves.get(kind, f"{kind}_proj") for kind in KINDS})
    for kind in layout.kinds:
        wanted = set(range(layout.num_experts))
        if wanted - present.get(kind, set()):
            missing = files.linear(min(wanted - present.get(kind, set())), kind)
            raise RiaError(f"{folder}: no weights for {missing} in any file. Get the model again.")
        if present[kind] - wanted:
            extra = files.linear(min(present[kind] - wanted), kind)
            raise RiaError(
                f"{folder}: {extra} is in the files, but config.json says that there are {layout.num_experts} experts. "
                "Get the model again."
            )
        for expert in range(layout.num_experts):
            written = f"{files.linear(expert, kind)}.weight"
            if tuple(shapes[written]) != layout.shape(kind):
                raise RiaError(
                    f"{folder}: {written} has shape {tuple(shapes[written])}, config.json asks for "
                    f"{layout.shape(kind)}. Get the model again."
                )
    return files


def _stacks(converter: WeightConverter, linears: int) -> bool:
    """Whether a conversion stacks the experts, and the linears of each one below each other."""
    operations: list[Any] = converter.operations
    merges = bool(operations) and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
    if linears == 1:
        return merges and len(operations) == 1 and len(converter.source_patterns) == 1
    joins = len(operations) == 2 and isinstance(operations[1], Concatenate) and operations[1].dim == 1
    return merges and joins and len(converter.source_patterns) == linears
