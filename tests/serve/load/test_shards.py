"""Which linears and outputs vLLM's shard ids cover, for each way in which a checkpoint may fuse a layer's linears."""

import pytest
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, ReplicatedLinear

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.shards import ShardMap

pytestmark = pytest.mark.usefixtures("ranks")


def qkv(linears):
    layer = QKVParallelLinear(64, 16, 4, 2, bias=False)
    return ShardMap.of(layer, linears, 3)


def merged(linears, sizes):
    layer = MergedColumnParallelLinear(64, sizes, bias=False)
    return ShardMap.of(layer, linears, len(sizes))


@pytest.mark.parametrize(
    ("shard", "linears", "outputs", "rows"),
    [("k", ("k",), ("k",), 32), (None, ("q", "k", "v"), ("q", "k", "v"), 128)],
)
def test_attention(shard, linears, outputs, rows):
    shards = qkv(("q", "k", "v"))
    assert (shards.linears_of(shard), shards.outputs_of(shard), shards.rows[shard]) == (linears, outputs, rows)


@pytest.mark.parametrize(
    ("shard", "linears", "outputs"),
    [(1, ("up",), (1,)), ((0, 1), ("gate", "up"), (0, 1))],
)
def test_gate_and_up(shard, linears, outputs):
    shards = merged(("gate", "up"), [32, 48])
    assert (shards.linears_of(shard), shards.outputs_of(shard)) == (linears, outputs)
    assert (shards.rows[0], shards.rows[1], shards.rows[None]) == (32, 48, 80)


@pytest.mark.parametrize("shard", [None, (0, 1)])
def test_fused_on_disk(shard):
    assert merged(("gate_up",), [32, 32]).linears_of(shard) == ("gate_up",)


@pytest.mark.parametrize(
    ("shard", "linears", "outputs"),
    [((0, 1, 2), ("qkv",), (0, 1, 2)), (3, ("z",), (3,)), (None, ("qkv", "z"), (0, 1, 2, 3))],
)
def test_two_linears_for_four_outputs(shard, linears, outputs):
    shards = merged(("qkv", "z"), [16, 16, 32, 32])
    assert (shards.linears_of(shard), shards.outputs_of(shard)) == (linears, outputs)


def test_three_linears_for_four_outputs_are_refused():
    with pytest.raises(RiaError, match="a, b, c: vLLM divides their layer into 4 outputs"):
        merged(("a", "b", "c"), [16, 16, 32, 32])


def test_a_single_linear():
    shards = ShardMap.of(ReplicatedLinear(64, 48, bias=False), ("fc",), 1)
    assert (shards.linears_of(None), shards.outputs_of(None), dict(shards.rows)) == (("fc",), (None,), {None: 48})


def test_an_unknown_shard_id_is_refused():
    with pytest.raises(RiaError, match="gate, up: vLLM loads one of them as shard 2, and ria-vllm does not know which"):
        merged(("gate", "up"), [32, 32]).linears_of(2)
