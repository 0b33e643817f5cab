"""The linears of experts that a checkpoint stores one by one, and the tensors that stack them in the dense model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Experts, Stacked, filled, numbers_in
from ria_vllm.format.schema import RiaSchema


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one mixture layer, with its number filled in.

    linears: linear ("gate", "up", "down") -> the pattern of its name, where `{e}` is the expert's number.
    strays: names of pruned linears that match such a pattern, but with a number that no expert or layer has, such as
        03.
    """

    module: str
    num_experts: int
    linears: dict[str, str]
    stacked: list[Stacked]
    strays: list[str] = field(default_factory=list)

    def linear(self, expert: int, kind: str) -> str:
        return filled(self.linears[kind], {"e": str(expert)})

    def stray(self) -> str | None:
        """What is wrong with the first of `strays`."""
        found = min(self.strays, default=None)
        return found and f"{found} is none of the {self.num_experts} experts that {self.module} has by config.json"

    def missing(self, present: Collection[str]) -> str | None:
        """The first linear of an expert that is not among the names `present`."""
        names = (self.linear(expert, kind) for expert in range(self.num_experts) for kind in self.linears)
        return next((name for name in names if name not in present), None)

    def rows(self, stack: Stacked) -> list[str]:
        """The names of the linears in a stacked tensor, expert by expert, in the order of their outputs."""
        return [self.linear(expert, kind) for expert in range(self.num_experts) for kind in stack.linears]


def layers_of_experts(schema: RiaSchema, sparse: Collection[str]) -> list[LayerExperts]:
    """The mixture layers of which at least one linear of an expert is pruned.

    Args:
        sparse: the names of all pruned linears.
    """
    found: dict[str, LayerExperts] = {}
    for experts in schema.experts:
        for pattern in experts.linears.values():
            for name in sparse:
                numbers = numbers_in(pattern, name)
                if numbers is None:
                    continue
                module = filled(experts.module, numbers)
                if module not in found:
                    found[module] = _in_layer(experts, numbers)
                plain = all(number == str(int(number)) for number in numbers.values())
                if not plain or int(numbers["e"]) >= experts.num_experts:
                    found[module].strays.append(name)
    return list(found.values())


def stacked_tensors(
    schema: RiaSchema, sparse: Collection[str], where: object
) -> dict[str, tuple[LayerExperts, Stacked]]:
    """Name of a stacked tensor of the dense model -> the experts in it.

    Args:
        where: the folder, for errors.

    Raises:
        RiaError: an expert is missing, or one too many.
    """
    layers = layers_of_experts(schema, sparse)
    for layer in layers:
        missing = layer.missing(sparse)
        if missing is not None:
            raise RiaError(
                f"{where}: {missing} is missing, though {layer.module} has {layer.num_experts} experts by config.json. "
                f"{_AGAIN}"
            )
        stray = layer.stray()
        if stray is not None:
            raise RiaError(f"{where}: {stray}. {_AGAIN}")
    return {stack.tensor: (layer, stack) for layer in layers for stack in layer.stacked}


def stack_linears(
    experts: Iterable[Sequence[torch.Tensor]], num_experts: int, interleaved: bool, transposed: bool, place: str
) -> torch.Tensor:
    """One tensor from the linears of experts.

    Args:
        experts: of each, the linears [out, in] whose outputs follow each other, or alternate if `interleaved`. An
            expert is asked for when the ones before it are stacked.
        transposed: stack them as [in, out].
        place: what an error begins with.

    Raises:
        RiaError: the linears of an expert differ in shape, or the experts do.
    """
    out: torch.Tensor | None = None
    for expert, parts in enumerate(experts):
        if len({part.shape for part in parts}) > 1:
            raise RiaError(f"{place}: the linears of expert {expert} differ in shape. {_AGAIN}")
        joined = torch.stack(list(parts), 1).flatten(0, 1) if interleaved else torch.cat(list(parts))
        joined = joined.T if transposed else joined
        if out is None:
            out = torch.empty(num_experts, *joined.shape, dtype=joined.dtype, device=joined.device)
        if joined.shape != out.shape[1:]:
            raise RiaError(f"{place}: expert {expert} differs in shape from the others. {_AGAIN}")
        out[expert] = joined
    assert out is not None  # there is at least one expert
    return out


def stack_experts(
    layer: LayerExperts, stack: Stacked, dense_of: Callable[[str], torch.Tensor], where: object
) -> torch.Tensor:
    """A stacked tensor, as the dense model's files have it.

    Args:
        dense_of: a linear's name -> its dense weight [out, in] in the model's own order.
        where: the folder, for errors.

    Raises:
        RiaError: a linear is missing, or the experts differ in shape.
    """
    return stack_linears(
        ([dense_of(layer.linear(expert, kind)) for kind in stack.linears] for expert in range(layer.num_experts)),
        layer.num_experts, stack.interleaved, stack.transposed, f"{where}: {layer.module}",
    )  # fmt: skip


def problems_of_experts(
    schema: RiaSchema, shapes: dict[str, tuple[int, int]], sparse: Collection[str]
) -> Iterator[str]:
    """What is wrong with the experts of a checkpoint, in sentences.

    Args:
        shapes: name -> [out, in] of the pruned linears that could be read.
        sparse: the names of all pruned linears.
    """
    for layer in layers_of_experts(schema, sparse):
        stray, missing = layer.stray(), layer.missing(sparse)
        if stray is not None:
            yield stray
        if missing is not None:
            yield f"{missing}: missing, though {layer.module} has {layer.num_experts} experts by config.json"
            continue
        for kind in layer.linears:
            names = [layer.linear(expert, kind) for expert in range(layer.num_experts)]
            odd = next((name for name in names if shapes.get(name, shapes.get(names[0])) != shapes.get(names[0])), None)
            if odd is not None:
                yield f"{odd}: its shape {shapes[odd]} differs from that of {names[0]}"


def _in_layer(experts: Experts, numbers: dict[str, str]) -> LayerExperts:
    numbers = {name: number for name, number in numbers.items() if name != "e"}
    stacked = [
        stack.model_copy(
            update={
                "tensor": filled(stack.tensor, numbers),
                "bias": None if stack.bias is None else filled(stack.bias, numbers),
            }
        )
        for stack in experts.stacked
    ]
    linears = {kind: filled(pattern, numbers) for kind, pattern in experts.linears.items()}
    return LayerExperts(filled(experts.module, numbers), experts.num_experts, linears, stacked)


_AGAIN = "Get all files of one run."
