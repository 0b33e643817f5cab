"""Where transformers puts the pruned linears of a checkpoint: which parameter of the model holds which of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.stacks import stack_linears


@dataclass(frozen=True)
class Placement:
    """What one parameter holds: the weight of a linear [out, in], or linears of all experts.

    experts: of each expert the names of its linears, in the order of their outputs; a single linear is one expert.
    stacked: the parameter is [experts, out, in], or [experts, in, out] if `transposed`. If an expert has two linears,
        their outputs follow each other, or alternate if `interleaved`.
    """

    experts: tuple[tuple[str, ...], ...]
    stacked: bool = False
    interleaved: bool = False
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        return [name for linears in self.experts for name in linears]

    def join(self, tensor_of: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The parameter, or something of its shape, from one tensor [out, in] for each linear.

        Raises:
            RiaError: the experts differ in shape.
        """
        if not self.stacked:
            return tensor_of(self.experts[0][0])
        experts = ([tensor_of(name) for name in linears] for linears in self.experts)
        place = f"{self.experts[0][0]} and others"
        return stack_linears(experts, len(self.experts), self.interleaved, self.transposed, place)

    def split(self, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The name and the part [out, in] of each linear; the inverse of `join`.

        Raises:
            RiaError: the parameter does not hold as many linears.
        """
        if not self.stacked:
            yield self.experts[0][0], parameter
            return
        if parameter.dim() != 3 or len(parameter) != len(self.experts):
            raise RiaError(
                f"{self.experts[0][0]} and others: their parameter has shape {tuple(parameter.shape)}, but the "
                f"checkpoint has {len(self.experts)} experts."
            )
        for expert, linears in enumerate(self.experts):
            rows, count = parameter.shape[2 if self.transposed else 1], len(linears)
            if rows % count:
                raise RiaError(f"{linears[0]}: {rows} rows are not those of {count} linears of one size.")
            yield from ((name, self.part(parameter, expert, number)) for number, name in enumerate(linears))

    def part(self, parameter: torch.Tensor, expert: int, number: int) -> torch.Tensor:
        """A view [out, in] of the linear `number` of an expert, for a parameter that `split` accepts."""
        if not self.stacked:
            return parameter
        rows, count = parameter[expert].T if self.transposed else parameter[expert], len(self.experts[expert])
        return rows[number::count] if self.interleaved else rows.chunk(count)[number]


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    folder: with the weight files.
    placements: a parameter's name in the model as it was loaded -> what it holds.
    conversions: what transformers undoes to give tensors the names and shapes of the dense model's files.
    """

    folder: Path
    placements: dict[str, Placement]
    conversions: list[Any]


ORIGIN_ATTRIBUTE = "_ria_origin"
"""The attribute under which a model that transformers loaded from a compressed folder has its `Origin`."""


def inside_adapters(module: Any) -> Any:
    """The module itself, or the one that adapters of PEFT stand around, or that its `modules_to_save` has a copy of."""
    while True:  # getattr: what torch.compile wraps passes it on
        inside = (getattr(module, name, None) for name in ("original_module", "base_layer"))
        found = next((one for one in inside if isinstance(one, torch.nn.Module)), None)
        if found is None:
            return module
        module = found
