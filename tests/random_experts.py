"""Random layers of pruned experts for the tests of kernels, with their result in float64."""

from dataclasses import dataclass
from functools import cache
from math import lcm

import torch
from packed_layers import random_parts
from torch.nn.functional import gelu

from ria_vllm.format.formats import FLOAT
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels.base import Activation, ExpertsLayerConfig

SILU = Activation("silu")
ACTIVATIONS = (
    SILU,
    Activation("silu", limit=0.8),
    Activation("silu", alpha=1.702, beta=1.0, limit=0.7),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("swiglustep", limit=0.3),
    Activation("relu2", is_gated=False),
    Activation("silu", is_gated=False),
    Activation("gelu_tanh", is_gated=False),
)


@dataclass(frozen=True)
class RandomExperts:
    """Weights of experts: as `ExpertsKernel.pack` takes them, and dense in float64 without padding.

    dense_gate_up: [E, 2 I, H], or [E, I, H] without a gate.
    dense_down: [E, H, I].
    """

    config: ExpertsLayerConfig
    gate_up: dict[str, torch.Tensor]
    down: dict[str, torch.Tensor]
    dense_gate_up: torch.Tensor
    dense_down: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor] | None

    def packed(self, kernel):
        return kernel.pack(self.config, self.gate_up, self.down, *(self.biases or (None, None)))

    def exact(self, x, weights, ids, permutation=None, products_rounded=False):
        """What the layer should give in float64, and how far off rounding may put a kernel. ids: numbers on this rank.

        The kernel multiplies and adds in float32, and rounds h to the activations' dtype, and products if they say so.
        """
        activation, eps = self.config.activation, torch.finfo(self.config.act_dtype).eps
        x64 = x.double() if permutation is None else x.double()[:, permutation.long()]
        y, error = torch.zeros_like(x64), torch.zeros_like(x64)
        for e in range(self.config.num_experts):
            share = (weights.double() * (ids == e)).sum(1, keepdim=True)
            first, second = self.dense_gate_up[e], self.dense_down[e]
            a, a_error = x64 @ first.T, x64.abs() @ first.abs().T * _float32_error(first)
            b = x64.new_zeros(second.shape[0])
            if self.biases:
                a, b = a + self.biases[0][e].double(), self.biases[1][e].double()
                a_error = a_error + 2.0**-23 * self.biases[0][e].double().abs()
            if products_rounded:
                a_error = a_error + a.abs() * eps / 2 * 1.01
            h, h_error = activated(activation, a, a_error)
            h_error = h_error + h.abs() * eps / 2 * 1.01
            result = h @ second.T + b
            y += share * result
            magnitude = (h.abs() @ second.abs().T + b.abs()) * (_float32_error(second) + 2.0**-22)
            if products_rounded:
                h_sum = h_error @ second.abs().T
                magnitude = magnitude + (result.abs() + h_sum + magnitude) * eps / 2 * 1.01
            error += (share * (h_error @ second.abs().T + magnitude)).abs()
        return y, error + eps / 2 * 1.01 * y.abs() + 1e-9


def _float32_error(weight: torch.Tensor) -> float:
    return (weight.shape[-1] // 2 + 4) * 2.0**-24


def activated(activation: Activation, a: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h in float64 for a first product with these errors, and its own error."""
    limit = float("inf") if activation.limit is None else activation.limit
    if not activation.is_gated:
        steep = 2 * a.abs() + 1 if activation.name == "relu2" else 1.2
        return _function(activation, a), steep * error + 2.0**-21 * a.abs()
    (gate, up), (gate_error, up_error) = a.chunk(2, dim=1), error.chunk(2, dim=1)
    step = activation.name == "swiglustep"
    f = _function(activation, gate if step else gate.clamp(max=limit))
    f = f.clamp(max=limit) if step else f
    up = up.clamp(-limit, limit) + activation.beta
    return f * up, 1.2 * gate_error * up.abs() + f.abs() * up_error + 2.0**-21 * gate.abs() * up.abs()


def _function(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    if activation.name == "relu2":
        return x.clamp(min=0) ** 2
    if activation.name.startswith("gelu"):
        return gelu(x, approximate="tanh" if activation.name == "gelu_tanh" else "none")
    return x / (1 + torch.exp(-activation.alpha * x))


@cache
def random_experts(
    experts: int = 4,
    hidden: int = 128,
    intermediate: int = 64,
    activation: Activation = SILU,
    dtype: torch.dtype = torch.bfloat16,
    format: WeightFormat = FLOAT,
    biased: bool = False,
    seed: int = 0,
    pattern: Pattern = TWO_OF_FOUR,
) -> RandomExperts:
    """Columns are padded to multiples of 64 and to whole groups. The tensors are shared by all who ask for the same."""
    config = ExpertsLayerConfig(
        torch.device("cpu"), dtype, format, experts, hidden, intermediate, activation, has_bias=biased, pattern=pattern
    )
    weights = []
    for rows, columns in ((config.gate_up_rows, hidden), (hidden, intermediate)):
        padding = -columns % lcm(64, format.column_multiple)
        multiple = lcm(format.column_multiple, pattern.of)
        parts, dense = [], []
        for e in range(experts):
            part_seed = seed * 1000 + e * 2 + (rows == hidden)
            if padding % multiple:  # a group ends in the padding, whose weights do not matter
                stored, weight = random_parts(rows, columns + padding, format, dtype, part_seed, pattern)
            else:
                stored, weight = random_parts(rows, columns, format, dtype, part_seed, pattern)
                stored = format.pad_columns(stored, padding) if padding else stored
            parts.append(stored)
            dense.append(weight[:, :columns])
        weights.append(({name: torch.stack([p[name] for p in parts]) for name in parts[0]}, torch.stack(dense)))
    generator = torch.Generator().manual_seed(seed)
    biases = tuple(torch.randn(experts, rows, generator=generator).to(dtype) for rows in (config.gate_up_rows, hidden))
    (gate_up, dense_gate_up), (down, dense_down) = weights
    return RandomExperts(config, gate_up, down, dense_gate_up, dense_down, biases if biased else None)


def random_routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 and ids int32 [tokens, k]. A token may name an expert twice, and -1 is no expert."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    return torch.rand(tokens, top_k, generator=generator), ids
