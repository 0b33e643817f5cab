"""From the weights of a layer to the call of the kernel that computes it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase

from ria_vllm.format.weight_scheme import Weights
from ria_vllm.serve.kernels.registry import LinearChoice, choose_and_pack
from ria_vllm.serve.linear.parameters import set_parameter


@dataclass(frozen=True)
class PackedLinear:
    """How a layer with packed weights is computed.

    Tensors are named, not held, because vLLM may move a layer's parameters.

    Attributes:
        choice: the kernel, and the layer as it serves it.
        packed: names of the layer's parameters that hold the packed weights.
        input_permutation: name of the parameter with the permutation by which the kernel gathers its input, or None.
        input_channels: name of the parameter with the channels to take from the input, after an all-gather over the
            ranks; None if each rank has the channels that it needs.
        padding: channels of zeros to append to the input.
    """

    choice: LinearChoice
    packed: tuple[str, ...]
    input_permutation: str | None
    input_channels: str | None
    padding: int

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., in] -> [..., out], both of this rank."""
        if self.input_channels is not None:
            x = tensor_model_parallel_all_gather(x).index_select(-1, getattr(layer, self.input_channels))
        if self.padding:
            x = pad(x, (0, self.padding))
        return self.choice.kernel.apply(
            self.choice.config,
            x,
            [getattr(layer, name) for name in self.packed],
            None if self.input_permutation is None else getattr(layer, self.input_permutation),
            bias,
        )

    @property
    def parameters(self) -> list[str]:
        """The names of all parameters of the layer that it needs."""
        return [name for name in (*self.packed, self.input_permutation, self.input_channels) if name is not None]

    def packed_bytes(self, layer: torch.nn.Module) -> int:
        return sum(getattr(layer, name).nbytes for name in self.packed)


def pack_linear(
    layer: LinearBase,
    weights: Weights,
    permutation: np.ndarray | None,
    dtype: torch.dtype,
    input_dtype: torch.dtype | None = None,
) -> PackedLinear:
    """Pack `weights` for the kernel that serves them, and register what the kernel needs on `layer`.

    Args:
        weights: padded, of this rank, with columns as the checkpoint has them.
        permutation: int32 [in of the whole layer], that of the columns; None: the input comes as they need it.
        dtype: of the activations.
        input_dtype: to which a kernel that can may round them, see `LinearLayerConfig`.
    """
    columns = weights.in_features - weights.padding
    permutation, crosses_ranks = local_permutation(permutation, layer, columns)
    choice, packed = choose_and_pack(weights, dtype, input_dtype)
    # vLLM's latent attention looks for this name in kv_b_proj, and then multiplies the layer by the identity to get the
    # plain weight, with its rows permuted as folds want them.
    names = tuple(f"weight_packed_{i}" if i else "weight_packed" for i in range(len(packed)))
    for name, tensor in zip(names, packed):
        set_parameter(layer, name, tensor)
    parameter = None
    if permutation is not None:
        parameter = "input_channels" if crosses_ranks else "packed_permutation"  # input_permutation is loaded
        if not crosses_ranks:
            permutation = np.concatenate([permutation, np.arange(columns, weights.in_features, dtype=np.int32)])
        set_parameter(layer, parameter, torch.from_numpy(permutation).to(weights.device))
    gathered, own = (parameter, None) if crosses_ranks else (None, parameter)
    return PackedLinear(choice, names, own, gathered, weights.padding)


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
