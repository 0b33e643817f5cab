"""Compares a kernel for experts with float64 over many shapes. A module, and a program for one instruction set.

`python sweep_experts.py` sweeps the kernel cpu with the instruction set that RIA_VLLM_CPU_ISA names, checks what the
kernel promises about batches, threads and NaNs, and fails at the first deviation.
"""

import torch
from random_experts import ACTIVATIONS, SILU, random_experts, random_routing
from sweep import BOTH

from ria_vllm.format.formats import FLOAT, INTEGERS
from ria_vllm.serve.kernels.cpu.backend import instruction_set
from ria_vllm.serve.kernels.cpu.experts import CpuExpertsKernel

FLOATS = ((FLOAT, torch.bfloat16), (FLOAT, torch.float16), (FLOAT, torch.float32))
# bfloat16 activations with all integers; the others share the kernels that convert them, so each has some.
KINDS = (
    *FLOATS,
    *((format, torch.bfloat16) for format in INTEGERS.values()),
    *((INTEGERS[bits, size], torch.float16) for bits, size in ((8, None), (4, 64))),
    *((INTEGERS[bits, size], torch.float32) for bits, size in ((4, None), (8, 32))),
)


def check_case(kernel, tokens, top_k=2, permuted=True, mapped=False, **layer) -> None:
    experts = random_experts(**layer)
    config = experts.config
    generator = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, config.hidden_size, generator=generator) / config.hidden_size**0.5).to(config.act_dtype)
    weights, ids = random_routing(tokens, top_k, config.num_experts * (2 if mapped else 1), seed=tokens)
    permutation = torch.randperm(config.hidden_size, generator=generator).int() if permuted else None
    expert_map, local = None, ids
    if mapped:  # half of the experts are another rank's
        expert_map = torch.full((2 * config.num_experts,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(config.num_experts, dtype=torch.int32).flip(0)
        local = torch.where(ids < 0, ids, expert_map[ids.clamp(min=0).long()])
    y = kernel.apply(config, x, weights, ids, experts.packed(kernel), permutation, expert_map)
    exact, error = experts.exact(x, weights, local, permutation)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    excess = float(((y.double() - exact).abs() / error).max()) if tokens else 0.0
    assert excess <= 1, f"{kernel.name}: {tokens} tokens, {layer}: error is {excess:.2f} times its bound"


def sweep(kernel, token_counts) -> None:
    for number, (format, dtype) in enumerate(KINDS):
        for activation in ACTIVATIONS if number < 4 else ACTIVATIONS[number % 3 :: 3]:
            check_case(kernel, 13, activation=activation, dtype=dtype, format=format, biased=True, hidden=192)
        for hidden, intermediate in ((64, 16), (72, 40), (96, 8), (200, 136), (64, 176), (640, 72))[number % 2 :: 2]:
            for activation, pattern in zip((SILU, ACTIVATIONS[-2]), BOTH, strict=True):
                sizes = {"hidden": hidden, "intermediate": intermediate, "activation": activation, "pattern": pattern}
                check_case(kernel, 9, permuted=hidden % 128 != 0, dtype=dtype, format=format, biased=True, **sizes)
                check_case(kernel, 1, permuted=False, dtype=dtype, format=format, **sizes)
        for tokens in token_counts[number % 3 :: 3]:
            weights = {"dtype": dtype, "format": format, "pattern": BOTH[tokens // 3 % 2]}
            check_case(kernel, tokens, 1 + tokens % 4, tokens % 2 == 0, tokens % 3 == 0, **weights)
        for pattern in BOTH:  # several passes of one expert
            check_case(kernel, 600, 2, experts=1, dtype=dtype, format=format, pattern=pattern)
        check_case(kernel, 40, 8, experts=3, dtype=dtype, format=format)


def same_bits(format, dtype) -> None:
    """A token's result has the same bits alone, in any batch and with any number of threads. So has the packed form."""
    experts = random_experts(5, 320, 192, dtype=dtype, format=format, biased=True)
    packed, permutation = experts.packed(CpuExpertsKernel), torch.randperm(320, dtype=torch.int32)
    weights, ids = random_routing(230, 3, 5)
    x = torch.randn(230, 320).to(dtype)

    def call(first, last):
        tokens = slice(first, last)
        return CpuExpertsKernel.apply(
            experts.config, x[tokens], weights[tokens], ids[tokens], packed, permutation, None
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = call(0, 230)
        for count in (2, 5):
            torch.set_num_threads(count)
            assert torch.equal(whole, call(0, 230)), f"{dtype}, {count} threads"
            assert all(map(torch.equal, experts.packed(CpuExpertsKernel), packed))
    finally:
        torch.set_num_threads(threads)
    for first, last in [(0, 1), (7, 9), (5, 17), (11, 60), (100, 230), *((t, t + 1) for t in range(200, 230))]:
        assert torch.equal(whole[first:last], call(first, last)), f"{dtype}, tokens {first} to {last}"


def nans_stay_in_their_token(dtype: torch.dtype, tokens: int) -> None:
    for activation in ACTIVATIONS:
        experts = random_experts(2, 64, 32, activation, dtype)
        packed, x = experts.packed(CpuExpertsKernel), torch.randn(tokens, 64).to(dtype)
        weights, ids = torch.rand(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)
        clean = CpuExpertsKernel.apply(experts.config, x, weights, ids, packed, None, None)
        x[3] = float("nan")
        y = CpuExpertsKernel.apply(experts.config, x, weights, ids, packed, None, None)
        assert bool(y[3].isnan().all()), f"{activation}, {tokens} tokens"
        y[3] = clean[3]
        assert torch.equal(y, clean), f"{activation}, {tokens} tokens"


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep(CpuExpertsKernel, (0, *range(1, 60), 77, 95, 96, 97, 150, 191, 192, 193, 300))
    for format, dtype in KINDS[::2]:
        same_bits(format, dtype)
    for dtype in (torch.bfloat16, torch.float32):
        nans_stay_in_their_token(dtype, 5)
        nans_stay_in_their_token(dtype, 60)
    print(instruction_set())
