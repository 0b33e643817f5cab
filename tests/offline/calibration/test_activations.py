"""The residual streams that are kept."""

import torch

from ria_vllm.offline.calibration.activations import Activations


def test_streams_are_kept_in_one_dtype_and_given_back_in_another():
    stored = Activations(torch.float32, torch.bfloat16)
    stream = torch.randn(2, 3, 4)
    stored.append(stream)
    assert stored[0].dtype == torch.float32 and torch.equal(stored[0], stream.bfloat16().float())
    assert stored.chunks[0].dtype == torch.bfloat16
