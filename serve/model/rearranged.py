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
from ria_vllm.serve.linear.method import Sparse24LinearMethod
from ria_vllm.serve.linear.parameters import IGNORED_TENSORS
from ria_vllm.serve.load.reordered_rows import ReorderedRows
from ria_vllm.serve.load.shards import ShardId
from ria_vllm.serve.load.stream import Taker

# The number of a row in a tensor is this times the tensor's number, plus the row's.
NUMBER = 2**32


@dataclass(frozen=True)
class Destination:
    """Where vLLM's model puts a linear's dense weight or bias: into which layer, as which shard, in what order of rows.

    rows: int64 [out]; None: as they are.
    """

    layer: LinearBase
    shard: ShardId
    rows: torch.Tensor | None

    def load(self, part: str, tensor: torch.Tensor, name: str) -> None:
        """Load the tensor called `part` of the linear, which is `name` in the checkpoint, or ignore it.

        Raises:
            RiaError: the layer has no such tensor, though it is none of those that only describe the others.
        """
        parameter = getattr(self.layer, part, None)
        if parameter is None and part in IGNORED_TENSORS:
            return
        if parameter is None:
            raise _no_place(name)
        if self.rows is not None and tensor.dim() and len(tensor) == len(self.rows):
            tensor = ReorderedRows.of(tensor, self.rows)
        parameter.weight_loader(parameter, tensor, *(() if self.shard is None else (self.shard,)))


def takers(model: torch.nn.Module, pruned: Collection[str]) -> dict[str, Taker | None]:
    """Pruned linear -> who loads its tensors where `model` would; None for those that `model` does not serve.

    Args:
        model: complete, and not loaded yet.

    Raises:
        RiaError: see `ask_for_rows`.
    """
    places = ask_for_rows(model)
    return {name: _taker(name, places) if f"{name}.weight" in places else None for name in pruned}


def _taker(linear: str, places: Mapping[str, list[Destination]]) -> Taker:
    def take(part: str, tensor: torch.Tensor) -> None:
        name = f"{linear}.{part}"
        found = places.get(name if part == "bias" else f"{linear}.weight", [])
        if not found:
            raise _no_place(name)
        for place in found:
            place.load(part, tensor, name)

    return take


def _no_place(name: str) -> RiaError:
    return RiaError(
        f"{name}: no layer of vLLM's model takes this tensor, so what it would serve is not the checkpoint's model. "
        "`ria-vllm export` makes a dense folder."
    )


def ask_for_rows(model: torch.nn.Module) -> dict[str, list[Destination]]:
    """Dense weight or bias -> where `model` puts it, for all pruned linears that its layers serve.

    The model must be complete and must not have loaded anything yet.

    Raises:
        RiaError: the model does not load one of them, or does more with it than to rearrange its rows.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    layers = [layer for layer in layers if isinstance(layer.quant_method, Sparse24LinearMethod)]
    rows = {name: count for layer in layers for name, count in _rows(layer)}
    numbered = {name: i * NUMBER + _as_shaped(name, torch.arange(rows[name])) for i, name in enumerate(rows)}
    names = list(rows)
    arrived: list[tuple[LinearBase, torch.Tensor, ShardId]] = []
    with catching(layers, arrived):
        try:
            model.load_weights(numbered.items())
        except RiaError:
            raise
        except Exception as error:  # whatever a model raises that does not load a part of its weights
            raise RiaError(
                f"vLLM's {type(model).__name__} rearranges rows of weights, and does not tell which: "
                f"{type(error).__name__}: {error}. `ria-vllm export` makes a dense folder."
            ) from error
    found: dict[str, list[Destination]] = {name: [] for name in rows}
    for layer, tensor, shard in arrived:
        number = int(tensor.flatten()[0]) // NUMBER if tensor.numel() else -1
        name = names[number] if 0 <= number < len(names) else layer.quant_method.prefix
        found.setdefault(name, []).append(Destination(layer, shard, _order(name, tensor, numbered.get(name))))
    if lost := next((name for name, places in found.items() if not places), None):
        raise RiaError(
            f"{lost}: vLLM's {type(model).__name__} does not load it. `ria-vllm export` makes a dense folder."
        )
    return found


def _rows(layer: LinearBase) -> Iterator[tuple[str, int]]:
    """(dense weight or bias, its rows) of each linear of a layer."""
    shards = layer.quant_method.layer_loader.shards
    for name, shard in zip(shards.linears, shards.shard_ids):
        if shard not in shards.rows:
            raise RiaError(
                f"{name}: ria-vllm does not know how many rows vLLM's {type(layer).__name__} has for it, and cannot "
                "rearrange them. `ria-vllm export` makes a dense folder."
            )
        yield f"{name}.weight", shards.rows[shard]
        if layer.bias is not None:
            yield f"{name}.bias", shards.rows[shard]


def _as_shaped(name: str, rows: torch.Tensor) -> torch.Tensor:
    """The numbers of the rows of a weight [out, 1] or bias [out], on the CPU."""
    rows = rows.to("cpu")
    return rows if name.endswith(".bias") else rows[:, None]


def _same_numbers(tensor: torch.Tensor, numbered: torch.Tensor) -> bool:
    return torch.equal(tensor.flatten().sort().values, numbered.flatten())


def _order(name: str, tensor: torch.Tensor, numbered: torch.Tensor | None) -> torch.Tensor | None:
    if numbered is None or tensor.shape != numbered.shape or not _same_numbers(tensor, numbered):
        raise RiaError(
            f"{name}: vLLM does more with it than to rearrange its rows. `ria-vllm export` makes a dense folder."
        )
    return None if torch.equal(tensor, numbered) else tensor.flatten() % NUMBER


@contextmanager
def catching(layers: list[LinearBase], arrived: list[tuple[LinearBase, torch.Tensor, ShardId]]) -> Iterator[None]:
    """Let the layers' `weight` and `bias` be parameters that append what is loaded to `arrived`."""
    before: list[tuple[LinearBase, dict[str, Parameter | None]]] = []
    for layer in layers:

        def load(
            param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None, layer: LinearBase = layer
        ) -> None:
            arrived.append((layer, loaded_weight, loaded_shard_id))

        before.append((layer, dict(layer._parameters)))
        for name in ["weight"] if layer.bias is None else ["weight", "bias"]:
            parameter = Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            parameter.weight_loader, parameter.output_dim = load, 0
            layer._parameters[name] = parameter
    try:
        yield
    finally:
        for layer, parameters in before:
            layer._parameters.clear()
            layer._parameters.update(parameters)
