"""What layers read besides the residual stream: kept for each chunk and each of the two streams, and freed."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.arguments import AllArguments, Arguments, OfChunks
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.sharing import Sharing
from ria_vllm.offline.runtime.ranks import Ranks
from ria_vllm.progress import Monitor

ENTRY, OTHER = (0, "full"), (0, "sliding")


def pair(number: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((1, 2, 3), number, dtype=dtype), torch.full((1, 2, 3), -number, dtype=dtype)


def same(one: tuple, other: tuple) -> bool:
    return type(one) is type(other) and all(map(torch.equal, one, other))


def test_what_is_left_is_kept_replaced_and_dropped():
    left = OfChunks()
    for chunk in range(3):
        left.put(chunk, {ENTRY: pair(chunk + 1), OTHER: torch.full((2,), float(chunk))})
    for chunk in range(3):  # a later layer replaces it
        left.put(chunk, {ENTRY: pair(chunk + 11)})
        found = left.of(chunk, [ENTRY, OTHER])
        assert same(found[ENTRY], pair(chunk + 11)) and torch.equal(found[OTHER], torch.full((2,), float(chunk)))
    left.drop({ENTRY, (5, "never left")})
    assert set(left.stored) == {OTHER}
    left.put(0, {ENTRY: pair(7)})  # left anew, beside what is still there
    found = left.of(0, [ENTRY, OTHER])
    assert same(found[ENTRY], pair(7)) and torch.equal(found[OTHER], torch.zeros(2))


def arguments(streams: int = 3) -> tuple[AllArguments, LayerCall]:
    """Layer 0 leaves ENTRY, which layer 1 reads; both have an input that is made from the text."""
    call = LayerCall((torch.zeros(1, 4),), {"kept": {}}, False, "here", frozenset([0]), {"kept": 0})
    made = OfChunks()
    for chunk in range(streams):
        made.put(chunk, {(index, 0): torch.full((1, 4), float(10 * index + chunk)) for index in range(2)})
    meta = torch.empty(0, device="meta")
    sharing = Sharing(({ENTRY: (meta, meta)}, {}), (frozenset(), frozenset([ENTRY])))
    left = {dense: OfChunks() for dense in (False, True)}
    return AllArguments({torch.Size([1, 4, 8]): [call, call]}, made, sharing, left), call


def test_each_chunk_of_each_stream_has_its_own():
    found, call = arguments()
    first, second = Arguments(found, 0), Arguments(found, 1)
    for dense in (False, True):
        for chunk in range(3):
            first.put(dense, chunk, {ENTRY: pair(100 * dense + chunk), OTHER: "not read, so not kept"})
    stream = torch.zeros(1, 4, 8, dtype=torch.float64)
    for dense in (False, True):
        for chunk in range(3):
            made = second.call(stream, second.given(dense, chunk))
            assert torch.equal(made[0], torch.full((1, 4), 10.0 + chunk, dtype=torch.float64))
            assert same(made["kept"]["full"], pair(100 * dense + chunk, torch.float64))
            assert first.call(stream, first.given(dense, chunk))["kept"] == {}
    assert call["kept"] == {} and not call[0].any()  # what all chunks have in common is as it was
    found.free(0)
    assert set(found.made.stored) == {(1, 0)} and set(found.left[False].stored) == {ENTRY}
    found.free(1)
    assert not found.left[False].stored and not found.left[True].stored


def inputs_and_calls(streams: Activations, arguments: Arguments, ranks: Ranks) -> list:
    runner: Any = SimpleNamespace(device=torch.device("cpu"))
    return list(SublayerPass(runner, arguments, Streams(streams, None, 3), ranks, Monitor(), str).inputs_and_calls())


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_get_the_arguments_of_the_rank_that_holds_the_chunk(rank, monkeypatch):
    """Chunk 0 is rank 0's, chunks 1 and 2 are rank 1's."""
    found, _ = arguments(streams=3)
    left, sent = found.left[False], {}
    for chunk in range(3):
        left.put(chunk, {ENTRY: pair(chunk)})
    whole = Activations()
    for chunk in range(3):
        whole.append(torch.full((1, 4, 8), float(chunk)))
    alone = inputs_and_calls(whole, Arguments(found, 1), Ranks())
    own = Activations()
    for chunk in ((0,), (1, 2))[rank]:
        own.append(whole[chunk])
    mine = Arguments(AllArguments(found.calls, OfChunks(), found.sharing, {False: OfChunks()}), 1)
    for number, chunk in enumerate(((0,), (1, 2))[rank]):
        mine.every.made.put(number, {(1, 0): torch.full((1, 4), 10.0 + chunk)})
        mine.every.left[False].put(number, {ENTRY: pair(chunk)})

    def broadcast(self, value, src):
        assert (value is not None) == (src == rank)
        at = sent.setdefault("calls", 0)
        sent["calls"] += 1
        return (whole[at], Arguments(found, 1).given(False, at)) if value is None else value

    monkeypatch.setattr(Ranks, "broadcast", broadcast)
    both = inputs_and_calls(own, mine, Ranks(rank, 2))
    for (stream, call), (expected, wanted) in zip(both, alone, strict=True):
        assert torch.equal(stream, expected) and torch.equal(call[0], wanted[0])
        assert same(call["kept"]["full"], wanted["kept"]["full"])
    assert sent["calls"] == 3
