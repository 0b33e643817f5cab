"""Checks that every tensor of the dense model ends up in the checkpoint."""

from collections import Counter

from ria_vllm.errors import RiaError
from ria_vllm.format.int8_rows import INTEGERS
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.offline.model.run.streaming import StreamedModel


def planned(model: StreamedModel) -> list[str]:
    """The written names of all tensors that will be copied or pruned."""
    layers = (model.names_in_layer(index) for index in range(len(model.layers)))
    return [*model.names_outside_layers(), *(name for names in layers for name in names)]


def check_written_once(model: StreamedModel, pruned: set[str], written: list[str], weight_format: WeightFormat) -> None:
    """Check that each tensor of the source is written exactly once, under its own name, in one form.

    A tensor that stacks experts is there if each of its linears is. Tensors left out on purpose (`names.LEFT_OUT`) are
    exempt.

    Args:
        pruned: the written names of pruned linears.
        written: the names of all tensors that are written.
        weight_format: of the pruned linears.
    """
    counts = Counter(written)
    first = weight_format.parts[0].name
    stacks = {
        tensor: linears for layer in model.experts for f in layer.values() for tensor, linears in f.in_stack.items()
    }
    for name in model.files:
        mine = model.names.written(name)
        if mine is None:
            continue
        linear = mine.removesuffix(".weight")
        there = counts[mine] + counts[f"{linear}.{INTEGERS}"] + (counts[f"{linear}.{first}"] if linear in pruned else 0)
        if pruned & set(stacks.get(mine, ())):
            times = [counts[f"{one}.{first}"] for one in stacks[mine]]
            there += max(times) if 1 <= min(times) else 0
        if there != 1:
            wrong = {0: "missing in the output", 2: "in the output twice"}.get(there, f"in the output {there} times")
            raise RiaError(f"{model.files[name]}: {name} would be {wrong}. Please report this bug in ria-vllm.")
