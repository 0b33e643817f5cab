"""A tensor with reordered rows, against the same rows taken by indexing."""

import torch

from ria_vllm.serve.load.reordered_rows import ReorderedRows


def test_reordered_rows_are_what_indexing_gives():
    tensor, rows = torch.randn(8, 4), torch.randperm(8)
    reordered, want = ReorderedRows.of(tensor, rows), tensor[rows]
    assert reordered.shape == want.shape and reordered.dim() == 2 and reordered.dtype == want.dtype
    for got, expected in (
        (reordered.narrow(0, 2, 3), want[2:5]),
        (reordered.narrow(1, 1, 2), want[:, 1:3]),
        (torch.empty(8, 4).copy_(reordered), want),
        (reordered[3], want[3]),
        (reordered + 1, want + 1),
        (torch.cat([reordered, reordered]), torch.cat([want, want])),
    ):
        assert type(got) is torch.Tensor and torch.equal(got, expected)
