"""The interfaces of kernels, in vLLM's terms.

`LinearKernel` is for a pruned linear and is given a `LinearLayerConfig`; `ExpertsKernel` is for a layer's routed
experts and is given an `ExpertsLayerConfig`.

A kernel is a class that is never instantiated. It holds no state: all it needs to know about a layer is in the config
and in the tensors that `pack` returns. `ria_vllm.serve.kernels.registry` lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from ria_vllm.format.formats import FORMATS, IntFormat
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.sparse24 import VALUE_DTYPES
from ria_vllm.format.weight_format import WeightFormat, name_of


@dataclass(frozen=True)
class LinearLayerConfig:
    """A linear, or one rank's part of it, for a kernel to serve.

    Attributes:
        device: where weights and activations are.
        act_dtype: of the activations that come in and of the output.
        weight_format: how the weights are stored when `pack` gets them; float ones have `act_dtype`.
        out_features: N.
        in_features: K, with its padding.
        input_dtype: torch.int8 if the kernel rounds each token of the input to int8, with a scale of its own, as
            `ria_vllm.serve.kernels.int8_inputs` defines it; then the weights are integers. Where tensor parallelism
            cuts the input, each rank rounds its own channels by their largest. None: inputs are not rounded. Kernels
            round the inputs of fp8 weights to fp8 in any case.
        pattern: of the weights' bitmask.
    """

    device: torch.device
    act_dtype: torch.dtype
    weight_format: WeightFormat
    out_features: int
    in_features: int
    input_dtype: torch.dtype | None = None
    pattern: Pattern = TWO_OF_FOUR

    @property
    def group_size(self) -> int | None:
        """Stored columns that share a scale; None if a scale belongs to a whole row, or there is none."""
        return self.weight_format.group_size

    def __str__(self) -> str:
        return (
            f"a {self.out_features} x {self.in_features} layer with {_weights(self)} and {_activations(self)} on "
            f"{self.device}"
        )


def cannot_decode(config: "LinearLayerConfig | ExpertsLayerConfig") -> str | None:
    """Why the reference kernels, for linears and for experts, cannot serve such weights and activations, or None."""
    if FORMATS.get(config.weight_format.name) != config.weight_format:
        return f"{config.weight_format.name} is not in ria_vllm.format.formats.FORMATS"
    if config.act_dtype not in VALUE_DTYPES:
        return f"dtype {name_of(config.act_dtype)}; {', '.join(map(name_of, VALUE_DTYPES))} only"
    if config.input_dtype not in (None, torch.int8):
        return f"no {name_of(config.input_dtype)} inputs"
    if config.input_dtype is not None and not isinstance(config.weight_format, IntFormat):
        return f"no {name_of(config.input_dtype)} inputs for {config.weight_format.name} weights"
    return None


def no_such_product(config: LinearLayerConfig) -> str:
    """What a kernel says that does not multiply weights in such a format with such inputs."""
    inputs = "unrounded" if config.input_dtype is None else name_of(config.input_dtype)
    return f"no {config.weight_format.name} weights with {inputs} inputs"


def _weights(config: "LinearLayerConfig | ExpertsLayerConfig") -> str:
    pattern = "" if config.pattern == TWO_OF_FOUR else f" {config.pattern}"
    return f"{config.weight_format.name}{pattern} weights"


def _activations(config: "LinearLayerConfig | ExpertsLayerConfig") -> str:
    rounded = "" if config.input_dtype is None else f" (rounded to {name_of(config.input_dtype)})"
    return f"{name_of(config.act_dtype)} activations{rounded}"


class AnyKernel(Protocol):
    """What kernels for linears and those for experts have alike.

    Attributes:
        name: what RIA_VLLM_BACKEND and the log call it.
        is_fallback: it is correct but slow. Other kernels are preferred, even if they need the weights widened.
        patterns: the patterns that it may be asked for; those of a kernel without this attribute are 2:4 alone.
    """

    name: ClassVar[str]
    is_fallback: ClassVar[bool]

    @staticmethod
    def is_supported(device: torch.device) -> str | None:
        """Why this device cannot run the kernel at all, or None. It must not raise.

        For a kernel of another kind of device: f"the layer is on {device.type}".
        """


class LinearKernel(AnyKernel, Protocol):
    """The product y[..., N] = x[..., p] @ W^T + bias for a pruned weight W [N, K], accumulated in float32."""

    @staticmethod
    def can_implement(config: LinearLayerConfig) -> str | None:
        """Why the kernel cannot serve this layer on a device that is supported, or None. It must not raise."""

    @staticmethod
    def pack(config: LinearLayerConfig, parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The kernel's own form of a weight. Nothing in it may alias the given tensors.

        Each tensor becomes a parameter of the layer, made contiguous.

        Args:
            parts: the tensors of `config.weight_format` by name. Their shapes and dtypes fit, the bitmask has
                the pattern, and scales are finite; they may be zero.
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
            input_permutation: int32 [K], by which to gather x's channels, or None.
            bias: [N], `config.act_dtype`, or None. It may be a slice, and so need not be aligned.

        Returns:
            [..., N], `config.act_dtype`.
        """


@dataclass(frozen=True)
class Activation:
    """What an expert computes between its two products: h = f(gate) * (up + beta), or h = f(up) without a gate.

    With a `limit`, gates above it become `limit`, and `up` is clamped to [-limit, limit]; for "swiglustep", f(gate) is
    clamped in place of the gate. vLLM's swigluoai is ("silu", alpha=1.702, beta=1, limit=7).

    Attributes:
        name: f. silu: g * sigmoid(alpha * g); gelu: with erf; gelu_tanh: its approximation; relu2: max(g, 0)^2;
            swiglustep: silu, clamped afterwards.
        is_gated: the first product gives a gate and an up for each intermediate channel.
        alpha: for silu and swiglustep only.
        beta: with a gate only.
        limit: with a gate only.
    """

    name: Literal["silu", "gelu", "gelu_tanh", "relu2", "swiglustep"]
    is_gated: bool = True
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None


@dataclass(frozen=True)
class ExpertsLayerConfig:
    """The routed experts of a layer, or one rank's part of them, for a kernel to serve.

    Attributes:
        device: where weights and activations are.
        act_dtype: of the activations that come in and of the output.
        weight_format: how all the weights are stored when `pack` gets them; float ones have `act_dtype`.
        num_experts: E, those of this rank.
        hidden_size: H, channels of a token, without padding.
        intermediate_size: I, channels between an expert's products on this rank, without padding.
        activation: between the products.
        has_bias: both products have one.
        input_dtype: as in `LinearLayerConfig`, for both products.
        pattern: likewise.
        router_weight_on_input: the router's weights multiply the tokens, before the first product and rounded to
            `act_dtype`, instead of the experts' results. Each token then has one expert: k = 1.
    """

    device: torch.device
    act_dtype: torch.dtype
    weight_format: WeightFormat
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    has_bias: bool = False
    router_weight_on_input: bool = False
    input_dtype: torch.dtype | None = None
    pattern: Pattern = TWO_OF_FOUR

    @property
    def gate_up_rows(self) -> int:
        """Rows of an expert's first product: 2 I with a gate, else I."""
        return self.intermediate_size * (2 if self.activation.is_gated else 1)

    def weighted(self, x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the first product reads of x [T, H], and what the results are multiplied by, [T, k]."""
        if not self.router_weight_on_input:
            return x, topk_weights
        return x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)

    def __str__(self) -> str:
        return (
            f"a layer of {self.num_experts} experts ({self.hidden_size} x {self.intermediate_size}) with "
            f"{_weights(self)} and {_activations(self)} on {self.device}"
        )


class ExpertsKernel(AnyKernel, Protocol):
    """The sum over a token's experts of router weight * down(activation(gate(x), up(x))), with pruned weights.

    Products and the sum accumulate in float32; between the products the channels are rounded to `act_dtype`. With an
    `input_dtype`, each token is rounded before the first product, and the channels between the products before the
    second. A kernel for GPUs may round the products to `act_dtype`, too, as vLLM's own experts do.

    Attributes:
        linears: the kernel for linears that it multiplies with, to be tested in its place, if there is one.
    """

    @staticmethod
    def can_implement(config: ExpertsLayerConfig) -> str | None:
        """Why the kernel cannot serve this layer on a device that is supported, or None. It must not raise."""

    @staticmethod
    def pack(
        config: ExpertsLayerConfig,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """The kernel's own form of all experts. Nothing in it may alias the given tensors.

        Each tensor becomes a parameter of the layer, made contiguous.

        Args:
            gate_up: the tensors of `config.weight_format` by name, each with the experts as first dimension: of a
                weight [E, 2 I, H], the I rows of gate before those of up, or [E, I, H] without a gate. The rows of gate
                and of up are permuted as the columns of the expert's down are. Columns are padded with zeros to a
                multiple of `sparse24.IN_FEATURES_MULTIPLE`. Shapes and dtypes fit, bitmasks have the pattern, and
                scales are finite; they may be zero.
            down: the same of a weight [E, H, I], columns padded likewise.
            gate_up_bias: [E, 2 I] or [E, I], `config.act_dtype`, if and only if `config.has_bias`.
            down_bias: [E, H], likewise.
        """

    @staticmethod
    def apply(
        config: ExpertsLayerConfig,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        packed: Sequence[torch.Tensor],
        input_permutation: torch.Tensor | None,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        """What the experts make of each token. torch.compile traces it.

        Args:
            x: [T, H], `config.act_dtype`; perhaps without any tokens, and with any strides.
            topk_weights: float32 [T, k].
            topk_ids: int32 or int64 [T, k], each token's experts; -1 for none. A token may name an expert twice, which
                counts twice.
            packed: what `pack` returned.
            input_permutation: int32 [H], by which gate and up gather x's channels, or None.
            expert_map: int32 [experts of all ranks], the number on this rank of each expert in `topk_ids`; -1 for those
                of other ranks, which add nothing. None: `topk_ids` holds numbers on this rank.

        Returns:
            [T, H], `config.act_dtype`; zeros for a token without experts.

        Raises:
            RuntimeError: an expert that does not exist.
        """
