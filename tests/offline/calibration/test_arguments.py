"""What layers read besides the residual stream: kept for each chunk and each of the two streams, and freed."""

from types import SimpleNamespace
from typing import Any

import torch

from ria_vllm.offline.calibration.activations import Activations, Streams
from ria_vllm.offline.calibration.arguments import AllArguments, Arguments, OfChunks
from ria_vllm.offline.calibration.sublayer_pass import SublayerPass
from ria_vllm.offline.model.run.layer_call import LayerCall
from ria_vllm.offline.model.run.sharing import Sharing
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
            made = second.call(stream, dense, chunk)
            assert torch.equal(made[0], torch.full((1, 4), 10.0 + chunk, dtype=torch.float64))
            assert same(made["kept"]["full"], pair(100 * dense + chunk, torch.float64))
            assert first.call(stream, dense, chunk)["kept"] == {}
    assert call["kept"] == {} and not call[0].any()  # what all chunks have in common is as it was
    found.free(0)
    assert set(found.made.stored) == {(1, 0)} and set(found.left[False].stored) == {ENTRY}
    found.free(1)
    assert not found.left[False].stored and not found.left[True].stored


def test_what_is_trained_gets_each_chunk_in_float32_with_its_own_arguments():
    found, _ = arguments()
    pruned = Activations(torch.bfloat16)
    runner: Any = SimpleNamespace(device=torch.device("cpu"))
    for chunk in range(3):
        found.left[False].put(chunk, {ENTRY: pair(chunk)})
        pruned.append(torch.full((1, 4, 8), float(chunk)))
    sublayer_pass = SublayerPass(runner, Arguments(found, 1), Streams(pruned, None), Monitor(), str)
    for chunk in range(3):
        stream, call = sublayer_pass.input_and_call(chunk)
        assert stream.dtype == torch.float32 and torch.equal(stream, torch.full((1, 4, 8), float(chunk)))
        assert torch.equal(call[0], torch.full((1, 4), 10.0 + chunk))
        assert same(call["kept"]["full"], pair(chunk))
