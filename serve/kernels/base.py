"""The interface of kernels for 2:4 linears, in vLLM's terms: `LinearKernel`, which is given a `LinearLayerConfig`.

A kernel is a class that is never instantiated. It holds no state: all it needs to know about a layer is in the config
and in the tensors that `pack` returns. Ours are listed in `ria_vllm.serve.kernels.registry`; those of other packages
come through the entry point group `ria_vllm.linear_kernels`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ria_vllm.formats import WeightFormat, name_of


@dataclass(frozen=True)
class LinearLayerConfig:
    """A linear, or one rank's part of it, for a kernel to serve.

    Attributes:
        device: where weights and activations are.
        act_dtype: of the activations that come in and of the output.
        weight_format: how the weights are stored when `pack` gets them; float ones have `act_dtype`.
        out_features: N.
        in_features: K, with its padding.
    """

    device: torch.device
    act_dtype: torch.dtype
    weight_format: WeightFormat
    out_features: int
    in_features: int

    @property
    def group_size(self) -> int | None:
        """Stored columns that share a scale; None if a scale belongs to a whole row, or there is none."""
        return self.weight_format.group_size

    def __str__(self) -> str:
        return (
            f"a {self.out_features} x {self.in_features} layer with {self.weight_format.name} weights and "
            f"{name_of(self.act_dtype)} activations on {self.device}"
        )


class LinearKernel(Protocol):
    """The product y[..., N] = x[..., p] @ W^T + bias for a 2:4 weight W [N, K], accumulated in float32.

    Attributes:
        name: what RIA_VLLM_BACKEND and the log call it.
        is_fallback: it is correct but slow. Other kernels are preferred, even if they need the weights widened.
    """

    name: ClassVar[str]
    is_fallback: ClassVar[bool]

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        """Why this device cannot run the kernel at all, or None. It must not raise.

        For a kernel of another kind of device: f"the layer is on {device.type}".
        """

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        """Why the kernel cannot serve this layer on a device that is supported, or None. It must not raise."""

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The kernel's own form of a weight. Nothing in it may alias the given tensors.

        Each tensor becomes a parameter of the layer, made contiguous. A reload packs again and must give the same
        shapes and dtypes.

        Args:
            parts: the tensors of `config.weight_format` by name. Their shapes and dtypes fit, the bitmask is 2:4, and
                scales are finite; they may be zero.
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
            x: [..., K], `config.act_dtype`; perhaps without any tokens, and with any strides.
            packed: what `pack` returned.
            input_permutation: int32 [K], the order in which to take x's channels, or None.
            bias: [N], `config.act_dtype`, or None. It may be a slice, and so need not be aligned.

        Returns:
            [..., N], `config.act_dtype`.
        """
