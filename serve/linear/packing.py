"""From the weights of a layer to the calls of kernels that compute it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.errors import RiaError
from ria_vllm.format.weight_scheme import Weights
from ria_vllm.serve.kernels.registry import Choice, choose_and_pack
from ria_vllm.serve.linear.parameters import set_parameter


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
    """One call of a kernel, for the rows of a layer from `start` on.

    Tensors are named, not held, because vLLM replaces a layer's parameters when it reloads weights.

    Attributes:
        choice: the kernel, and the rows as a layer of their own.
        packed: names of the layer's parameters that hold the packed weights.
        input_permutation: name of the parameter with the order in which the kernel takes the input channels, or None.
    """

    choice: Choice
    packed: tuple[str, ...]
    input_permutation: str | None
    start: int

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in with padding] -> [..., rows]. bias: [out] of the whole layer, or None."""
        config = self.choice.config
        return self.choice.kernel.apply(
            config,
            x,
            [getattr(layer, name) for name in self.packed],
            None if self.input_permutation is None else getattr(layer, self.input_permutation),
            None if bias is None else bias[self.start : self.start + config.out_features],
        )


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
        outputs = [call.apply(layer, x, bias) for call in self.calls]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters of the layer that it needs."""
        names = [name for call in self.calls for name in (*call.packed, call.input_permutation)]
        return [name for name in (*names, self.input_channels) if name is not None]

    def packed_bytes(self, layer: torch.nn.Module) -> int:
        return sum(getattr(layer, name).nbytes for call in self.calls for name in call.packed)


def pack_linear(
    layer: LinearBase,
    weights: Weights,
    groups: Sequence[RowGroup],
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
) -> PackedLinear:
    """Pack `weights` for the kernels that serve them, and register what the kernels need on `layer`.

    Args:
        weights: padded, of this rank, in the checkpoint's order of input channels.
        groups: all rows of the layer. Where a rank needs channels of another, there is one group only.
        dtype: of the activations.
        input_dtype: to which a kernel that can may round them, see `LinearLayerConfig`.
    """
    columns, device = weights.in_features - weights.padding, weights.device
    calls, input_channels = [], None
    for group in groups:
        permutation, crosses_ranks = local_permutation(group.permutation, layer, columns)
        if crosses_ranks:
            if len(groups) > 1:
                raise RiaError(
                    "linears of one layer have different permutations that need channels of other ranks. Use "
                    "--tensor-parallel-size 1, or compress the model again."
                )
            input_channels = "input_channels"
            set_parameter(layer, input_channels, torch.from_numpy(permutation).to(device))
            permutation = None
        choice, packed = choose_and_pack(weights.rows(group.start, group.count), dtype, input_dtype)
        start = group.start
        # vLLM's latent attention looks for this name in kv_b_proj, and then multiplies the layer by the identity to get
        # the plain weight, in the order of rows that folds have given it.
        names = [f"weight_packed_{start}_{i}" if start or i else "weight_packed" for i in range(len(packed))]
        for name, tensor in zip(names, packed):
            set_parameter(layer, name, tensor)
        permutation_name = None
        if permutation is not None:
            permutation_name = f"input_permutation_{group.start}"
            permutation = np.concatenate([permutation, np.arange(columns, weights.in_features, dtype=np.int32)])
            set_parameter(layer, permutation_name, torch.from_numpy(permutation).to(device))
        calls.append(KernelCall(choice, tuple(names), permutation_name, group.start))
    return PackedLinear(tuple(calls), input_channels, weights.padding)


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
