"""The parameters of a layer: created in the form that the checkpoint stores, replaced, and removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from ria_vllm.format.weight_scheme import TensorSpec
from ria_vllm.serve.load.loading import LayerLoader, Loader, rows_of_mamba2, unwrapped


class WeightPlaceholder:
    """Stands at `layer.weight` while a model is built, for a model that gives the weight a loader of its own.

    Mamba-2 does so for its input projection if one group serves all heads and several ranks share it. Without a place
    for the loader, it would be lost. With a real parameter there, other models would mistake the layer for a dense one;
    DeepSeek's looks at it to choose a kernel.
    """

    def __init__(self) -> None:
        self.weight_loader: Loader | None = None  # some versions of vLLM delete it before they set their own

    @staticmethod
    def is_needed(layer: LinearBase) -> bool:
        return type(layer) is ColumnParallelLinear and layer.tp_size > 1


@dataclass(frozen=True)
class Creation:
    """How the parameters of a layer were created, so that others can take their place before anything is loaded.

    Attributes:
        args, kwargs: what `create_weights` was called with.
        parameters: names of the parameters.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parameters: tuple[str, ...]

    @classmethod
    def record(cls, create: Callable[..., None], layer: LinearBase, *args: Any, **kwargs: Any) -> "Creation":
        before = set(layer._parameters)
        create(layer, *args, **kwargs)
        return cls(args, kwargs, tuple(name for name in layer._parameters if name not in before))

    def model_loader(self, layer: LinearBase) -> Loader | None:
        """The loader that the layer's model gave the weight in place of vLLM's; None if it gave none."""
        vllm_loader = self.kwargs["weight_loader"]
        loader = getattr(getattr(layer, "weight", None), "weight_loader", None)
        return None if loader is None or unwrapped(loader) == vllm_loader else unwrapped(loader)

    def undo(self, layer: LinearBase) -> None:
        """Remove the parameters from the layer, and the wrapper from the loader of its bias."""
        for name in self.parameters:
            delattr(layer, name)
        for name in ("weight", "weight_loader"):
            layer.__dict__.pop(name, None)
        if layer.bias is not None:
            layer.bias.weight_loader = unwrapped(layer.bias.weight_loader)


def create_parameters(
    layer: LinearBase, layer_loader: LayerLoader, sizes: Sequence[int], columns: int, vllm_loader: Loader
) -> None:
    """Give `layer` the parameters that its linears are loaded into.

    vLLM creates the bias later and gives it the loader that `layer.weight_loader` is then. If the layer permutes rows,
    that loader is wrapped.

    Args:
        layer_loader: stands before vLLM's loader.
        sizes: rows of each output on this rank.
        columns: input channels of this rank.
        vllm_loader: the loader that vLLM gives each of these parameters.
    """
    for part, spec in layer_loader.specs.items():
        layer.register_parameter(part, _parameter(spec, sizes, columns, layer_loader.wrap(part, vllm_loader)))
    if "weight" not in layer_loader.specs and WeightPlaceholder.is_needed(layer):
        layer.weight = WeightPlaceholder()
    if layer_loader.permutes_rows:
        layer.weight_loader = layer_loader.wrap("bias", layer.weight_loader)


def _parameter(spec: TensorSpec, sizes: Sequence[int], columns: int, loader: Loader) -> BasevLLMParameter:
    if spec.per_tensor:
        return PerTensorScaleParameter(data=torch.zeros(len(sizes), dtype=spec.dtype), weight_loader=loader)
    data = torch.zeros(spec.shape(sum(sizes), columns), dtype=spec.dtype)
    if spec.part.channels is None:
        return ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def use_loader_of_model(
    layer: LinearBase, layer_loader: LayerLoader, vllm_loader: Loader, model_loader: Loader | None
) -> None:
    """Once the model is complete, put `layer_loader` in front of the loader that the model gave the layer, if it did.

    The model has replaced our loaders with its own on every parameter whose name it knows. Its loader distributes rows,
    so `vllm_loader` loads a scale for the whole linear.
    """
    if isinstance(layer.__dict__.get("weight"), WeightPlaceholder):
        del layer.weight
    if model_loader is None:
        return
    rows = rows_of_mamba2(model_loader)
    # If empty, any number of rows will do: only the model's loader knows.
    layer_loader.rows = {} if rows is None else {None: rows}
    for part, spec in layer_loader.specs.items():
        loader = vllm_loader if spec.per_tensor else model_loader
        getattr(layer, part).weight_loader = layer_loader.wrap(part, loader)


def take_parameters(layer: LinearBase, specs: Mapping[str, TensorSpec]) -> dict[str, torch.Tensor]:
    """Remove the loaded tensors from the layer and return them by the last part of their names.

    Empty if they were taken before, even if the layer now has other parameters of these names.
    """
    taken = {}
    for part in specs:
        if isinstance(getattr(layer, part, None), BasevLLMParameter):
            taken[part] = getattr(layer, part).data
            delattr(layer, part)
    return taken


def set_parameter(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a tensor as a parameter, so that vLLM counts it and moves it."""
    layer.register_parameter(name, Parameter(tensor.contiguous(), requires_grad=False))
