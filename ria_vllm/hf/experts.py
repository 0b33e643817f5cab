"""In transformers, an experts module has the weights of all experts in one tensor: made here from pruned linears."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema
from ria_vllm.hf.experts_layout import layout_of
from ria_vllm.hf.placement import Placement

# (the names in the checkpoint of a linear's tensors, the tensors by the last part of their names) -> dense [out, in].
Decoded = Callable[[Collection[str], Mapping[str, torch.Tensor]], torch.Tensor]


class StackExperts(ConversionOps):
    """The tensors of all experts' linears -> one parameter of the experts module, in the module's own layout.

    Args:
        kinds: last part of a linear's name -> "gate", "up" or "down".
        decoded: makes one linear dense.
        failed: told of an error, which transformers would bury in a table.
        placements: gets, under the parameter's name, what it holds.
    """

    def __init__(
        self,
        kinds: Mapping[str, str],
        decoded: Decoded,
        failed: Callable[[RiaError], None],
        placements: dict[str, Placement],
    ):
        self.kinds, self.decoded, self.failed, self.placements = kinds, decoded, failed, placements
        self.sources: dict[str, list[str]] = {}  # pattern -> names in the checkpoint, in the order of their tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> "StackExperts":
        return StackExperts(self.kinds, self.decoded, self.failed, self.placements)

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        path, parameter = full_layer_name.rsplit(".", 1)
        try:
            placement, stored = self._found(input_dict, model.get_submodule(path), parameter)
            stacked = placement.join(lambda name: self._dense(name, stored.pop(name)))
            self.placements[full_layer_name] = placement
        except RiaError as error:
            self.failed(error)
            stacked = torch.empty(0)
        return {full_layer_name: stacked}

    def _found(
        self, found: Mapping[str, list[torch.Tensor]], module: nn.Module, parameter: str
    ) -> tuple[Placement, dict[str, dict[str, torch.Tensor]]]:
        """What the parameter holds, and linear -> its tensors by the last part of their names."""
        stored: dict[str, dict[str, torch.Tensor]] = {}
        names: dict[tuple[int, str], str] = {}
        for pattern, tensors in found.items():
            for source, tensor in zip(self.sources[pattern], tensors, strict=True):
                name, _, part = source.rpartition(".")
                _, number, leaf = name.rsplit(".", 2)
                stored.setdefault(name, {})[part] = tensor
                names[int(number), self.kinds[leaf]] = name
        layout, place = layout_of(module), f"{next(iter(stored))} and others"
        if layout is None:
            raise RiaError(
                f"{place}: {type(module).__name__} holds its experts in a way that ria-vllm does not know. "
                "`ria-vllm export` writes a dense folder, which transformers may be able to read."
            )
        kinds = layout.parameters.get(parameter, ())
        if names.keys() != {(expert, kind) for expert in range(layout.num_experts) for kind in kinds}:
            raise RiaError(
                f"{place}: {len(names)} linears of experts are stored, but {type(module).__name__} has "
                f"{layout.num_experts} experts. Get all files of one model."
            )
        experts = tuple(tuple(names[expert, kind] for kind in kinds) for expert in range(layout.num_experts))
        return Placement(experts, True, layout.interleaved, layout.transposed), stored

    def _dense(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.decoded([f"{name}.{part}" for part in tensors], tensors)


class ExpertsConverter(WeightConverter):
    """transformers copies this for each parameter and gives the copy the tensors that the parameter is made of."""

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.operations[0].sources.setdefault(source_pattern, []).append(source_key)


def expert_converters(
    schema: RiaSchema, decoded: Decoded, failed: Callable[[RiaError], None], placements: dict[str, Placement]
) -> list[WeightConverter]:
    """The conversions for the experts that the schema names. See `StackExperts` for the arguments."""
    found: dict[tuple[str, str], WeightConverter] = {}
    for experts in schema.experts:
        kinds = {pattern.rpartition(".")[2]: kind for kind, pattern in experts.linears.items()}
        module = experts.module.rpartition(".")[2]
        if not all(name.isidentifier() and name.isascii() for name in (module, *kinds)):
            continue  # transformers would take it for a pattern; what stays unused is an error later
        for parameter in ("gate_up_proj" if experts.gate else "up_proj", "down_proj"):
            wanted = {leaf: kind for leaf, kind in kinds.items() if (kind == "down") == (parameter == "down_proj")}
            sources = [rf"\.{module}\.[0-9]+\.{leaf}\.{part}$" for leaf in wanted for part in schema.tensor_names]
            key = (module, ",".join(sources))
            found.setdefault(
                key,
                ExpertsConverter(
                    sources, f".{module}.{parameter}", [StackExperts(wanted, decoded, failed, placements)]
                ),
            )
    return list(found.values())
