"""Compares a kernel with a float64 product over many shapes. A module, and a program for one instruction set.

`python sweep.py` sweeps the kernel cpu with the instruction set that RIA_VLLM_CPU_ISA names, checks what the kernel
promises about batches, threads and NaNs, and fails at the first deviation.
"""

from dataclasses import dataclass
from functools import partial

import torch
from packed_layers import PackedLayer, pack

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FLOAT, GROUP_SIZES, INT4, INT8, IntFormat
from ria_vllm.format.pattern import PATTERNS, TWO_OF_FOUR, Pattern
from ria_vllm.format.weight_format import WeightFormat
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set

FLOATS = tuple((FLOAT, dtype) for dtype in sparse24.VALUE_DTYPES)
GROUPED = tuple((IntFormat(bits, size), torch.bfloat16) for bits in (4, 8) for size in GROUP_SIZES)
UNROUNDED = (
    (INT8, torch.float16),
    (INT4, torch.float32),
    (IntFormat(4, 128), torch.float16),
    (IntFormat(8, 32), torch.float16),
    (IntFormat(8, 64), torch.float32),
)
KINDS = (*FLOATS, (INT8, torch.bfloat16), (INT4, torch.bfloat16), *GROUPED, *UNROUNDED)
"""Formats, each with the dtype of its activations."""
BOTH = (TWO_OF_FOUR, PATTERNS["8:16"])

# Numbers of tokens around the sizes of vectors and blocks, and around the switch from one algorithm to the other.
EDGES = (1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 20, 21, 22, 24, 25, 31, 32, 33, 40, 41, 42, 43, 44, 48, 49)
EDGES += (63, 64, 65, 95, 96, 97, 112, 191, 192, 193, 200, 255, 256, 257, 300)


@dataclass(frozen=True)
class RandomWeight:
    """The parts of a weight, and what they mean: float64 [out, in]."""

    format: WeightFormat
    act_dtype: torch.dtype
    parts: dict[str, torch.Tensor]
    dense: torch.Tensor
    pattern: Pattern = TWO_OF_FOUR

    def packed_by(self, kernel=CpuKernel) -> PackedLayer:
        return pack(kernel, self.parts, self.format, self.act_dtype, pattern=self.pattern)

    def x(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, self.dense.shape[1]).to(self.act_dtype)

    def bias(self) -> torch.Tensor:
        return torch.randn(len(self.dense)).to(self.act_dtype)


def random_weight(
    out_features: int,
    in_features: int,
    format: WeightFormat = FLOAT,
    dtype=torch.bfloat16,
    scale_dtype=None,
    pattern: Pattern = TWO_OF_FOUR,
) -> RandomWeight:
    """Integers from all that can be stored; some scales are zero.

    dtype: of activations and of float values. scale_dtype: of groups; None: `dtype`.
    """
    compressed, bitmask = sparse24.compress(torch.randn(out_features, in_features).to(dtype), None, pattern)
    if not isinstance(format, IntFormat):
        parts = {"compressed": compressed, "bitmask": bitmask}
        return RandomWeight(format, dtype, parts, sparse24.decompress(compressed, bitmask).double(), pattern)
    integers = torch.randint(-(2 ** (format.num_bits - 1)), 2 ** (format.num_bits - 1), compressed.shape).to(torch.int8)
    if format.num_bits == 8:
        stored = integers
    else:
        nibbles = (integers.int() + 8).to(torch.uint8)
        stored = nibbles[:, ::2] + 16 * nibbles[:, 1::2]
    shared = format.group_size or in_features
    scales = torch.rand(out_features, in_features // shared) + 0.1
    scales *= torch.rand(scales.shape) > 0.05
    if format.group_size and format.num_bits == 4:  # 1 to 15 times a number of four bits
        scales = torch.randint(8, 16, (out_features, 1)) / 64 * torch.randint(1, 16, scales.shape)
    scales = scales.to((scale_dtype or dtype) if format.group_size else torch.float32)
    dense = sparse24.decompress(integers, bitmask).double() * scales.double().repeat_interleave(shared, 1)
    parts = {"compressed": stored, "bitmask": bitmask, "weight_scale": scales}
    return RandomWeight(format, dtype, parts, dense, pattern)


def assert_close_to_float64(y, x, weight: RandomWeight, permutation=None, bias=None):
    """y must be x[..., p] @ W^T + bias, within the errors of fp32 accumulation and of rounding the output."""
    x64 = x.double() if permutation is None else x.double()[..., permutation.long()]
    exact, magnitude = x64 @ weight.dense.T, x64.abs() @ weight.dense.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    columns = weight.dense.shape[1]
    roundings = columns // 2 + columns // (weight.format.group_size or columns) + 1
    bound = roundings * 2.0**-24 * magnitude + torch.finfo(y.dtype).eps / 2 * 1.01 * exact.abs() + 1e-30
    assert y.shape == exact.shape and y.dtype == x.dtype and y.is_contiguous()
    excess = ((y.double() - exact).abs() / bound).max().item() if y.numel() else 0.0
    assert excess <= 1, f"error is {excess:.2f} times its bound"


def check_case(kernel, pattern, tokens, out_features, in_features, kind, permuted, biased, scale_dtype=None):
    weight = random_weight(out_features, in_features, *kind, scale_dtype, pattern)
    permutation = torch.randperm(in_features, dtype=torch.int32) if permuted else None
    bias = weight.bias() if biased else None
    x = weight.x(tokens)
    y = weight.packed_by(kernel)(x, permutation, bias)
    try:
        assert_close_to_float64(y, x, weight, permutation, bias)
    except AssertionError as error:
        case = (
            f"tokens {tokens}, {out_features} x {in_features}, {kind[0].name}, {kind[1]}, permuted {permuted}, "
            f"biased {biased}, scales {scale_dtype}, {pattern}"
        )
        raise AssertionError(f"{kernel.name}: {case}: {error}") from None


def sweep(kernel, token_counts, pattern: Pattern) -> None:
    check = partial(check_case, kernel, pattern)
    for i, tokens in enumerate(token_counts):
        kind = GROUPED[2] if i % 3 == 0 else KINDS[0]
        check(tokens, 49, 128, kind, permuted=i % 2 == 0, biased=i % 3 == 0)
    for number, kind in enumerate(KINDS):
        for i, out_features in enumerate((1, 16, 17, 32, 33, 63)):
            for tokens in ((1, 13), (5, 50))[(i + number) % 2]:
                columns = max(64, kind[0].group_size or 0)
                check(tokens, out_features, columns, kind, permuted=True, biased=True)
        for tokens in EDGES[number % 3 :: 3]:
            columns = 640 if kind[0].group_size == 128 else 576
            check(tokens, 65, columns, kind, permuted=tokens % 2 == 0, biased=tokens % 3 == 0)
        check(14, 40, 4224 if kind[0].group_size == 128 else 4160, kind, permuted=True, biased=False)
        check(50, 177, 1152 if kind[0].group_size == 128 else 1088, kind, permuted=True, biased=False)
    for kind in GROUPED:
        for scale_dtype in (torch.float16, torch.float32):
            for tokens in (1, 6, 30, 50):
                check(tokens, 50, 256, kind, permuted=True, biased=True, scale_dtype=scale_dtype)


def same_bits(kind, rows: int, pattern: Pattern) -> None:
    """A token's result has the same bits alone, in any batch and with any number of threads. So has the packed form."""
    columns = 1152 if kind[0].group_size == 128 else 1088
    weight = random_weight(rows, columns, *kind, pattern=pattern)
    layer, permutation = weight.packed_by(CpuKernel), torch.randperm(columns, dtype=torch.int32)
    x, bias = weight.x(203), weight.bias()
    name = f"{kind[0].name}, {kind[1]}"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = layer(x, permutation, bias)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(whole, layer(x, permutation, bias)), f"{name}, {count} threads"
            assert torch.equal(weight.packed_by(CpuKernel).packed[0], layer.packed[0])
    finally:
        torch.set_num_threads(threads)
    ends = [(202 - tokens, 202) for tokens in EDGES if tokens < 200]
    batches = [(0, 1), (7, 9), (5, 17), (11, 60), (100, 203), *ends]
    for first, last in batches:
        batch = layer(x[first:last], permutation, bias)
        assert torch.equal(whole[first:last], batch), f"{name}, tokens {first} to {last}"


def nans_stay_in_their_token_and_row(kind, tokens: int, pattern: Pattern) -> None:
    columns = max(64, kind[0].group_size or 0)
    weight = random_weight(33, columns, *kind, pattern=pattern)
    x, name = weight.x(tokens), f"{kind[0].name}, {kind[1]}, {tokens} tokens"
    layer = weight.packed_by(CpuKernel)
    clean = layer(x)
    x[3, 5], x[4, 9], x[5], x[6, ::3] = float("nan"), float("inf"), float("nan"), float("-inf")
    y = layer(x)
    mask = sparse24.mask_from_bitmask(weight.parts["bitmask"])
    assert torch.equal(y[3].isnan(), mask[:, 5]), name
    assert torch.equal(~y[4].isfinite(), mask[:, 9]), name  # not infinite where a weight is zero
    want = torch.where(mask, weight.dense * x[6].double(), 0).sum(1)
    assert y[5].isnan().all() and torch.equal(y[6].isnan(), want.isnan()), name
    assert torch.equal(y[6][want.isinf()].double(), want[want.isinf()]), name
    y[3:7], clean[3:7] = 0, 0
    assert torch.equal(y, clean), name


if __name__ == "__main__":
    torch.manual_seed(0)
    for number, pattern in enumerate(BOTH):
        sweep(CpuKernel, range(1 + number, 301, 2), pattern)
        for kind in KINDS:
            same_bits(kind, 208, pattern)
            nans_stay_in_their_token_and_row(kind, 15, pattern)
            nans_stay_in_their_token_and_row(kind, 60, pattern)
    same_bits((FLOAT, torch.float32), 1040, BOTH[0])
    same_bits(GROUPED[1], 1040, BOTH[1])
    print(instruction_set())
