"""In transformers, an experts module has the weights of all experts in one tensor: made here from pruned linears."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ria_vllm.checkpoint.placement import Placement
from ria_vllm.errors import RiaError
from ria_vllm.format.schema import RiaSchema
from ria_vllm.hf.experts_layout import layout_of

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
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        try:
            stacked, self.placements[full_layer_name] = self._stacked(input_dict, module)
        except RiaError as error:
            self.failed(error)
            stacked = torch.empty(0)
        return {full_layer_name: stacked}

    def _stacked(self, found: Mapping[str, list[torch.Tensor]], module: Any) -> tuple[torch.Tensor, Placement]:
        linears = self._linears(found)
        kinds = [kind for kind in ("gate", "up", "down") if kind in self.kinds.values()]
        wanted = {(expert, kind) for expert in range(module.num_experts) for kind in kinds}
        first = next(iter(self.sources.values()))[0].rpartition(".")[0]
        if linears.keys() != wanted:
            raise RiaError(
                f"{first} and others: {len(linears)} linears of experts are stored, but {type(module).__name__} has "
                f"{module.num_experts} experts. Get all files of one model."
            )
        stored = {self._name(tensors): tensors for tensors in linears.values()}
        names = tuple(
            tuple(self._name(linears[expert, kind]) for kind in kinds) for expert in range(module.num_experts)
        )
        linears.clear()  # `stored` lets go of each linear as soon as it is dense
        form = layout_of(module)
        if form is None:
            raise RiaError(
                f"{first} and others: {type(module).__name__} holds its experts in a way that ria-vllm does not know. "
                "`ria-vllm export` writes a dense folder, which transformers may be able to read."
            )
        placement = Placement(names, True, form.interleaved, form.transposed)
        return placement.join(lambda name: self._dense(stored.pop(name))), placement

    def _linears(self, found: Mapping[str, list[torch.Tensor]]) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
        """(expert, kind) -> name in the checkpoint -> tensor, for the tensors of each linear."""
        linears: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        for pattern, tensors in found.items():
            for source, tensor in zip(self.sources[pattern], tensors, strict=True):
                _, number, leaf, _ = source.rsplit(".", 3)
                linears.setdefault((int(number), self.kinds[leaf]), {})[source] = tensor
        return linears

    @staticmethod
    def _name(tensors: Mapping[str, torch.Tensor]) -> str:
        return next(iter(tensors)).rpartition(".")[0]

    def _dense(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.decoded(list(tensors), {source.rpartition(".")[2]: tensor for source, tensor in tensors.items()})


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
