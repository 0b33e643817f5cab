"""From the weights of a layer to the calls of kernels that compute it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.formats import FLOAT
from ria_vllm.serve.kernels import registry as kernels
from ria_vllm.serve.parameters import set_parameter
from ria_vllm.serve.weight_scheme import Weights


@dataclass(frozen=True)
class RowGroup:
    """Rows [start, start + count) of a layer, which take their input in the same order.

    permutation: int32 [in of the whole layer]; None: the model's own order.
    """

    start: int
    count: int
    permutation: np.ndarray | None


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel, for rows [start, start + out_features) of a layer.

    Tensors are named, not held, because vLLM replaces a layer's parameters when it reloads weights.

    Attributes:
        kernel: its name.
        apply: the kernel's function.
        packed: names of the layer's parameters that hold the packed weights.
        input_permutation: name of the parameter with the order in which the kernel takes the input channels, or None.
    """

    kernel: str
    apply: Callable[..., torch.Tensor]
    packed: tuple[str, ...]
    input_permutation: str | None
    start: int
    out_features: int


@dataclass(frozen=True)
class PackedLinear:
    """How a layer with packed weights is computed.

    Attributes:
        calls: in the order of their outputs.
        input_channels: name of the parameter with the channels to take from the input, after an all-gather over the
            ranks; None if each rank has the channels that it needs.
        padding: channels of zeros to append to the input.
    """

    calls: tuple[KernelCall, ...]
    input_channels: str | None
    padding: int

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out], both of this rank."""
        if self.input_channels is not None:
            x = tensor_model_parallel_all_gather(x).index_select(-1, getattr(layer, self.input_channels))
        if self.padding:
            x = pad(x, (0, self.padding))
        outputs = [
            call.apply(
                x,
                [getattr(layer, name) for name in call.packed],
                call.out_features,
                None if call.input_permutation is None else getattr(layer, call.input_permutation),
                None if bias is None else bias[call.start : call.start + call.out_features],
            )
            for call in self.calls
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def packed_bytes(self, layer: torch.nn.Module) -> int:
        return sum(getattr(layer, name).nbytes for call in self.calls for name in call.packed)


def pack_linear(layer: LinearBase, weights: Weights, groups: Sequence[RowGroup], dtype: torch.dtype) -> PackedLinear:
    """Pack `weights` for the kernels that serve them, and register what the kernels need on `layer`.

    Args:
        weights: padded, of this rank, in the checkpoint's order of input channels.
        groups: all rows of the layer. Where a rank needs channels of another, there is one group only.
        dtype: of the activations.
    """
    columns, device = weights.in_features - weights.padding, weights.device
    calls, input_channels = [], None
    for group in groups:
        permutation, crosses_ranks = local_permutation(group.permutation, layer, columns)
        if crosses_ranks:
            input_channels = "input_channels"
            set_parameter(layer, input_channels, torch.from_numpy(permutation).to(device))
            permutation = None
        kernel, packed = choose_and_pack(weights.rows(group.start, group.count), dtype)
        start = group.start
        names = [f"weight_packed_{start}_{i}" if start or i else "weight_packed" for i in range(len(packed))]
        for name, tensor in zip(names, packed):
            set_parameter(layer, name, tensor)
        permutation_name = None
        if permutation is not None:
            permutation_name = f"input_permutation_{group.start}"
            permutation = np.concatenate([permutation, np.arange(columns, weights.in_features, dtype=np.int32)])
            set_parameter(layer, permutation_name, torch.from_numpy(permutation).to(device))
        calls.append(KernelCall(kernel.NAME, kernel.apply, tuple(names), permutation_name, group.start, group.count))
    return PackedLinear(tuple(calls), input_channels, weights.padding)


def choose_and_pack(weights: Weights, dtype: torch.dtype) -> tuple[ModuleType, tuple[torch.Tensor, ...]]:
    """The kernel for these weights under activations of `dtype`, and the weights as it packs them.

    Quantized values are widened to `dtype` for a kernel that cannot multiply them.
    """
    layer = (weights.device, dtype, weights.out_features, weights.in_features)
    kernel = kernels.choose(*layer)
    values, bitmask = weights.parts["compressed"], weights.parts["bitmask"]
    if weights.format != FLOAT and kernels.keeps_quantized(kernel, *layer, values.dtype):
        return kernel, kernel.pack(values, bitmask, weights.parts["weight_scale"][:, 0])
    return kernel, kernel.pack(weights.widened(dtype).parts["compressed"], bitmask)


def local_permutation(
    permutation: np.ndarray | None, layer: LinearBase, columns: int
) -> tuple[np.ndarray | None, bool]:
    """The part of a permutation of the whole input that concerns the `columns` stored columns of this rank.

    Returns:
        int32 [columns], and whether it counts the channels of the whole input instead of this rank's own. It does on
        every rank if any rank has a column whose channel lives on another, because all must gather together.
    """
    if permutation is None or columns == len(permutation):
        return permutation, False
    shards = permutation.reshape(-1, columns)
    first = np.arange(len(shards), dtype=permutation.dtype)[:, None] * columns
    crosses = bool(((shards < first) | (shards >= first + columns)).any())
    mine = shards[layer.tp_rank]
    return (mine if crosses else mine - first[layer.tp_rank]), crosses
