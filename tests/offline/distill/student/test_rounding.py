"""Training through rounding: the forward pass reads what the format holds, and gradients pass through."""

import pytest
import torch
from torch import nn

from ria_vllm.format import sparse24
from ria_vllm.format.formats import FORMATS, FP8, INTEGERS
from ria_vllm.offline.distill.student.layouts import Kept
from ria_vllm.offline.distill.student.parameters import AdamW, Pace, TrainedParameter, step_in_backward
from ria_vllm.offline.distill.student.rounding import StraightThrough

QUANTIZED = [*(one.name for one in INTEGERS.values()), FP8.name]


def encoded(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = sparse24.decompress(*sparse24.compress(torch.randn(16, 128)))
    weight, scales = FORMATS[name].quantize(weight, torch.bfloat16)
    return FORMATS[name].encode(weight, None, scales)


@pytest.mark.parametrize("name", QUANTIZED)
def test_what_is_stored_is_read_back_unchanged(name):
    parts = encoded(name)
    values = FORMATS[name].values(parts, torch.float32)
    rounded, after = StraightThrough(FORMATS[name], parts["weight_scale"], torch.bfloat16)(values, slice(None))
    assert torch.equal(rounded, FORMATS[name].values(parts, torch.bfloat16).float())
    assert torch.equal(after, values)


@pytest.mark.parametrize("name", [one for one in QUANTIZED if one != FP8.name])
def test_values_move_in_small_steps_and_the_model_reads_the_nearest_ones(name):
    """Up to the middle between two representable values, nothing is seen of it."""
    parts = encoded(name)
    scales = parts["weight_scale"].float()
    pace = Pace(lr=float(scales.min()) / 20)
    values = FORMATS[name].values(parts, torch.float32)
    parameter = nn.Parameter(torch.zeros(16, 128, dtype=torch.bfloat16))
    rounding = StraightThrough(FORMATS[name], parts["weight_scale"], torch.bfloat16)
    mine = TrainedParameter(parameter, Kept(parts["bitmask"]), values.clone(), AdamW(clip=0.0), pace, rounding)
    mine.scales = None  # stay as they are
    step_in_backward(parameter, [mine])
    first = parameter.data.clone()
    assert torch.equal(first, FORMATS[name].decode(parts, torch.bfloat16))
    steps = int(0.8 * float(scales.max()) / pace.lr)
    for number in range(1, steps + 1):
        pace.number = number
        parameter.sum().backward()
        if number == 8:
            assert torch.equal(parameter.data, first)
            assert torch.allclose(mine.values, values - 8 * pace.lr, rtol=1e-3, atol=pace.lr)
    moved = (mine.rounded() != FORMATS[name].values(parts, torch.bfloat16).float()).float().mean()
    assert moved > 0.9  # all but the smallest values there are
    assert torch.equal(parameter.data, sparse24.decompress(mine.rounded(), parts["bitmask"]).bfloat16())


def test_values_in_the_range_of_fp8_keep_their_small_steps():
    """Between any two neighbours, which are up to 32 scales apart."""
    scales, generator = torch.full((16, 1), 0.01), torch.Generator().manual_seed(0)
    values = 0.01 * 447 * (2 * torch.rand(16, 64, generator=generator) - 1)
    rounded, after = StraightThrough(FP8, scales, torch.float32)(values, slice(None))
    assert torch.equal(after, values) and torch.equal(rounded, FP8.nearest(values, scales))
    assert float((rounded - values).abs().max()) > 0.01 * 12


@pytest.mark.parametrize("name", QUANTIZED)
def test_beyond_the_largest_value_they_stay_within_a_step(name):
    parts = encoded(name)
    values = FORMATS[name].values(parts, torch.float32) * 10
    rounded, after = StraightThrough(FORMATS[name], parts["weight_scale"], torch.float32)(values, slice(None))
    step = parts["weight_scale"].float().repeat_interleave(values.shape[1] // parts["weight_scale"].shape[1], 1)
    apart, largest = (32, 448) if name == "fp8" else (1, 8 if "int4" in name else 127)
    assert bool(((after - rounded).abs() <= step * apart * 1.001).all())
    assert bool((rounded.abs() <= step * largest * 1.001).all())
    again = StraightThrough(FORMATS[name], parts["weight_scale"], torch.float32)(after, slice(None))
    assert torch.equal(again[0], rounded)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_gradient_of_scales_is_that_of_autograd_through_a_straight_rounding(name):
    parts, generator = encoded(name), torch.Generator().manual_seed(1)
    weight_format, scales = FORMATS[name], parts["weight_scale"].float()
    values = FORMATS[name].values(parts, torch.float32)
    values += 0.4 * values.std() * torch.randn(values.shape, generator=generator)  # some lie out of range
    gradient = torch.randn(values.shape, generator=generator)
    changes = torch.zeros_like(scales, dtype=torch.float64, requires_grad=True)
    wide = (scales.double() * changes.exp()).repeat_interleave(values.shape[1] // scales.shape[1], 1)
    steps = (values.double() / wide).clamp(weight_format.smallest, weight_format.largest)
    rounded = steps.detach().float().to(torch.float8_e4m3fn).double() if name == "fp8" else steps.detach().round()
    steps = steps + rounded - steps.detach()
    (steps * wide * gradient).sum().backward()
    found = StraightThrough(weight_format, scales, torch.float32).of_scales(values, gradient, slice(None))
    assert torch.allclose(found.double(), changes.grad, rtol=1e-4, atol=1e-4 * float(changes.grad.abs().max()))
    assert bool((steps.abs() > weight_format.largest - 0.5).any())
