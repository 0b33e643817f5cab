"""Compares the kernel cpu, where it rounds its inputs to int8, with a formula: every bit of the result must be equal.

A module, and a program for the instruction set that RIA_VLLM_CPU_ISA names: it fails at the first deviation.
"""

from functools import partial

import numpy as np
import torch
from packed_layers import PackedLayer, pack
from sweep import BOTH, EDGES, RandomWeight, random_weight
from torch.nn.functional import pad

from ria_vllm.format import sparse24
from ria_vllm.format.formats import GROUP_SIZES, INT8, IntFormat
from ria_vllm.format.pattern import TWO_OF_FOUR, Pattern
from ria_vllm.serve.kernels.cpu.backend import CpuKernel, instruction_set, multiply_int8_rows

FORMATS = (INT8, *(IntFormat(4, size) for size in (None, *GROUP_SIZES)))
OF_16 = BOTH[1]


def product(values: torch.Tensor, format: IntFormat, parts, bias=None) -> torch.Tensor:
    """What kernels promise of `values`, float32 [tokens, in], rounded to int8: float32 [tokens, out].

    Columns of the weight beyond `in` are padding. float64 holds all integers exactly.
    """
    largest = values.abs().amax(1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / 127)
    inverse = torch.where(largest == 0, 0.0, torch.tensor(127.0) / largest)  # `127 / largest` multiplies by 1 / largest
    inverse = inverse.clamp(max=torch.finfo(torch.float32).max)
    rounded = (values * inverse).round().clamp(-127, 127).double()
    integers = sparse24.decompress(format.integers(parts), parts["bitmask"]).double()
    rounded = pad(rounded, (0, integers.shape[1] - rounded.shape[1]))
    units = scales = parts["weight_scale"].double()
    if format.group_size:
        of_groups = integers.unflatten(1, (scales.shape[1], -1))
        zeros = ~of_groups.any(-1)  # such as padding; they may have any scale
        scales = torch.where(zeros, torch.where(zeros, 0, scales).amax(1, keepdim=True), scales)
        units = largest_divisors(scales)
        integers = (of_groups * (scales / units).nan_to_num()[..., None]).flatten(1)
        assert bool((integers == integers.round()).all()) and integers.abs().max() <= 120
    y = (rounded @ integers.T).float() * units.flatten().float() * scale
    return y if bias is None else y + bias.float()


def largest_divisors(scales: torch.Tensor) -> torch.Tensor:
    """The largest number of which all of a row are multiples, float64 [rows, 1]."""
    integers = (scales * 2.0**40).long()
    assert torch.equal(integers.double(), scales * 2.0**40)
    return torch.from_numpy(np.gcd.reduce(integers.numpy(), axis=1, keepdims=True)).double() / 2.0**40


def formula(weight: RandomWeight, x, permutation=None, bias=None) -> torch.Tensor:
    """What kernels promise of x, [tokens, in], rounded to int8."""
    values = x.float() if permutation is None else x.float()[:, permutation.long()]
    return product(values, weight.format, weight.parts, bias).to(x.dtype)


def packed(weight: RandomWeight) -> PackedLayer:
    return pack(CpuKernel, weight.parts, weight.format, weight.act_dtype, torch.int8, weight.pattern)


def assert_equal(y, want, case: str) -> None:
    assert y.dtype == want.dtype and y.shape == want.shape, case
    wrong = ~((y == want) | (y.isnan() & want.isnan()))
    assert not wrong.any(), f"{case}: {int(wrong.sum())} of {wrong.numel()} differ, first at {wrong.nonzero()[0]}"


def check_case(
    format, dtype, tokens, out_features, in_features, permuted, biased, scale_dtype=None, pattern=TWO_OF_FOUR
) -> None:
    weight = random_weight(out_features, in_features, format, dtype, scale_dtype, pattern)
    permutation = torch.randperm(in_features, dtype=torch.int32) if permuted else None
    bias = weight.bias() if biased else None
    x = weight.x(tokens)
    x[tokens // 2, : in_features // 2] *= 40
    y = packed(weight)(x, permutation, bias)
    case = f"{pattern}, {format.name}, {dtype}, tokens {tokens}, {out_features} x {in_features}, {permuted}, {biased}"
    assert_equal(y, formula(weight, x, permutation, bias), case)


def columns_of(format, columns: int) -> int:
    """Whole groups."""
    return -(-columns // (format.group_size or 64)) * (format.group_size or 64)


def sweep(pattern: Pattern) -> None:
    check = partial(check_case, pattern=pattern)
    for tokens in range(1, 201):
        format = FORMATS[tokens % len(FORMATS)]
        check(format, torch.bfloat16, tokens, 49, 128, permuted=tokens % 2 == 0, biased=tokens % 3 == 0)
    for number, format in enumerate(FORMATS):
        for dtype in sparse24.VALUE_DTYPES:
            for i, out_features in enumerate((1, 16, 17, 32, 33, 63)):
                for tokens in ((1, 13), (5, 50))[i % 2]:
                    check(format, dtype, tokens, out_features, columns_of(format, 64), True, True)
        for tokens in EDGES[number % 3 :: 3]:
            check(format, torch.bfloat16, tokens, 65, columns_of(format, 576), tokens % 2 == 0, tokens % 3 == 0)
        for scale_dtype in sparse24.VALUE_DTYPES if format.group_size else ():
            check(format, torch.float16, 9, 50, 256, True, True, scale_dtype)
            check(format, torch.float32, 50, 50, 256, True, False, scale_dtype)
        for tokens in (14, 50):  # on AMX, by vectors and by tiles
            check(format, torch.float32, tokens, 40, columns_of(format, 4160), True, False)


def extremes(format, dtype, pattern: Pattern) -> None:
    """The largest and smallest integers on both sides, which 16-bit sums of products could not hold."""
    weight = random_weight(40, columns_of(format, 512), format, dtype, pattern=pattern)
    columns = weight.dense.shape[1]
    for smallest in (True, False):
        integer = -(2 ** (format.num_bits - 1)) if smallest else 2 ** (format.num_bits - 1) - 1
        byte = integer if format.num_bits == 8 else (integer + 8) * 17
        weight.parts["compressed"].fill_(byte)
        layer = packed(weight)
        for tokens in (1, 5, 50):
            x = torch.full((tokens, columns), 3.0).to(dtype)
            x[::3] *= -1
            x[1::4, ::2] *= -1
            assert_equal(layer(x), formula(weight, x), f"{format.name}, {dtype}, {tokens} tokens, all {integer}")


def large_sums(bits: int, tokens: int, pattern: Pattern) -> None:
    """Integer sums above 2**24, which float32 must round."""
    columns = 8192 if bits == 8 else 65536
    weight = random_weight(35, columns, IntFormat(bits, None), torch.float32, pattern=pattern)
    if bits == 8:
        weight.parts["compressed"].random_(90, 128)
    else:
        weight.parts["compressed"].fill_((7 + 8) * 17)
    x = torch.rand(tokens, columns) + 1
    layer = packed(weight)
    want = formula(weight, x)
    scales = weight.parts["weight_scale"].float().flatten()
    integers = sparse24.decompress(weight.format.integers(weight.parts), weight.parts["bitmask"]).double()
    sums = (x * (127 / x.amax(1, keepdim=True))).round().double() @ integers.T
    assert (sums > 2**24).all() and (sums != sums.float()).any() and scales.any(), "the case has no such sums"
    assert_equal(layer(x), want, f"int{bits}, {tokens} tokens, sums above 2**24")


def largest_sums(bits: int, tokens: int, pattern: Pattern) -> None:
    """The most columns that are taken, all integers at their ends: the sums just fit into int32."""
    weight = random_weight(17, 131072, IntFormat(bits, None), torch.float32, pattern=pattern)
    for byte in (-128, 127) if bits == 8 else (0, 255):
        weight.parts["compressed"].fill_(byte)
        x = torch.full((tokens, 131072), 3.0)
        x[1::2] *= -1
        assert_equal(packed(weight)(x), formula(weight, x), f"int{bits}, {tokens} tokens, all {byte}")


def special_tokens(format, dtype, tokens: int, pattern: Pattern) -> None:
    """Zeros, tiny and huge values; a NaN or an infinity makes all outputs of its own token NaN, and no others."""
    weight = random_weight(33, columns_of(format, 128), format, dtype, pattern=pattern)
    layer, bias = packed(weight), weight.bias()
    x = weight.x(tokens)
    clean = layer(x, None, bias)
    finfo = torch.finfo(dtype)
    x[0] = 0
    x[1] = x[1].sign() * finfo.tiny
    x[2] = x[2].sign() * finfo.max
    x[3] = torch.where(torch.arange(x.shape[1]) % 3 == 0, finfo.smallest_normal * finfo.eps, 0)  # subnormal
    x[4, 5], x[5, 9], x[6, 11] = float("nan"), float("inf"), float("-inf")
    x[7, 1:] = 0
    y = layer(x, None, bias)
    want = formula(weight, x, None, bias)
    name = f"{format.name}, {dtype}, {tokens} tokens"
    for token in (0, 1, 2, 3, 7):
        assert_equal(y[token], want[token], f"{name}, token {token}")
    assert torch.equal(y[0], bias), name
    assert y[4:7].isnan().all(), name
    assert torch.equal(y[8:], clean[8:]), name


def same_bits(format, rows: int, pattern: Pattern) -> None:
    """A token's result has the same bits alone, in any batch and with any number of threads. So has the packed form."""
    weight = random_weight(rows, columns_of(format, 1088), format, pattern=pattern)
    layer, permutation = packed(weight), torch.randperm(weight.dense.shape[1], dtype=torch.int32)
    x, bias = weight.x(203), weight.bias()
    want = formula(weight, x, permutation, bias)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert_equal(layer(x, permutation, bias), want, f"{format.name}, {count} threads")
            for first, last in [(0, 1), (7, 9), (5, 17), (11, 60), (100, 203)]:
                y = layer(x[first:last], permutation, bias)
                assert_equal(y, want[first:last], f"{format.name}, {count} threads, tokens {first} to {last}")
            assert torch.equal(packed(weight).packed[0], layer.packed[0])
    finally:
        torch.set_num_threads(threads)


def dense_rows(rows: int, columns: int, dtype: torch.dtype) -> None:
    """A dense matrix in int8 and inputs of 15 bits: near the product in float64, with the same bits in any batch."""
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    scales, bias = torch.rand(rows, 1) + 0.01, torch.randn(rows).to(dtype)
    x = torch.randn(41, columns).to(dtype)
    x[3] = 0
    largest = x.double().abs().amax(1, keepdim=True)
    W = weight.double() * scales.double()
    want = x.double() @ W.T + bias.double()
    found = multiply_int8_rows(x, weight, scales, bias)
    # Each channel is off by up to half a step of the second number; a sum of random ones is far from the worst case.
    off = 4 * largest / (2 * 127 * 254) * W.norm(dim=1) + torch.finfo(dtype).eps * want.abs() + 1e-9
    name = f"{rows} x {columns}, {dtype}"
    assert bool(((found.double() - want).abs() <= off).all()) and torch.equal(found[3], bias), name
    for first, last in [(0, 1), (3, 5), (7, 10), (1, 9), (20, 41)]:
        assert torch.equal(multiply_int8_rows(x[first:last], weight, scales, bias), found[first:last]), name
    x[5, 1] = float("nan")
    assert multiply_int8_rows(x, weight, scales, None)[5].isnan().all(), name


if __name__ == "__main__":
    torch.manual_seed(0)
    for dtype in sparse24.VALUE_DTYPES:
        for rows, columns in ((1, 64), (32, 128), (49, 576), (96, 2048)):
            dense_rows(rows, columns, dtype)
    for pattern in BOTH:
        sweep(pattern)
    for number, format in enumerate(FORMATS):
        for i, dtype in enumerate(sparse24.VALUE_DTYPES):
            extremes(format, dtype, BOTH[i % 2])
            for tokens in (8, 15, 60):
                special_tokens(format, dtype, tokens, BOTH[tokens % 2])
        same_bits(format, 208, BOTH[number % 2])
    for bits in (8, 4):
        for tokens in (1, 15):
            large_sums(bits, tokens, BOTH[tokens // 15])
            largest_sums(bits, tokens, BOTH[1 - tokens // 15])
    print(instruction_set())
