"""The linears of experts that a checkpoint stores one by one, and the tensors that stack them in the dense model."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ria_vllm.errors import RiaError
from ria_vllm.format.layer_schema import Experts, Stacked, filled, numbers_in
from ria_vllm.format.schema import RiaSchema

_AGAIN = "Get all files of one run."


@dataclass(frozen=True)
class Placement:
    """What one tensor holds: the weight of a linear [out, in], or linears of all experts.

    experts: of each expert the names of its linears, in the order of their outputs; a single linear is one expert.
    stacked: the tensor is [experts, out, in], or [experts, in, out] if `transposed`. If an expert has two linears,
        their outputs follow each other, or alternate if `interleaved`.
    """

    experts: tuple[tuple[str, ...], ...]
    stacked: bool = False
    interleaved: bool = False
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        return [name for linears in self.experts for name in linears]

    def join(self, tensor_of: Callable[[str], torch.Tensor], where: str = "") -> torch.Tensor:
        """The tensor, or something of its shape, from one [out, in] for each linear.

        Args:
            where: what an error begins with.

        Raises:
            RiaError: the experts differ in shape.
        """
        if not self.stacked:
            return tensor_of(self.experts[0][0])
        experts = ([tensor_of(name) for name in linears] for linears in self.experts)
        place = f"{where}{self.experts[0][0]} and others"
        return stack_linears(experts, len(self.experts), self.interleaved, self.transposed, place)

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The name and the part [out, in] of each linear; the inverse of `join`.

        Raises:
            RiaError: the tensor does not hold as many linears.
        """
        if not self.stacked:
            yield self.experts[0][0], tensor
            return
        if tensor.dim() != 3 or len(tensor) != len(self.experts):
            raise RiaError(
                f"{self.experts[0][0]} and others: their parameter has shape {tuple(tensor.shape)}, but the "
                f"checkpoint has {len(self.experts)} experts."
            )
        for expert, linears in enumerate(self.experts):
            rows, count = tensor.shape[2 if self.transposed else 1], len(linears)
            if rows % count:
                raise RiaError(f"{linears[0]}: {rows} rows are not those of {count} linears of one size.")
            yield from ((name, self.part(tensor, expert, number)) for number, name in enumerate(linears))

    def part(self, tensor: torch.Tensor, expert: int, number: int) -> torch.Tensor:
        """A view [out, in] of the linear `number` of an expert, for a tensor that `split` accepts."""
        if not self.stacked:
            return tensor
        rows = tensor[expert].T if self.transposed else tensor[expert]
        return split_rows(rows, len(self.experts[expert]), self.interleaved)[number]


def split_rows(rows: torch.Tensor, linears: int, interleaved: bool) -> Sequence[torch.Tensor]:
    """The parts of equally large linears, views, whose rows follow each other, or alternate if `interleaved`."""
    return [rows[start::linears] for start in range(linears)] if interleaved else rows.chunk(linears)


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


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one MoE layer, with its number filled in. Plain data, because vLLM pickles its configuration.

    name: of their module, with which the names of their linears may begin.
    patterns: linear ("gate" if there is one, "up", "down") -> the pattern of its name, where `{e}` is the expert's
        number.
    stacked, biases: tensor of the dense model -> how linears, or their biases, are stacked in it.
    strays: names of pruned linears that match a pattern, but with a number that no expert or layer has, such as 03.
    """

    name: str
    num_experts: int
    patterns: dict[str, str]
    stacked: dict[str, Stacked] = field(default_factory=dict)
    biases: dict[str, Stacked] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, experts: Experts, numbers: Mapping[str, str]) -> "LayerExperts":
        """Those of the layer with these numbers."""
        patterns = {kind: filled(pattern, numbers) for kind, pattern in experts.linears.items()}
        stacked, biases = {}, {}
        for stack in experts.stacked:
            stacked[filled(stack.tensor, numbers)] = stack
            if stack.bias is not None:
                biases[filled(stack.bias, numbers)] = stack
        return cls(filled(experts.module, numbers), experts.num_experts, patterns, stacked, biases)

    @property
    def is_gated(self) -> bool:
        return "gate" in self.patterns

    def linear(self, kind: str, expert: int) -> str:
        return filled(self.patterns[kind], {"e": str(expert)})

    def linears(self) -> Iterator[tuple[str, str, int]]:
        """(name, kind, expert) of each linear."""
        for expert in range(self.num_experts):
            yield from ((self.linear(kind, expert), kind, expert) for kind in self.patterns)

    def placement(self, kinds: Sequence[str], interleaved: bool, transposed: bool) -> Placement:
        """Of a tensor that stacks the linears of these kinds."""
        experts = tuple(tuple(self.linear(kind, expert) for kind in kinds) for expert in range(self.num_experts))
        return Placement(experts, True, interleaved, transposed)

    def problem(self, pruned: Collection[str]) -> str | None:
        """What is wrong with the experts, where the pruned linears have these names; None: nothing."""
        if self.strays:
            return f"{min(self.strays)} is none of the {self.num_experts} experts that {self.name} has by config.json"
        missing = next((name for name, *_ in self.linears() if name not in pruned), None)
        if missing is None:
            return None
        return f"{missing} is missing, though {self.name} has {self.num_experts} experts by config.json"


def layers_of_experts(schema: RiaSchema, pruned: Collection[str]) -> list[LayerExperts]:
    """The MoE layers of which at least one linear of an expert is pruned.

    Args:
        pruned: the names of all pruned linears.
    """
    found: dict[str, LayerExperts] = {}
    for experts in schema.experts:
        for pattern in experts.linears.values():
            for name in pruned:
                numbers = numbers_in(pattern, name)
                if numbers is None:
                    continue
                of_layer = {placeholder: number for placeholder, number in numbers.items() if placeholder != "e"}
                module = filled(experts.module, of_layer)
                if module not in found:
                    found[module] = LayerExperts.of(experts, of_layer)
                plain = all(number == str(int(number)) for number in numbers.values())
                if not plain or int(numbers["e"]) >= experts.num_experts:
                    found[module].strays.append(name)
    return list(found.values())


def stacked_tensors(schema: RiaSchema, pruned: Collection[str], where: object) -> dict[str, Placement]:
    """Name of a stacked tensor of the dense model -> what is in it.

    Args:
        pruned: the names of all pruned linears.
        where: the folder, for errors.

    Raises:
        RiaError: an expert is missing, or one too many.
    """
    found: dict[str, Placement] = {}
    for layer in layers_of_experts(schema, pruned):
        problem = layer.problem(pruned)
        if problem is not None:
            raise RiaError(f"{where}: {problem}. {_AGAIN}")
        for tensor, stack in layer.stacked.items():
            found[tensor] = layer.placement(stack.linears, stack.interleaved, stack.transposed)
    return found


def problems_of_experts(
    schema: RiaSchema, shapes: dict[str, tuple[int, int]], pruned: Collection[str]
) -> Iterator[str]:
    """What is wrong with the experts of a checkpoint, in sentences.

    Args:
        shapes: name -> [out, in] of the pruned linears that could be read.
        pruned: the names of all pruned linears.
    """
    for layer in layers_of_experts(schema, pruned):
        problem = layer.problem(pruned)
        if problem is not None:
            yield problem
            continue
        for kind in layer.patterns:
            names = [layer.linear(kind, expert) for expert in range(layer.num_experts)]
            odd = next((name for name in names if shapes.get(name, shapes.get(names[0])) != shapes.get(names[0])), None)
            if odd is not None:
                yield f"{odd}: its shape {shapes[odd]} differs from that of {names[0]}"
