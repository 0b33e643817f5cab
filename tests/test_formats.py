"""Every weight format: what it stores decodes to what was quantized, and its parts follow rows, cuts and padding."""

from fractions import Fraction
from math import gcd, lcm

import pytest
import torch

from ria_vllm.format import formats, sparse24
from ria_vllm.format.formats import FLOAT, FORMATS, FP8, INT4, INT8, INTEGERS
from ria_vllm.format.schema import RiaSchema, SparsityConfig, WeightQuantization

ROWS, COLUMNS = 24, 256

ALL = tuple(FORMATS.values())
each_format = pytest.mark.parametrize("format", ALL, ids=lambda format: format.name)


def stored(format, dtype=torch.bfloat16, seed=0):
    """The matrix that a format makes of a random 2:4 one, the mask, and its parts."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(-2, 1, ROWS)[:, None]
    weight[5] = 0
    mask = sparse24.mask_from_bitmask(sparse24.compress(torch.randn(ROWS, COLUMNS, generator=generator))[1])
    weight, scales = format.quantize((weight * mask).to(dtype), dtype)
    return weight, mask, format.encode(weight, mask, scales)


@each_format
@pytest.mark.parametrize("dtype", sparse24.VALUE_DTYPES)
def test_decodes_to_what_was_quantized(format, dtype):
    weight, mask, parts = stored(format, dtype)
    assert format.check(parts, (ROWS, COLUMNS)) is None
    decoded = format.decode(parts, dtype)
    assert decoded.dtype == dtype and torch.equal(decoded, weight)
    assert torch.equal(sparse24.mask_from_bitmask(parts["bitmask"]), mask) and not decoded[~mask].any()


@each_format
@pytest.mark.parametrize("dtype", sparse24.VALUE_DTYPES)
def test_kept_values_are_encoded_without_their_zeros(format, dtype):
    weight, mask, parts = stored(format, dtype)
    kept = torch.stack([row[of_row] for row, of_row in zip(weight, mask, strict=True)])
    found = format.encode_kept(kept, parts["bitmask"], parts.get("weight_scale"))
    assert found.keys() == parts.keys()
    assert all(torch.equal(found[name].view(torch.uint8), part.view(torch.uint8)) for name, part in parts.items())


each_integer = pytest.mark.parametrize("format", INTEGERS.values(), ids=lambda format: format.name)


@each_integer
@pytest.mark.parametrize("dtype", sparse24.VALUE_DTYPES)
def test_quantizing_is_off_by_at_most_half_a_step(format, dtype):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    rounded, scales = format.quantize(weight, torch.float32)
    off = (rounded.double() - weight.double()).abs().unflatten(1, (scales.shape[1], -1)) / scales.double()[..., None]
    assert off.max() <= 0.5 + 1e-4
    # bfloat16 holds a scale to half of its last bit, 2^-9 of it.
    wanted = weight.double().unflatten(1, (-1, format.group_size or COLUMNS)).abs().amax(-1) / (
        2**format.num_bits // 2 - 1
    )
    if format.largest_multiple is not None:  # rounded up to a multiple of the row's unit
        above = (scales.double() - wanted) / divisors(scales)
        assert above.min() > -1e-6 and above.max() < 2
        return
    torch.testing.assert_close(scales.double(), wanted, rtol=1e-6 if format.group_size is None else 2**-8, atol=0)


def divisors(scales: torch.Tensor) -> torch.Tensor:
    """The largest number of which all scales of a row are multiples, float64 [out, 1]."""
    found = []
    for row in scales.double().tolist():
        exact = [Fraction(scale) for scale in row]
        denominator = lcm(*(one.denominator for one in exact))
        found.append(float(Fraction(gcd(*(int(one * denominator) for one in exact)), denominator)))
    return torch.tensor(found, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("size", formats.GROUP_SIZES)
def test_scales_of_four_bits_are_multiples_of_one_number_a_row(size):
    format = INTEGERS[4, size]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * torch.logspace(-9, 9, ROWS)[:, None]
    weight[5], weight[6, :size] = 0, 0
    fitting = format.scales_of(weight)
    drawn = torch.rand(fitting.shape, generator=generator) * fitting.float()
    for scales, near in ((fitting, fitting), (format.storable(fitting), fitting), (format.storable(drawn), drawn)):
        multiples = scales.double() / divisors(scales)
        assert scales.dtype == torch.bfloat16 and scales.min() > 0
        assert torch.equal(multiples, multiples.round()) and multiples.max() <= 15
        assert torch.equal(format.storable(scales), scales)
        # A unit has four bits, and 15 of it are no less than the largest.
        assert ((scales.double() - near.double()).abs() <= 1.126 * near.double().amax(1, keepdim=True) / 15).all()
    units = format.units_of(fitting)
    assert torch.equal(fitting.amax(1, keepdim=True).float(), 15 * units)
    for multiple in range(1, 16):  # of four bits each
        scales = (units * multiple).to(torch.bfloat16)
        assert torch.equal(scales.float(), units * multiple) and torch.equal(format.storable(scales, units), scales)
    assert INTEGERS[8, size].units_of(fitting) is None


@pytest.mark.parametrize("largest", (1e-30, 1e-37, 1e-41, 0))
def test_weights_too_small_for_units_become_zeros(largest):
    rounded, scales = INTEGERS[4, 32].quantize(torch.full((2, 64), largest), torch.float32)
    assert scales.min() > 0 and torch.equal(rounded.bool(), torch.full((2, 64), largest == 1e-30))


@each_integer
@pytest.mark.parametrize("largest", [1e-5, 3e-6, 2e-7])
def test_small_weights_of_float16(format, largest):
    """float16 holds such weights in steps of 2^-24; their scales are finer, and rounding to float16 comes last."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    weight = (weight / weight.abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, 1) * largest).half()
    mask = sparse24.mask_from_bitmask(sparse24.compress(weight)[1])
    rounded, scales = format.quantize(weight * mask, torch.float16)
    step = scales.double().repeat_interleave(COLUMNS // scales.shape[1], 1)
    assert scales.dtype == (torch.float32 if format.group_size is None else torch.bfloat16)
    assert ((rounded.double() - (weight * mask).double()).abs() <= step / 2 * 1.0001 + 2**-25).all() and rounded.any()
    parts = format.encode(rounded, mask, scales)
    assert format.check(parts) is None and torch.equal(format.decode(parts, torch.float16), rounded)


@each_integer
@pytest.mark.parametrize("columns", [64, 192, 320, 448, 576])
def test_columns_that_are_not_whole_groups_are_refused(format, columns):
    size = format.group_size or 8
    parts = {part.name: torch.ones(part.shape(16, columns)).to(part.dtypes[0]) for part in format.parts}
    parts["bitmask"].fill_(0b00110011)
    wrong = format.check(parts)
    if columns % size:
        assert wrong == f"the matrix has {columns} columns, not a multiple of {size} as in {format.name}"
    else:
        assert wrong is None and format.decode(parts, torch.float32).shape == (16, columns)


def test_fp8_is_off_by_at_most_half_its_last_bit():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rounded, _ = FP8.quantize(weight, torch.float32)
    assert (
        (rounded.double() - weight).abs() <= weight.abs() * 2**-4 + weight.abs().amax(1, keepdim=True) * 2**-18
    ).all()


@each_format
def test_widening_keeps_every_value(format):
    weight, _, parts = stored(format)
    wide = format.widen(parts, torch.bfloat16)
    assert FLOAT.check(wide) is None and torch.equal(FLOAT.decode(wide, torch.bfloat16), weight)


@each_format
def test_parts_follow_an_order_and_a_cut_of_the_rows(format):
    weight, _, parts = stored(format)
    p = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(format.decode(format.take_rows(parts, p), torch.bfloat16), weight[p])
    assert torch.equal(format.decode(format.take_rows(parts, slice(8, 20)), torch.bfloat16), weight[8:20])


@each_format
def test_parts_follow_a_cut_of_the_columns(format):
    weight, _, parts = stored(format)
    assert format.column_multiple == (format.group_size or 8)
    cut = {
        part.name: parts[part.name][:, 128 // part.channels : 256 // part.channels]
        if part.channels
        else parts[part.name]
        for part in format.parts
    }
    assert torch.equal(format.decode(cut, torch.bfloat16), weight[:, 128:256])


@each_format
def test_padding_adds_zeros(format):
    weight, _, parts = stored(format)
    padded = format.pad_columns(parts, 128)
    assert format.check(padded, (ROWS, COLUMNS + 128)) is None
    decoded = format.decode(padded, torch.bfloat16)
    assert torch.equal(decoded[:, :COLUMNS], weight) and not decoded[:, COLUMNS:].any()
    with pytest.raises(ValueError, match="not a multiple"):
        format.pad_columns(parts, format.column_multiple // 2)


@pytest.mark.parametrize(
    "format, dtype, bits",
    [(FLOAT, torch.bfloat16, 9), (FLOAT, torch.float32, 17), (INT8, torch.bfloat16, 5), (FP8, torch.float16, 5),
     (INT4, torch.bfloat16, 3), (INTEGERS[4, 64], torch.bfloat16, 3.25), (INTEGERS[4, 128], torch.float16, 3.125),
     (INTEGERS[8, 32], torch.bfloat16, 5.5), (INTEGERS[4, 64], torch.float32, 3.25)],
)  # fmt: skip
def test_bits_per_weight_are_those_of_the_stored_tensors(format, dtype, bits):
    assert format.bits_per_weight(dtype) == bits
    _, _, parts = stored(format, dtype)
    by_row = sum(parts[p.name].nbytes for p in format.parts if p.channels is None)
    assert 8 * (sum(t.nbytes for t in parts.values()) - by_row) == bits * ROWS * COLUMNS


@each_format
def test_every_broken_rule_is_named(format):
    _, _, parts = stored(format)
    for part in format.parts:
        others = {name: tensor for name, tensor in parts.items() if name != part.name}
        assert format.check(others) == f"{part.name} is missing"
        assert "dtype" in format.check(others | {part.name: parts[part.name].to(torch.float64)})
        wrong = format.check(others | {part.name: parts[part.name][:-1]})
        assert wrong and ("expected (" in wrong)
        assert format.check(others | {part.name: parts[part.name].flatten()})
    assert (
        format.check(parts, (ROWS, COLUMNS * 2))
        == f"the bitmask describes a {ROWS} x {COLUMNS} matrix, expected 24 x 512"
    )
    for number in (0, -1, torch.nan, torch.inf) if "weight_scale" in parts else ():
        damaged = parts["weight_scale"].clone()
        damaged[3, 0] = number
        assert "weight_scale is not positive" in format.check({**parts, "weight_scale": damaged})


def test_config_json_names_each_format():
    for format in formats.FORMATS.values():
        words = format.quantization
        weights = None if words is None else WeightQuantization(**words, dtype="float16")
        config = RiaSchema(sparsity_config=SparsityConfig(), weights=weights).model_dump(exclude_none=True)
        assert RiaSchema.parse(config, "config.json").weight_format is format
    assert formats.of_quantization({**INTEGERS[4, 64].quantization, "group_size": 16}) is None


@pytest.mark.parametrize("dtype", sparse24.VALUE_DTYPES)
def test_rows_are_quantized_to_the_nearest_step(dtype):
    weight = (torch.randn(9, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)[:, None]).to(
        dtype
    )
    weight[4] = 0
    rounded, scale = INT8.quantize(weight, torch.float32)
    values = (rounded / scale).round()

    assert scale.dtype == torch.float32 and scale.shape == (9, 1)
    assert (values.abs().amax(1) == 127).tolist() == [True] * 4 + [False] + [True] * 4 and (values[4] == 0).all()
    off = (values.double() * scale.double() - weight.double()).abs() / scale.double()
    assert off.max() <= 0.5 + 1e-4
