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
from ria_vllm.serve.load.shards import ShardId
from ria_vllm.serve.load.stream import Taker

WAY_OUT = "`ria-vllm export` makes a dense folder."


@dataclass(frozen=True)
class Destination:
    """Where vLLM's model puts a linear's dense weight or bias: into which layer, as which shard, its rows permuted how.

    rows: int64 [out].
    """

    layer: LinearBase
    shard: ShardId
    rows: torch.Tensor

    def load(self, part: str, tensor: torch.Tensor) -> None:
        """Load the tensor called `part` of the linear. Folds count rows as the file does, so their permutation
        comes first, though the layer's loader applies it later."""
        if tensor.dim() and len(tensor) == len(self.rows):
            fold = self.layer.quant_method.layer_loader.row_permutation(part, tensor, self.shard)
            rows = self.rows if fold is None else fold.cpu()[self.rows][fold.cpu().argsort()]
            tensor = tensor.index_select(0, rows.to(tensor.device))
        parameter = getattr(self.layer, part)
        parameter.weight_loader(parameter, tensor, *(() if self.shard is None else (self.shard,)))


def takers(model: torch.nn.Module, pruned: Collection[str]) -> dict[str, Taker | None]:
    """Pruned linear -> who loads its tensors where `model` would; None for those that `model` does not serve.

    Args:
        model: complete, and not loaded yet.

    Raises:
        RiaError: the model does not load one of them, or does more with it than to rearrange its rows.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearBase)]
    layers = [layer for layer in layers if isinstance(layer.quant_method, Sparse24LinearMethod)]
    places: dict[str, list[Destination]] = {}
    with catching(layers) as arrived:
        for name, count in (one for layer in layers for one in _rows(layer)):
            arrived.clear()
            numbers = torch.arange(count, device="cpu")
            try:
                model.load_weights([(name, numbers if name.endswith(".bias") else numbers[:, None])])
            except Exception as error:  # whatever a model raises that does not load a part of its weights
                raise RiaError(
                    f"{name}: vLLM's {type(model).__name__} rearranges rows of weights, and does not tell which: "
                    f"{type(error).__name__}: {error}. {WAY_OUT}"
                ) from error
            if not arrived or not all(torch.equal(rows.flatten().sort().values, numbers) for _, rows, _ in arrived):
                raise RiaError(
                    f"{name}: vLLM's {type(model).__name__} does more with it than to rearrange its rows. {WAY_OUT}"
                )
            places[name] = [Destination(layer, shard, rows.flatten()) for layer, rows, shard in arrived]
    return {name: _taker(name, places) if f"{name}.weight" in places else None for name in pruned}


def _taker(linear: str, places: Mapping[str, list[Destination]]) -> Taker:
    def take(part: str, tensor: torch.Tensor) -> None:
        name = f"{linear}.{part}"
        found = places.get(name if part == "bias" else f"{linear}.weight", [])
        if not found or not all(hasattr(place.layer, part) for place in found):
            raise RiaError(f"{name}: no layer of vLLM's model takes this tensor. {WAY_OUT}")
        for place in found:
            place.load(part, tensor)

    return take


def _rows(layer: LinearBase) -> Iterator[tuple[str, int]]:
    """(dense weight or bias, its rows) of each linear of a layer."""
    shards = layer.quant_method.layer_loader.shards
    for name, shard in zip(shards.linears, shards.shard_ids):
        if shard not in shards.rows:
            raise RiaError(
                f"{name}: ria-vllm does not know how many rows vLLM's {type(layer).__name__} has for it, and cannot "
                f"rearrange them. {WAY_OUT}"
            )
        yield f"{name}.weight", shards.rows[shard]
        if layer.bias is not None:
            yield f"{name}.bias", shards.rows[shard]


@contextmanager
def catching(layers: list[LinearBase]) -> Iterator[list[tuple[LinearBase, torch.Tensor, ShardId]]]:
    """Let the layers' `weight` and `bias` be parameters that append what is loaded to a list."""
    arrived: list[tuple[LinearBase, torch.Tensor, ShardId]] = []
    before = [(layer, dict(layer._parameters)) for layer in layers]
    for layer in layers:

        def load(
            param: Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId = None, layer: LinearBase = layer
        ) -> None:
            arrived.append((layer, loaded_weight, loaded_shard_id))

        for name in ["weight"] if layer.bias is None else ["weight", "bias"]:
            parameter = Parameter(torch.empty(0, dtype=torch.int64, device="cpu"), requires_grad=False)
            parameter.weight_loader, parameter.output_dim = load, 0
            layer._parameters[name] = parameter
    try:
        yield arrived
    finally:
        for layer, parameters in before:
            layer._parameters.clear()
            layer._parameters.update(parameters)
