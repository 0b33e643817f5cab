"""Int8EmbeddingMethod: one of vLLM's embeddings or heads, stored in int8 (`ria_vllm.format.int8_rows`)."""

from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.functional import embedding
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ria_vllm.errors import RiaError
from ria_vllm.format import int8_rows
from ria_vllm.format.int8_rows import INTEGERS, SCALE
from ria_vllm.serve.kernels.cpu.backend import LOADED, ask_for_huge_pages, multiply_int8_rows


class Int8EmbeddingMethod(QuantizeMethodBase):
    """Multiplies with the rows as they are stored, and widens only those that are looked up.

    Args:
        name: of the matrix in the checkpoint.
        looks_up: the layer is an embedding, and not only a head.
        multiplies: the layer is a head, or may be tied to one.
    """

    keeps_int8 = True  # for those who look for weights, and cannot import this

    def __init__(self, name: str, looks_up: bool, multiplies: bool):
        self.name = name
        self.looks_up = looks_up
        self.multiplies = multiplies

    def create_weights(self, layer: VocabParallelEmbedding, weight: Parameter) -> None:
        """Register what stands in the place of `weight` [rows of this rank, columns], which vLLM gave the layer."""
        (self.rows, self.columns), self.dtype = weight.shape, weight.dtype
        shapes = {INTEGERS: (self.columns, torch.int8), SCALE: (1, torch.float32)}
        for part, (width, dtype) in shapes.items():
            values = torch.empty(self.rows, width, dtype=dtype)
            ask_for_huge_pages(values)
            parameter = Parameter(values.zero_(), requires_grad=False)
            parameter.input_dim, parameter.output_dim, parameter.weight_loader = 1, 0, weight.weight_loader
            layer.register_parameter(part, parameter)

    def take(self, layer: VocabParallelEmbedding, part: str, tensor: torch.Tensor) -> None:
        """Load a tensor of the checkpoint, `int8_rows.TENSORS` say which.

        Raises:
            RiaError: it is not what the layer is made of.
        """
        reason = int8_rows.fault(part, tensor, self.columns)
        if reason is None and len(tensor) != layer.org_vocab_size:
            reason = f"{len(tensor)} rows, but the model has {layer.org_vocab_size}"
        if reason is not None:
            raise RiaError(f"{self.name}.{part}: {reason}. Get all files of one model.")
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor)

    def apply(self, layer: VocabParallelEmbedding, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., columns] -> [..., rows of this rank]."""
        return multiply_int8_rows(x, layer.integers, layer.weight_scale, bias)

    def embedding(self, layer: VocabParallelEmbedding, input_: torch.Tensor) -> torch.Tensor:
        """The rows of this rank with these numbers, in the dtype of the activations."""
        integers, scales = (embedding(input_, getattr(layer, part)) for part in int8_rows.TENSORS)
        return int8_rows.widened(integers, scales, self.dtype)


class TiedHeadMethod(QuantizeMethodBase):
    """The method of a head that multiplies with an embedding's weights.

    Attributes:
        source: the embedding, which has an `Int8EmbeddingMethod`.
    """

    def __init__(self, source: VocabParallelEmbedding):
        self.source = source

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        """There are none."""

    def apply(self, layer: VocabParallelEmbedding, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.source.quant_method.apply(self.source, x, bias)


def misfit(layer: VocabParallelEmbedding) -> str | None:
    """Why no kernel multiplies with a matrix in int8 in the place of a layer's plain weight, or None."""
    device, columns = layer.weight.device.type, layer.weight.shape[1]
    if device != "cpu" or not LOADED:
        return f"no kernel for {device} multiplies with it"
    multiple = int8_rows.COLUMNS_MULTIPLE
    return f"{columns} columns are not a multiple of {multiple}" if columns % multiple else None
