"""Compares a backend with a float64 product over many shapes; run as a program for one instruction set.

`python sweep.py` sweeps the cpu backend under the RIA_VLLM_CPU_ISA of its environment and exits 1 at the first miss.
"""

import torch

from ria_vllm import sparse24
from ria_vllm.serve.kernels import cpu


def random_pair(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse24.compress(torch.randn(out_features, in_features).to(dtype))


def assert_close_to_float64(y, x, compressed, bitmask, permutation, bias, scales=None):
    """y must be x[..., p] @ W^T + bias up to the errors that fp32 accumulation and the output's rounding allow."""
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


def check_case(backend, tokens, out_features, in_features, dtype, permuted, biased):
    compressed, bitmask = random_pair(out_features, in_features, torch.float32 if dtype == torch.int8 else dtype)
    scales = []
    if dtype == torch.int8:
        compressed, dtype = torch.randint(-128, 128, compressed.shape, dtype=torch.int8), torch.bfloat16
        scales = [torch.rand(out_features) + 0.1]
    permutation = torch.randperm(in_features, dtype=torch.int32) if permuted else None
    bias = torch.randn(out_features).to(dtype) if biased else None
    x = torch.randn(tokens, in_features).to(dtype)
    y = backend.apply(x, backend.pack(compressed, bitmask, *scales), out_features, permutation, bias)
    try:
        assert_close_to_float64(y, x, compressed, bitmask, permutation, bias, *scales)
    except AssertionError as error:
        case = f"tokens {tokens}, {out_features} x {in_features}, {compressed.dtype}, permuted {permuted}, biased {biased}"
        raise AssertionError(f"{backend.NAME}: {case}: {error}") from None


def sweep(backend, token_counts) -> None:
    for i, tokens in enumerate(token_counts):
        check_case(backend, tokens, 49, 128, torch.bfloat16, permuted=i % 2 == 0, biased=i % 3 == 0)
    for dtype in sparse24.VALUE_DTYPES + sparse24.QUANTIZED_DTYPES:
        for out_features in (1, 16, 17, 32, 33, 63):
            for tokens in (1, 5, 13):
                check_case(backend, tokens, out_features, 64, dtype, permuted=True, biased=True)
        for tokens in (1, 2, 3, 4, 10, 11, 12, 24, 25, 97, 200, 300):
            check_case(backend, tokens, 65, 576, dtype, permuted=tokens % 2 == 0, biased=tokens % 3 == 0)
        check_case(backend, 14, 40, 4160, dtype, permuted=True, biased=False)


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep(cpu, range(1, 301))
    print(cpu.instruction_set())
