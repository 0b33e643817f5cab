"""Compares a kernel with a float64 product over many shapes. A module, and a program for one instruction set.

`python sweep.py` sweeps the kernel cpu with the instruction set that RIA_VLLM_CPU_ISA names, checks what the kernel
promises about batches, threads and NaNs, and fails at the first deviation.
"""

import torch
from packed_layers import PackedLayer, pack

from ria_vllm import sparse24
from ria_vllm.formats import INT8
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set

DTYPES = (*sparse24.VALUE_DTYPES, torch.int8)

# Numbers of tokens around the sizes of vectors and blocks, and around the switch from one algorithm to the other.
EDGES = (1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 15, 16, 17, 20, 21, 22, 24, 25, 31, 32, 33, 40, 41, 42, 48, 49, 63, 64, 65)
EDGES += (95, 96, 97, 112, 191, 192, 193, 200, 255, 256, 257, 300)


def random_pair(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse24.compress(torch.randn(out_features, in_features).to(dtype))


def packed_by(kernel, compressed, bitmask, scales=None) -> PackedLayer:
    """scales: float32 [out], for int8 values, which bfloat16 activations meet."""
    parts = {"compressed": compressed, "bitmask": bitmask}
    if scales is None:
        return pack(kernel, parts)
    return pack(kernel, parts | {"weight_scale": scales[:, None]}, INT8, torch.bfloat16)


def assert_close_to_float64(y, x, compressed, bitmask, permutation, bias, scales=None):
    """y must be x[..., p] @ W^T + bias, within the errors of fp32 accumulation and of rounding the output."""
    weight = sparse24.decompress(compressed, bitmask).double()
    if scales is not None:
        weight *= scales.double()[:, None]
    x64 = x.double() if permutation is None else x.double()[..., permutation.long()]
    exact, magnitude = x64 @ weight.T, x64.abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    terms = weight.shape[1] // 2 + 1
    bound = terms * 2.0**-24 * magnitude + torch.finfo(y.dtype).eps / 2 * 1.01 * exact.abs() + 1e-30
    assert y.shape == exact.shape and y.dtype == x.dtype and y.is_contiguous()
    excess = ((y.double() - exact).abs() / bound).max().item() if y.numel() else 0.0
    assert excess <= 1, f"error is {excess:.2f} times its bound"


def check_case(kernel, tokens, out_features, in_features, dtype, permuted, biased):
    compressed, bitmask = random_pair(out_features, in_features, torch.float32 if dtype == torch.int8 else dtype)
    scales = []
    if dtype == torch.int8:
        compressed, dtype = torch.randint(-128, 128, compressed.shape, dtype=torch.int8), torch.bfloat16
        scales = [torch.rand(out_features) + 0.1]
    permutation = torch.randperm(in_features, dtype=torch.int32) if permuted else None
    bias = torch.randn(out_features).to(dtype) if biased else None
    x = torch.randn(tokens, in_features).to(dtype)
    y = packed_by(kernel, compressed, bitmask, *scales)(x, permutation, bias)
    try:
        assert_close_to_float64(y, x, compressed, bitmask, permutation, bias, *scales)
    except AssertionError as error:
        case = (
            f"tokens {tokens}, {out_features} x {in_features}, {compressed.dtype}, permuted {permuted}, biased {biased}"
        )
        raise AssertionError(f"{kernel.name}: {case}: {error}") from None


def sweep(kernel, token_counts) -> None:
    for i, tokens in enumerate(token_counts):
        check_case(kernel, tokens, 49, 128, torch.bfloat16, permuted=i % 2 == 0, biased=i % 3 == 0)
    for dtype in DTYPES:
        for out_features in (1, 16, 17, 32, 33, 63):
            for tokens in (1, 5, 13, 50):
                check_case(kernel, tokens, out_features, 64, dtype, permuted=True, biased=True)
        for tokens in EDGES:
            check_case(kernel, tokens, 65, 576, dtype, permuted=tokens % 2 == 0, biased=tokens % 3 == 0)
        check_case(kernel, 14, 40, 4160, dtype, permuted=True, biased=False)
        check_case(kernel, 50, 177, 1088, dtype, permuted=True, biased=False)


def same_bits(dtype: torch.dtype, rows: int) -> None:
    """A token's result has the same bits alone, in any batch and with any number of threads. So has the packed form."""
    weight, scales = torch.randn(rows, 1088), ()
    if dtype == torch.int8:
        weight, scales = weight * 30, (torch.rand(rows),)
    compressed, bitmask = sparse24.compress(weight.to(dtype))
    layer, permutation = packed_by(CpuKernel, compressed, bitmask, *scales), torch.randperm(1088, dtype=torch.int32)
    x = torch.randn(203, 1088).to(torch.bfloat16 if scales else dtype)
    bias = torch.randn(rows).to(x.dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = layer(x, permutation, bias)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(whole, layer(x, permutation, bias)), f"{dtype}, {count} threads"
            again = packed_by(CpuKernel, compressed, bitmask, *scales)
            assert torch.equal(again.packed[0], layer.packed[0])
    finally:
        torch.set_num_threads(threads)
    ends = [(202 - tokens, 202) for tokens in EDGES if tokens < 200]
    batches = [(0, 1), (7, 9), (5, 17), (11, 60), (100, 203), *ends]
    for first, last in batches:
        batch = layer(x[first:last], permutation, bias)
        assert torch.equal(whole[first:last], batch), f"{dtype}, tokens {first} to {last}"


def nans_stay_in_their_token_and_row(dtype: torch.dtype, tokens: int) -> None:
    compressed, bitmask = random_pair(33, 64, dtype)
    x = torch.randn(tokens, 64).to(dtype)
    layer = packed_by(CpuKernel, compressed, bitmask)
    clean = layer(x)
    x[3, 5], x[4, 9] = float("nan"), float("inf")
    y = layer(x)
    mask = sparse24.mask_from_bitmask(bitmask)
    assert torch.equal(y[3].isnan(), mask[:, 5]) and torch.equal(y[4].isinf(), mask[:, 9]), f"{dtype}, {tokens} tokens"
    y[3:5], clean[3:5] = 0, 0
    assert torch.equal(y, clean), f"{dtype}, {tokens} tokens"


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep(CpuKernel, range(1, 301))
    for dtype in DTYPES:
        same_bits(dtype, 208)
    same_bits(torch.float32, 1040)
    for dtype in sparse24.VALUE_DTYPES:
        nans_stay_in_their_token_and_row(dtype, 15)
        nans_stay_in_their_token_and_row(dtype, 60)
    print(instruction_set())
