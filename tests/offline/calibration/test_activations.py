"""Activations, and the chunks of all ranks."""

import pytest
import torch

from ria_vllm.offline.calibration.activations import Activations, AllChunks
from ria_vllm.offline.runtime.ranks import Ranks


def test_streams_are_kept_in_one_dtype_and_given_back_in_another():
    stored = Activations(torch.float32, torch.bfloat16)
    stream = torch.randn(2, 3, 4)
    stored.append(stream)
    assert stored[0].dtype == torch.float32 and torch.equal(stored[0], stream.bfloat16().float())
    assert stored.chunks[0].dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [0, 1])
def test_the_chunks_of_all_ranks_come_from_the_rank_that_holds_them(rank, monkeypatch):
    chunks = [torch.full((1, 2, 3), float(number), dtype=torch.bfloat16) for number in range(5)]
    holders = [0, 0, 1, 1, 1]
    own = Activations()
    for number in range(5):
        if holders[number] == rank:
            own.append(chunks[number])
    sent = []
    monkeypatch.setattr(Ranks, "broadcast", lambda self, value, src: sent.append((value, src)) or chunks[len(sent) - 1])
    found = list(AllChunks(own, 5, Ranks(rank, 2), torch.device("cpu")))
    assert [src for _, src in sent] == holders
    for number, (value, src) in enumerate(sent):
        assert torch.equal(value, chunks[number]) if src == rank else value is None
        assert found[number].dtype == torch.float32 and torch.equal(found[number], chunks[number].float())
    assert len(found) == 5
