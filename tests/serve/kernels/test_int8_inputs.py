"""Products with inputs rounded to int8, bit for bit against integers in numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_layers import pack, random_parts
from random_experts import random_experts, random_routing

from ria_vllm.format.formats import INTEGERS
from ria_vllm.serve.kernels import int8_inputs
from ria_vllm.serve.kernels.base import Activation
from ria_vllm.serve.kernels.reference import ReferenceKernel
from ria_vllm.serve.kernels.reference_experts import ReferenceExpertsKernel

BF16, F32 = torch.bfloat16, np.float32
FORMATS = pytest.mark.parametrize("format", INTEGERS.values(), ids=lambda one: one.name)


def kept_integers(format, parts):
    """int64 [N, K], from the bytes that are stored."""
    stored = parts["compressed"].numpy()
    if format.num_bits == 4:
        nibbles = np.stack([stored % 16, stored // 16], -1).reshape(len(stored), -1).astype(np.int64) - 8
        stored = nibbles
    mask = np.unpackbits(parts["bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
    dense = np.zeros(mask.shape, dtype=np.int64)
    dense[mask] = stored.reshape(-1)
    return dense


def exact(x, format, parts, bias=None):
    """float32 [T, N]: the definition, token by token."""
    weight, scales = kept_integers(format, parts), parts["weight_scale"].float().numpy()
    y = np.zeros((len(x), len(weight)), dtype=F32)
    for t, token in enumerate(x.float().numpy()):
        largest = np.abs(token).max()
        q, scale = np.zeros(len(token), dtype=np.int64), F32(1)
        if largest > 0:
            with np.errstate(over="ignore"):
                factor = min(F32(127) / largest, np.finfo(F32).max)
            q, scale = np.clip(np.rint(token * factor), -127, 127).astype(np.int64), largest / F32(127)
        for start in range(0, len(token), len(token) // scales.shape[1]):
            columns = slice(start, start + len(token) // scales.shape[1])
            sums = (weight[:, columns] @ q[columns]).astype(F32)
            y[t] = y[t] + sums * scales[:, start * scales.shape[1] // len(token)]
        y[t] = y[t] * scale
    return torch.from_numpy(y if bias is None else y + bias.float().numpy())


def tokens(columns, dtype, seed=1):
    """Ordinary ones, one with an outlier, zeros, tiny ones, and halves that go to even integers."""
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(seed))
    x[1, 3] = 1000
    x[2] = 0
    x[3] *= 1e-30
    x[4] *= 1e-40
    x[5] = (torch.arange(columns) % 254 - 127) / 2 + 0.0
    x[5, 0] = 127
    return x.to(dtype)


@FORMATS
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_the_reference_gives_the_bits_of_the_definition(format, dtype):
    parts, _ = random_parts(40, 256, format, dtype)
    layer = pack(ReferenceKernel, parts, format, dtype)
    layer = replace(layer, config=replace(layer.config, input_dtype=torch.int8))
    assert ReferenceKernel.can_implement(layer.config) is None
    x, p = tokens(256, dtype), torch.randperm(256, dtype=torch.int32)
    bias = torch.randn(40).to(dtype)
    for permutation, given in ((None, None), (p, bias)):
        ordered = x if permutation is None else x[:, permutation.long()]
        want = exact(ordered, format, parts, given).to(dtype)
        got = layer(x, permutation, given)
        assert got.dtype == dtype and got.isfinite().all() and torch.equal(got, want)
    assert torch.equal(layer(x.view(7, 1, 256))[:, 0], layer(x)) and layer(x[:0]).shape == (0, 40)


def test_sums_beyond_what_float32_holds_exactly():
    format, columns = INTEGERS[8, None], 1 << 12
    weight = torch.full((16, columns), 1.0)
    weight[:, ::3] *= 0.993
    mask = torch.tensor([True, True, False, False]).repeat(16, columns // 4)
    parts = format.encode(*format.quantize(weight * mask, torch.float32)[:1], mask, torch.full((16, 1), 1 / 127))
    x = torch.ones(1, columns)
    x[0, 1::5] = 0.99
    assert abs(kept_integers(format, parts) @ np.full(columns, 126)).min() > 1 << 24
    assert torch.equal(int8_inputs.linear(x, format, parts, None), exact(x, format, parts))


@FORMATS
def test_experts(format):
    """The tokens are rounded before the first product, and what lies between the products before the second.

    The activation is one that every machine computes alike.
    """
    stored = random_experts(3, 256, 128, Activation("relu2", is_gated=False), format=format, biased=True)
    config = replace(stored.config, input_dtype=torch.int8)
    assert ReferenceExpertsKernel.can_implement(config) is None
    packed = ReferenceExpertsKernel.pack(config, stored.gate_up, stored.down, *stored.biases)
    x, (weights, ids) = tokens(256, BF16), random_routing(7, 1, 3)
    permutation = torch.randperm(256, dtype=torch.int32)
    got = ReferenceExpertsKernel.apply(config, x, weights, ids, packed, permutation, None)
    want = torch.zeros(7, 256)
    for t, expert in enumerate(ids[:, 0].tolist()):
        if expert >= 0:
            first, second = ({name: part[expert] for name, part in p.items()} for p in (stored.gate_up, stored.down))
            up = exact(x[t : t + 1, permutation.long()], format, first, stored.biases[0][expert])
            inner = (up.clamp(min=0) * up.clamp(min=0)).to(BF16)
            want[t] = (exact(inner, format, second, stored.biases[1][expert]) * weights[t])[0]
    assert (ids >= 0).any() and torch.equal(got, want.to(BF16))
