"""In transformers, an experts module has the weights of all experts in one tensor: made here from pruned linears."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ria_vllm.errors import RiaError
from ria_vllm.schema import RiaSchema

# (the names in the checkpoint of a linear's tensors, the tensors by the last part of their names) -> dense [out, in].
Decoded = Callable[[Collection[str], Mapping[str, torch.Tensor]], torch.Tensor]


class StackExperts(ConversionOps):
    """The tensors of all experts' linears -> one parameter of the experts module, in the module's own layout.

    Args:
        kinds: last part of a linear's name -> "gate", "up" or "down".
        decoded: makes one linear dense.
        failed: told of an error, which transformers would bury in a table.
    """

    def __init__(self, kinds: Mapping[str, str], decoded: Decoded, failed: Callable[[RiaError], None]):
        self.kinds, self.decoded, self.failed = kinds, decoded, failed
        self.sources: dict[str, list[str]] = {}  # pattern -> names in the checkpoint, in the order of their tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> "StackExperts":
        return StackExperts(self.kinds, self.decoded, self.failed)

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        try:
            return {full_layer_name: self._stacked(input_dict, model.get_submodule(full_layer_name.rpartition(".")[0]))}
        except RiaError as error:
            self.failed(error)
            return {full_layer_name: torch.empty(0)}

    def _stacked(self, found: Mapping[str, list[torch.Tensor]], module: Any) -> torch.Tensor:
        parts: dict[tuple[int, str], dict[str, tuple[str, torch.Tensor]]] = {}
        for pattern, tensors in found.items():
            for source, tensor in zip(self.sources[pattern], tensors, strict=True):
                linear, _, part = source.rpartition(".")
                _, expert, leaf = linear.rsplit(".", 2)
                parts.setdefault((int(expert), self.kinds[leaf]), {})[part] = (source, tensor)
        present = {kind for _, kind in parts}
        kinds = [kind for kind in ("gate", "up", "down") if kind in present]
        experts = 1 + max(expert for expert, _ in parts)
        any_source = next(iter(self.sources.values()))[0]
        if experts != module.num_experts or len(parts) != experts * len(kinds):
            raise RiaError(
                f"{any_source} and others: {len(parts)} linears of experts are stored, but {type(module).__name__} has "
                f"{module.num_experts} experts. Get all files of one model."
            )
        stacked: torch.Tensor | None = None
        for expert in range(experts):
            dense = []
            for kind in kinds:
                entries = parts[expert, kind]
                tensors = {part: tensor for part, (_, tensor) in entries.items()}
                dense.append(self.decoded([source for source, _ in entries.values()], tensors))
            if len({weight.shape for weight in dense}) > 1:
                raise RiaError(f"{any_source}: the linears of expert {expert} differ in shape. Get all files again.")
            one = torch.cat(dense) if module.is_concatenated else torch.stack(dense, 1).flatten(0, 1)
            one = one.T if module.is_transposed else one
            if stacked is None:
                stacked = torch.empty(experts, *one.shape, dtype=one.dtype, device=one.device)
            if one.shape != stacked.shape[1:]:
                raise RiaError(f"{any_source}: expert {expert} differs in shape from the others. Get all files again.")
            stacked[expert] = one
            for kind in kinds:
                del parts[expert, kind]
        assert stacked is not None
        return stacked


class ExpertsConverter(WeightConverter):
    """transformers copies this for each parameter and gives the copy the tensors that the parameter is made of."""

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.operations[0].sources.setdefault(source_pattern, []).append(source_key)


def expert_converters(schema: RiaSchema, decoded: Decoded, failed: Callable[[RiaError], None]) -> list[WeightConverter]:
    """The conversions for the experts that the schema names."""
    found: dict[tuple[str, str], WeightConverter] = {}
    for experts in schema.experts:
        kinds = {pattern.rpartition(".")[2]: kind for kind, pattern in experts.linears.items()}
        module = experts.module.rpartition(".")[2]
        for parameter in ("gate_up_proj" if experts.gate else "up_proj", "down_proj"):
            wanted = {leaf: kind for leaf, kind in kinds.items() if (kind == "down") == (parameter == "down_proj")}
            sources = [
                rf"\.{_literal(module)}\.[0-9]+\.{_literal(leaf)}\.{part}$"
                for leaf in wanted
                for part in schema.tensor_names
            ]
            key = (module, ",".join(sources))
            found.setdefault(
                key, ExpertsConverter(sources, f".{module}.{parameter}", [StackExperts(wanted, decoded, failed)])
            )
    return list(found.values())


def _literal(part: str) -> str:
    return "".join(character if character.isalnum() or character == "_" else f"\\{character}" for character in part)
