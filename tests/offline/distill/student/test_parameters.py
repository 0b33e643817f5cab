"""Sparse AdamW against torch's own on a dense weight with a mask."""

import pytest
import torch
from torch import nn

from ria_vllm.format import sparse24
from ria_vllm.offline.distill.student import layouts
from ria_vllm.offline.distill.student.layouts import Kept
from ria_vllm.offline.distill.student.parameters import AdamW, Pace, TrainedParameter, step_in_backward

EXACT = {"first": torch.float32, "second": torch.float32, "clip": 0.0}
ROWS, COLUMNS = 16, 64


def trained(adamw: AdamW, pace: Pace, seed: int = 0) -> tuple[TrainedParameter, torch.Tensor, torch.Tensor]:
    """(a parameter in training, its dense weight, its mask)."""
    torch.manual_seed(seed)
    compressed, bitmask = sparse24.compress(torch.randn(ROWS, COLUMNS))
    weight, order = sparse24.decompress(compressed, bitmask), torch.randperm(COLUMNS).int()
    dense, mask = torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    dense[:, order.long()], mask[:, order.long()] = weight, sparse24.mask_from_bitmask(bitmask)
    parameter = nn.Parameter(dense.clone())
    mine = TrainedParameter(parameter, Kept(bitmask, order), compressed.clone(), adamw, pace)
    step_in_backward(parameter, [mine])
    return mine, dense, mask


def gradients(steps: int) -> list[torch.Tensor]:
    return list(torch.randn(steps, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("block", [1 << 20, 3 * COLUMNS])
def test_the_steps_are_those_of_torchs_adamw_on_a_masked_weight(block, monkeypatch):
    monkeypatch.setattr(layouts, "BLOCK", block)
    pace = Pace()
    mine, dense, mask = trained(AdamW(**EXACT), pace)
    other = nn.Parameter(dense.clone())
    optimizer = torch.optim.AdamW([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for number, gradient in enumerate(gradients(20), 1):
        pace.number, pace.lr = number, 1e-2 / number
        (mine.parameter * gradient).sum().backward()
        other.grad = gradient * mask
        optimizer.param_groups[0]["lr"] = pace.lr
        optimizer.step()
        assert mine.parameter.grad is None
    assert torch.equal(mine.parameter.data != 0, mask)
    assert torch.allclose(mine.parameter.data, other.data, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(mine.parameter.data, dense, atol=1e-2)


def test_ten_bytes_for_each_kept_weight_and_a_quarter_for_its_place():
    mine, _, mask = trained(AdamW(), Pace())
    kept = int(mask.sum())
    assert sum(tensor.nbytes for tensor in mine.state().values()) == 10 * kept
    assert mine.layout.bitmask.nbytes == kept / 4


def test_small_steps_are_not_lost_in_a_bfloat16_weight():
    pace = Pace(lr=1e-5)
    mine, dense, _ = trained(AdamW(), pace)
    mine.parameter.data = mine.parameter.data.bfloat16()
    for number in range(1, 101):
        pace.number = number
        mine.arrived(torch.ones_like(mine.parameter.data))
    assert torch.allclose(mine.rounded(), mine.layout.take(dense, slice(None)) - 1e-3, atol=2e-5)
