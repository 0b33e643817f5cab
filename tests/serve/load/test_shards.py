"""Which linears and outputs vLLM's shard ids cover, for each way in which a checkpoint may fuse a layer's linears."""

import pytest
from vllm.model_executor.layers.linear import MergedColumnParallelLinear

from ria_vllm.errors import RiaError
from ria_vllm.serve.load.shards import ShardMap

pytestmark = pytest.mark.usefixtures("ranks")


def merged(linears, sizes):
    layer = MergedColumnParallelLinear(64, sizes, bias=False)
    return ShardMap.of(layer, linears, len(sizes))


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


def test_an_unknown_shard_id_is_refused():
    with pytest.raises(RiaError, match="gate, up: vLLM loads one of them as shard 2, and ria-vllm does not know which"):
        merged(("gate", "up"), [32, 32]).linears_of(2)
