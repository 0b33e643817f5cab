"""A Llama model that decodes one token for each sequence of a batch, in plain torch, dense or 2:4. Part of gpu_session.

It stands in for vLLM, whose CUDA wheel does not fit on every machine with a GPU. Its linears are fused as vLLM fuses
them (q, k, v; gate, up), and a sparse one calls its kernel as serve/linear/packing.py does. The weights are random.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

from ria_vllm.format.formats import FLOAT
from ria_vllm.serve.kernels.base import LinearLayerConfig
from ria_vllm.serve.kernels.registry import choose

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and `context`, the number of tokens in each sequence's KV cache."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int
    context: int = 512

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """(out_features, in_features, permuted) of a layer's linears. Those that read the residual stream pay for the
        gather of their input; the other two fold it into the rows of the linears before them."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (heads + 2 * kv, self.hidden, True),
            "o": (self.hidden, heads, False),
            "gate_up": (2 * self.intermediate, self.hidden, True),
            "down": (self.hidden, self.intermediate, False),
        }


class DenseLinear(torch.nn.Module):
    """weight: [out, in]; computed in the dtype of x."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight.to(x.dtype))


class SparseLinear(torch.nn.Module):
    """A 2:4 linear under the kernel that the registry chooses for it.

    Args:
        stored: [out, in], 2:4.
        permutation: int32 [in], the order of the input channels in `stored`, or None.
    """

    def __init__(self, stored: torch.Tensor, permutation: torch.Tensor | None):
        super().__init__()
        self.choice = choose(LinearLayerConfig(stored.device, stored.dtype, FLOAT, *stored.shape))
        packed = self.choice.kernel.pack(self.choice.config, FLOAT.encode(stored, None, None))
        self.names = tuple(f"packed_{index}" for index in range(len(packed)))
        for name, tensor in zip(self.names, packed):
            self.register_buffer(name, tensor)
        self.register_buffer("permutation", permutation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = [getattr(self, name) for name in self.names]
        return self.choice.kernel.apply(self.choice.config, x, packed, self.permutation, None)


def _random_linear(
    out_features: int, in_features: int, permuted: bool, generator: torch.Generator
) -> tuple[DenseLinear, SparseLinear]:
    """The same 2:4 weight twice."""
    device = generator.device
    weight = torch.randn(out_features, in_features, dtype=DTYPE, device=device, generator=generator) * in_features**-0.5
    stored = FLOAT.decode(FLOAT.encode(weight, None, None), DTYPE)
    if not permuted:
        return DenseLinear(stored), SparseLinear(stored, None)
    p = torch.randperm(in_features, device=device, generator=generator)
    dense = torch.empty_like(stored)
    dense[:, p] = stored
    return DenseLinear(dense), SparseLinear(stored, p.int())


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight.to(x.dtype)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, dim] at the position of `cosine` and `sine`, [dim / 2] each, float32."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


class Caches(torch.nn.Module):
    """The keys and values of one layer, [batch, kv heads, context, dim]: random; each step writes the last position. A
    dense and a sparse model share them.
    """

    def __init__(self, shape: Shape, batch: int, generator: torch.Generator):
        super().__init__()
        sizes = (2, batch, shape.kv_heads, shape.context, shape.head_dim)
        keys, values = torch.randn(sizes, dtype=DTYPE, device=generator.device, generator=generator)
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)


class DecoderLayer(torch.nn.Module):
    """One decoder layer.

    Args:
        linears: qkv, o, gate_up and down.
        norms: weights [hidden] before the attention and before the MLP.
    """

    def __init__(self, shape: Shape, linears: dict[str, torch.nn.Module], norms: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim
        self.qkv, self.o, self.gate_up, self.down = (linears[name] for name in shape.linears)
        self.register_buffer("input_norm", norms[0])
        self.register_buffer("post_norm", norms[1])
        device = norms[0].device
        position = shape.context - 1
        angles = position * 500000.0 ** (-torch.arange(0, self.dim, 2, device=device) / self.dim)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        self.register_buffer("position", torch.tensor([position], device=device))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual [batch, hidden], to be added -> the same after this layer."""
        batch, group = x.shape[0], self.heads // self.kv_heads
        residual = x + residual
        qkv = self.qkv(_norm(residual, self.input_norm)).view(batch, -1, self.dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = _rotate(q, self.cosine, self.sine), _rotate(k, self.cosine, self.sine)
        keys[:, :, self.position] = k[:, :, None].to(keys.dtype)
        values[:, :, self.position] = v[:, :, None].to(values.dtype)
        # All heads of a group are queries to the same keys: no mask, and no copy of the keys for each head.
        q = q.reshape(batch, self.kv_heads, group, self.dim)
        attended = scaled_dot_product_attention(q, keys.to(q.dtype), values.to(q.dtype))
        residual = residual + self.o(attended.reshape(batch, -1))
        gate, up = self.gate_up(_norm(residual, self.post_norm)).chunk(2, -1)
        return self.down(silu(gate) * up), residual


class Model:
    """Embedding, layers, norm and output of a model without state but its caches.

    Args:
        layers: dense or sparse.
        embedding: [vocabulary, hidden], also the output's weight.
        norm: [hidden].
    """

    def __init__(self, layers: list[DecoderLayer], caches: list[Caches], embedding: torch.Tensor, norm: torch.Tensor):
        self.layers, self.caches, self.embedding, self.norm = layers, caches, embedding, norm

    def step(self, tokens: torch.Tensor, layer_function: Callable, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        """Logits [batch, vocabulary] after tokens [batch], computed in `dtype`.

        Args:
            layer_function: DecoderLayer.forward, or it compiled.
        """
        residual = embedding(tokens, self.embedding).to(dtype)
        x = torch.zeros_like(residual)
        for layer, cache in zip(self.layers, self.caches):
            x, residual = layer_function(layer, x, residual, cache.keys, cache.values)
        return linear(_norm(x + residual, self.norm), self.embedding.to(dtype))


def random_layers(shape: Shape, generator: torch.Generator) -> tuple[DecoderLayer, DecoderLayer]:
    """A dense layer and a sparse one with the same weights."""
    both = {name: _random_linear(*sizes, generator) for name, sizes in shape.linears.items()}
    norms = torch.rand(2, shape.hidden, dtype=DTYPE, device=generator.device, generator=generator) + 0.5
    dense, sparse = ({name: pair[which] for name, pair in both.items()} for which in (0, 1))
    return DecoderLayer(shape, dense, (norms[0], norms[1])), DecoderLayer(shape, sparse, (norms[0], norms[1]))
