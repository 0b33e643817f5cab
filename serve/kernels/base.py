"""What a kernel for 2:4 linears is: `LinearKernel`, asked with a `LinearLayerConfig`, in vLLM's own words.

A kernel is a class that is never instantiated. It holds no state: all it needs of a layer are the tensors that `pack`
made. Ours are listed in `ria_vllm.serve.kernels.registry`; those of other packages come through the entry point group
`ria_vllm.linear_kernels`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ria_vllm.formats import WeightFormat, name_of


@dataclass(frozen=True)
class LinearLayerConfig:
    """One linear of one rank, as a kernel is to serve it.

    Attributes:
        device: where weights and activations are.
        act_dtype: of the activations that come in and of the output.
        weight_format: how the weights are stored when `pack` gets them; float ones have `act_dtype`.
        out_features: N.
        in_features: K, with its padding.
        group_size: stored columns that share a scale; None where a scale belongs to a whole row, or there is none.
    """

    device: torch.device
    act_dtype: torch.dtype
    weight_format: WeightFormat
    out_features: int
    in_features: int
    group_size: int | None = None

    def __str__(self) -> str:
        return (
            f"a {self.out_features} x {self.in_features} layer with {self.weight_format.name} weights and "
            f"{name_of(self.act_dtype)} activations on {self.device}"
        )


class LinearKernel(Protocol):
    """The product y[..., N] = x[..., p] @ W^T + bias for a 2:4 weight W [N, K], accumulated in float32.

    Attributes:
        name: what RIA_VLLM_BACKEND and the log call it.
        is_fallback: it is right where it runs, and slow: other kernels go first, even with widened weights.
    """

    name: ClassVar[str]
    is_fallback: ClassVar[bool]

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        """Why this device cannot run the kernel at all, or None."""

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        """Why the kernel cannot serve this layer on a device that is supported, or None."""

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The kernel's own form of a weight; nothing in it may alias the given tensors.

        Args:
            parts: the tensors of `config.weight_format` by name. They have passed its `check`.
        """

    @staticmethod
    def apply(
        config: LinearLayerConfig,
        x: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The product. torch.compile traces it, and CUDA graphs capture it.

        Args:
            x: [..., K], `config.act_dtype`.
            packed: what `pack` gave.
            input_permutation: int32 [K] or None: x's channels are taken in this order.
            bias: [N], `config.act_dtype`, or None.

        Returns:
            [..., N], `config.act_dtype`.
        """
