"""Linears whose rows vLLM's own model rearranges as it loads them, by the names of dense weights.

BLOOM, Falcon and Llama 4 are trained with attention heads in another order than vLLM computes them in. Rows are output
channels, so compressed ones may be rearranged like dense ones, but a model that looks for names of dense weights does
that to some tensors of a pruned linear and not to others. So the model is asked once, by loading the numbers of the
rows under the name of the dense weight. After that, it never sees the tensors of pruned linears: they go straight to
the layers' loaders.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.errors import RiaError
from ria_vllm.serve.linear import Sparse24LinearMethod
from ria_vllm.serve.reordered_rows import ReorderedRows
from ria_vllm.serve.shards import ShardId
from ria_vllm.serve.stream import set_name

# A number in a tensor of row numbers is this times the linear's number, plus the row's.
LINEAR = 2**32


@dataclass(frozen=True)
class Destination:
    """Where vLLM's model puts a linear's dense weight: into which layer, as which shard, in what order of rows.

    rows: int64 [out]; None: as they are.
    """

    layer: LinearBase
    shard: ShardId
    rows: torch.Tensor | None

    def load(self, part: str, tensor: torch.Tensor, name: str) -> None:
        """Load the tensor called `part` of the linear, which is `name` in the checkpoint, or ignore it."""
        parameter = getattr(self.layer, part, None)
        if parameter is None:
            return
        if self.rows is not None and tensor.dim() and len(tensor) == len(self.rows):
            tensor = ReorderedRows.of(tensor, self.rows)
            set_name(tensor, name)
        parameter.weight_loader(parameter, tensor, *(() if self.shard is None else (self.shard,)))


class DirectLoads:
    """Takes the tensors of pruned linears out of the stream, and loads them where `model` would.

    Args:
        model: complete, and not loaded yet.
        pruned: linears of the checkpoint. Those that `model` does not serve are dropped.

    Raises:
        RiaError: see `ask_for_rows`.
    """

    def __init__(self, model: torch.nn.Module, pruned: Collection[str]):
        self.pruned = pruned
        self.places = ask_for_rows(model)

    def take(self, name: str, tensor: torch.Tensor) -> bool:
        """Load the tensor `name` if it belongs to a pruned linear.

        Returns:
            False if the model has to load it. Stray biases are left to it.
        """
        linear, _, part = name.rpartition(".")
        places = self.places.get(linear, [])
        if linear not in self.pruned or (part == "bias" and not any(place.layer.bias is not None for place in places)):
            return False
        for place in places:
            place.load(part, tensor, name)
        return True


def ask_for_rows(model: torch.nn.Module) -> dict[str, list[Destination]]:
    """Linear -> where `model` puts it, for all pruned linears that its layers serve.

    The model must be complete and must not have loaded anything yet.

    Raises:
        RiaError: the model does not load a linear, or does more with it than to rearrange its rows.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    layers = [layer for layer in layers if isinstance(layer.quant_method, Sparse24LinearMethod)]
    rows = {name: count for layer in layers for name, count in _rows(layer)}
    numbers = {name: i for i, name in enumerate(rows)}
    arrived: list[tuple[LinearBase, torch.Tensor, ShardId]] = []
    with dense_weights(layers, arrived):
        try:
            model.load_weights(
                (f"{name}.weight", i * LINEAR + torch.arange(rows[name], device="cpu")[:, None])
                for name, i in numbers.items()
            )
        except RiaError:
            raise
        except Exception as error:  # whatever a model raises that does not load a part of its weights
            raise RiaError(
                f"vLLM's {type(model).__name__} rearranges rows of weights, and does not tell which: "
                f"{type(error).__name__}: {error}. `ria-vllm export` makes a dense folder."
            ) from error
    found: dict[str, list[Destination]] = {name: [] for name in rows}
    names = list(rows)
    for layer, tensor, shard in arrived:
        linear = names[int(tensor.flatten()[0]) // LINEAR]
        found[linear].append(Destination(layer, shard, _order(linear, rows[linear], numbers[linear], tensor)))
    if lost := next((name for name, places in found.items() if not places), None):
        raise RiaError(
            f"{lost}: vLLM's {type(model).__name__} does not load it. `ria-vllm export` makes a dense folder."
        )
    return found


def _rows(layer: LinearBase) -> Iterator[tuple[str, int]]:
    """(linear, its rows) of each linear of a layer."""
    shards = layer.quant_method.layer_loader.shards
    for name, shard in zip(shards.linears, shards.shard_ids):
        if shard not in shards.rows:
            raise RiaError(
                f"{name}: ria-vllm does not know how many rows vLLM's {type(layer).__name__} has for it, and cannot "
                "rearrange them. `ria-vllm export` makes a dense folder."
            )
        yield name, shards.rows[shard]


def _order(linear: str, rows: int, number: int, tensor: torch.Tensor) -> torch.Tensor | None:
    order = tensor.flatten() - number * LINEAR
    unchanged = torch.arange(rows)
    if tuple(tensor.shape) != (rows, 1) or not torch.equal(order.sort().values, unchanged):
        raise RiaError(
            f"{linear}: vLLM does more with its weight than to rearrange the rows. `ria-vllm export` makes a dense "
            "folder."
        )
    return None if torch.equal(order, unchanged) else order


@contextmanager
def dense_weights(
    layers: list[LinearBase], arrived: list[tuple[LinearBase, torch.Tensor, ShardId]]
) -> Iterator[None]:
    """Give the layers a parameter `weight`, and append what is loaded into it to `arrived`."""
    before: Mapping[LinearBase, Parameter | None] = {layer: layer._parameters.get("weight") for layer in layers}
    for layer in layers:

        def load(
            param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None, layer: LinearBase = layer
        ) -> None:
            arrived.append((layer, loaded_weight, loaded_shard_id))

        weight = Parameter(torch.empty(0, 0, dtype=torch.int64, device="cpu"), requires_grad=False)
        weight.weight_loader, weight.output_dim = load, 0
        layer._parameters["weight"] = weight
    try:
        yield
    finally:
        for layer, parameter in before.items():
            if parameter is None:
                del layer._parameters["weight"]
            else:
                layer._parameters["weight"] = parameter
