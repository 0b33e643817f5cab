"""Compares the kernel cpu for experts, where it rounds what both products read to int8, with a formula, bit for bit.

Every sum is exact, so the formula knows every bit of a product. It also knows those of an activation if that is relu2,
or if the gates are so large that silu returns them unchanged, or so small that it returns zero: with biases, they are.

A module, and a program for the instruction set that RIA_VLLM_CPU_ISA names: it fails at the first deviation.
"""

import hashlib
from dataclasses import replace
from functools import cache

import torch
from random_experts import ACTIVATIONS, SILU, RandomExperts, random_experts, random_routing
from sweep_int8 import BOTH, FORMATS, OF_16, assert_equal, product

from ria_vllm.format import sparse24
from ria_vllm.format.formats import INT4, INT8, IntFormat
from ria_vllm.serve.kernels.base import Activation
from ria_vllm.serve.kernels.cpu.backend import instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel

EXACT = (
    Activation("relu2", is_gated=False),
    SILU,
    Activation("silu", alpha=1.702, beta=1.0, limit=36.0),
)
LARGE, SMALL = 34.0, -125.0
"""Biases of gates. With a product between -10 and 10, e^-gate is nothing beside 1, or infinite."""


@cache
def rounding_experts(activation: Activation = SILU, dtype=torch.bfloat16, format=INT8, **layer) -> RandomExperts:
    """Random experts with biases that round their inputs."""
    experts = random_experts(activation=activation, dtype=dtype, format=format, biased=True, **layer)
    gate_up_bias, down_bias = experts.biases
    if activation.is_gated:
        gate_up_bias = gate_up_bias.clone()
        gates = gate_up_bias[:, : experts.config.intermediate_size]
        gates += torch.where(torch.arange(gates.shape[1]) % 5 == 1, SMALL, LARGE).to(dtype)
    return replace(experts, config=replace(experts.config, input_dtype=torch.int8), biases=(gate_up_bias, down_bias))


def between(activation: Activation, sums: torch.Tensor) -> torch.Tensor:
    """What comes of the first product's sums, in float32; gates are large or small."""
    if not activation.is_gated:
        return sums.clamp(min=0) * sums.clamp(min=0)
    limit = float("inf") if activation.limit is None else activation.limit
    gate, up = sums.chunk(2, 1)
    assert not ((gate > -110) & (gate < 20)).any(), "a gate whose silu is neither itself nor zero"
    gate = torch.where(gate > 0, gate.clamp(max=limit), 0.0)
    return gate * (up.clamp(-limit, limit) + activation.beta)


def formula(experts: RandomExperts, x, weights, ids, permutation=None) -> torch.Tensor:
    """What the kernel promises. ids: numbers on this rank."""
    format, y = experts.config.weight_format, torch.zeros(len(x), x.shape[1])
    x32 = x.float() if permutation is None else x.float()[:, permutation.long()]
    for e in range(experts.config.num_experts):
        first, second = ({name: part[e] for name, part in parts.items()} for parts in (experts.gate_up, experts.down))
        for k in range(ids.shape[1]):
            tokens = (ids[:, k] == e).nonzero()[:, 0]
            if len(tokens):
                inner = between(experts.config.activation, product(x32[tokens], format, first, experts.biases[0][e]))
                results = product(inner.to(x.dtype).float(), format, second, experts.biases[1][e])
                y[tokens] = y[tokens] + weights[tokens, k, None] * results
    return y.to(x.dtype)


def random_x(experts: RandomExperts, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, experts.config.hidden_size) / experts.config.hidden_size**0.5
    x[: tokens // 2] *= torch.rand(tokens // 2, 1)
    return x.to(experts.config.act_dtype)


def check_case(tokens, top_k=2, permuted=True, mapped=False, **layer) -> None:
    experts = rounding_experts(**layer)
    config, x = experts.config, random_x(experts, tokens)
    weights, ids = random_routing(tokens, top_k, config.num_experts * (2 if mapped else 1), seed=tokens)
    permutation = torch.randperm(config.hidden_size, dtype=torch.int32) if permuted else None
    expert_map, local = None, ids
    if mapped:  # half of the experts are another rank's
        expert_map = torch.full((2 * config.num_experts,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(config.num_experts, dtype=torch.int32).flip(0)
        local = torch.where(ids < 0, ids, expert_map[ids.clamp(min=0).long()])
    packed = experts.packed(CpuExpertsKernel)
    y = CpuExpertsKernel.apply(config, x, weights, ids, packed, permutation, expert_map)
    assert_equal(y, formula(experts, x, weights, local, permutation), f"{tokens} tokens, {layer}")


def sweep() -> None:
    for number, format in enumerate(FORMATS):
        for dtype, activation in zip(sparse24.VALUE_DTYPES, EXACT[number % 3 :] + EXACT):
            check_case(13, activation=activation, dtype=dtype, format=format, hidden=192)
        for hidden, intermediate in ((64, 16), (72, 40), (200, 136), (640, 72))[number % 2 :: 2]:
            for activation, pattern in zip(EXACT, BOTH):
                sizes = {"hidden": hidden, "intermediate": intermediate, "activation": activation, "format": format}
                sizes["pattern"] = pattern
                check_case(9, permuted=hidden % 128 != 0, **sizes)
                check_case(1, permuted=False, **sizes)
        for tokens in (0, 1, 2, 5, 8, 20, 40, 77, 150):
            for pattern in BOTH:
                check_case(tokens, 1 + tokens % 4, tokens % 2 == 0, tokens % 3 == 0, format=format, pattern=pattern)
        check_case(300, 2, experts=1, format=format, pattern=OF_16)  # several passes of one expert


def extremes(format: IntFormat) -> None:
    """The largest and smallest integers on both sides, which 16-bit sums of products could not hold."""
    experts = random_experts(2, 256, 128, EXACT[0], torch.float32, format, biased=True)
    experts = replace(experts, config=replace(experts.config, input_dtype=torch.int8))
    for integer in (-(2 ** (format.num_bits - 1)), 2 ** (format.num_bits - 1) - 1):
        byte = integer if format.num_bits == 8 else (integer + 8) * 17
        full = [
            parts | {"compressed": torch.full_like(parts["compressed"], byte)}
            for parts in (experts.gate_up, experts.down)
        ]
        filled = replace(experts, gate_up=full[0], down=full[1])
        for tokens in (1, 5, 50):
            x, (weights, ids) = torch.full((tokens, 256), 3.0), random_routing(tokens, 2, 2)
            x[::3] *= -1
            x[1::4, ::2] *= -1
            y = CpuExpertsKernel.apply(filled.config, x, weights, ids, filled.packed(CpuExpertsKernel), None, None)
            assert_equal(y, formula(filled, x, weights, ids), f"{format.name}, {tokens} tokens, all {integer}")


def special_tokens(activation: Activation, dtype, tokens: int) -> None:
    """Zeros and tiny values; a NaN or an infinity makes all outputs of its own token NaN, and no others."""
    experts = rounding_experts(activation, dtype, INT4, experts=2)
    packed, x = experts.packed(CpuExpertsKernel), random_x(experts, tokens)
    weights, ids = torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)
    x[0], x[1] = 0, torch.finfo(dtype).tiny
    x[2, 5], x[3, 9], x[4, 11] = float("nan"), float("inf"), float("-inf")
    y = CpuExpertsKernel.apply(experts.config, x, weights, ids, packed, None, None)
    finite = torch.ones(tokens, dtype=torch.bool)
    finite[2:5] = False
    want = formula(experts, x[finite], weights[finite], ids[finite])
    assert_equal(y[finite], want, f"{activation}, {dtype}, {tokens} tokens")
    assert y[2:5].isnan().all()


def same_bits(format: IntFormat) -> None:
    """A token's result has the same bits alone, in any batch and with any number of threads. So has the packed form."""
    experts = rounding_experts(format=format, experts=5, hidden=384, intermediate=256)
    packed, permutation = experts.packed(CpuExpertsKernel), torch.randperm(384, dtype=torch.int32)
    x, (weights, ids) = random_x(experts, 230), random_routing(230, 3, 5)
    want = formula(experts, x, weights, ids, permutation)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for first, last in [(0, 230), (0, 1), (7, 9), (5, 17), (100, 230)]:
                part = slice(first, last)
                y = CpuExpertsKernel.apply(experts.config, x[part], weights[part], ids[part], packed, permutation, None)
                assert_equal(y, want[part], f"{format.name}, {count} threads, tokens {first} to {last}")
            assert all(map(torch.equal, experts.packed(CpuExpertsKernel), packed))
    finally:
        torch.set_num_threads(threads)


def digest() -> str:
    """Of all activations, with gates of any size. Every instruction set gives the same."""
    generator, found = torch.Generator().manual_seed(1), hashlib.sha256()
    for activation in ACTIVATIONS:
        for format, dtype in ((INT8, torch.bfloat16), (IntFormat(4, 32), torch.float32)):
            experts = random_experts(3, 128, 64, activation, dtype, format, biased=True)
            experts = replace(experts, config=replace(experts.config, input_dtype=torch.int8))
            x = torch.randn(70, 128, generator=generator).to(dtype)
            y = CpuExpertsKernel.apply(
                experts.config, x, *random_routing(70, 2, 3), experts.packed(CpuExpertsKernel), None, None
            )
            found.update(y.float().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep()
    for format in FORMATS[::3]:
        extremes(format)
        same_bits(format)
    for activation in EXACT:
        for dtype in sparse24.VALUE_DTYPES:
            for tokens in (8, 60):
                special_tokens(activation, dtype, tokens)
    print(instruction_set(), digest())
